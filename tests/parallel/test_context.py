"""What context parallelism keeps from step to step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from titan.parallel import context
from titan.trainer.build import build_trainer
from titan.trainer.loop import build_meter, run_step, steps_of_batches

from .layouts import layout_config, open_packed
from .matrix import mesh, options
from .pool import RankPool


def step_without_positions(overrides: tuple[str, ...], packed: Path) -> float:
    """Take a step in which nobody may compute positions anew; returns its loss."""
    config = layout_config(2, overrides)
    trainer = build_trainer(config, torch.device("cpu"), open_packed(packed, config))
    batch = next(steps_of_batches(trainer, build_meter(trainer)))
    with mock.patch.object(context, "positions_of_rank", side_effect=AssertionError("in a step")):
        return run_step(trainer, batch).result.read().loss


@pytest.mark.parametrize("documents", ["true", "false"])
@pytest.mark.parametrize("method", ["allgather", "ring", "all_to_all"])
def test_who_has_which_positions_is_known_before_the_step(
    pools: Callable[[int], RankPool], packed_file: Path, method: str, documents: str
) -> None:
    """On a GPU, the host would wait for the device with each copy of what it computes in a step."""
    overrides = (*mesh(cp=2), *options(f"cp_method={method}"), f"data.mask_documents={documents}")
    losses = pools(2).run(step_without_positions, overrides, packed_file)
    assert losses[0] == losses[1] > 0
