"""Flipped bits, very many of them: none is accepted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch.distributed as dist

from tests.faults.conftest import SHORT, MakeReference
from tests.faults.damage import any_of, flip, flip_at
from tests.faults.report import Report
from titan.checkpoint.store import CheckpointStore
from titan.config.schema import CheckpointConfig, CheckpointMode
from titan.errors import CheckpointError
from titan.run_directory import RunDirectory

FLIPS = 10_000 * int(os.environ.get("FAULT_ROUNDS", "1"))


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.faults
@pytest.mark.usefixtures("alone")
def test_no_flipped_bit_is_accepted(undisturbed: MakeReference, tmp_path: Path, draw: Random, report: Report) -> None:
    """Any bit of any file of a real run's checkpoint: the checkpoint is refused, and whole again without the flip."""
    reference = undisturbed(SHORT)
    path = tmp_path / "checkpoints" / reference.checkpoint(SHORT).name
    shutil.copytree(reference.checkpoint(SHORT), path)
    run = RunDirectory(reference.directory).read_identity()
    store = CheckpointStore(path.parent, CheckpointConfig(mode=CheckpointMode.sync, strict=True))
    accepted = []
    for _ in range(FLIPS):
        file = any_of(path, draw)
        place = flip(file, draw)
        try:
            store.find(run)
            accepted.append((file.name, *place))
        except CheckpointError:
            pass
        flip_at(file, *place)
    assert store.find(run) is not None
    store.close()
    report.count("bits flipped", FLIPS)
    report.count("bits accepted", len(accepted))
    assert accepted == []
