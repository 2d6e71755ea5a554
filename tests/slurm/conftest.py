"""The cluster for all tests of this folder, and the run that every interrupted one must equal."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPT, Cluster
from tests.support.command import TINY_MODEL, clean_environment, finish, start

STEPS = 30


@pytest.fixture(scope="session")
def slurm(cache: Path) -> Iterator[Cluster]:
    """A cluster of four nodes; where one cannot be made, the tests do not run, and say so."""
    if os.getuid() != 0:
        pytest.skip("a SLURM cluster needs root: NOT RUN")
    with pytest.MonkeyPatch.context() as patch:
        # not in pytest's own folder, which others may not enter: munge refuses to put its socket there
        folder = Path(tempfile.gettempdir()) / f"titan-slurm-{os.getpid()}"
        patch.setenv("SLURM_CLUSTER_DIR", str(folder))
        up = subprocess.run([SCRIPT, "up"], capture_output=True, text=True, timeout=300, check=False)
        if up.returncode:
            pytest.skip(f"no SLURM cluster can be made here: NOT RUN: {up.stderr.strip()}")
        try:
            yield Cluster(cache)
        finally:
            subprocess.run([SCRIPT, "down"], capture_output=True, timeout=120, check=True)
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def job(text_file: Path) -> tuple[str, ...]:
    """A small run for a cluster without GPUs; run.dir and how its ranks are started are still to be said."""
    return (
        *TINY_MODEL,
        *("training.seq_len=32", "training.local_batch_size=2", "data=text", f"data.path={text_file}"),
        *(f"training.steps={STEPS}", "metrics.log_every=1", "cluster.device=cpu", "checkpoint.interval=10"),
    )


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path, job: tuple[str, ...]) -> Path:
    """The directory of the same run of two ranks on this machine, without SLURM and without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = ["-m", "titan.train", *job, "cluster.devices_per_node=2", "run.dir=run"]
    finished = finish(start(arguments, folder, clean_environment(cache)))
    assert finished.code == 0, finished.text
    return folder / "run"
