"""A program on the login node starts, watches, cancels and continues a job by its handle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import STEPS
from tests.support.command import results

from .test_faults import SLOW, TWO_NODES

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

PROGRAM = """
import json, sys, time
import titan

config = titan.compose(*sys.argv[1:])
run = titan.launch(config)
states = [run.status.state]
while not run.metrics():
    time.sleep(0.2)
states.append(run.status.state)
titan.attach(run.directory).cancel()
cancelled = run.wait(240)
print(json.dumps([run.job, states, cancelled.state, cancelled.exit_code, cancelled.step]))

assert run.status == titan.attach("run").status
again = titan.launch(config)
ended = again.wait(240)
print(json.dumps([again.job, ended.state, ended.exit_code, ended.step, titan.metrics("run")["step"]]))
"""


def test_a_job_is_watched_cancelled_and_continued_by_its_handle(
    slurm: Cluster, job: tuple[str, ...], undisturbed: Path, here: Path
) -> None:
    """It saves when it is cancelled, a second job goes on, and all rows are those of the undisturbed run."""
    slurm.wait_until_idle()
    (here / "program.py").write_text(PROGRAM)
    words = (sys.executable, "program.py", *job, *TWO_NODES)
    finished = slurm.run(*words, folder=here, timeout_seconds=500, **SLOW)
    assert finished.code == 0, finished.text
    (first, states, *cancelled), (second, *ended, steps) = (
        json.loads(line) for line in finished.out.splitlines() if line.startswith("[")
    )
    assert states in (["pending", "running"], ["starting", "running"])
    assert cancelled[:2] == ["preempted", 75]
    assert 1 <= cancelled[2] < STEPS
    assert slurm.field(first, "JobState") == "CANCELLED"
    assert int(second) > int(first)
    assert ended == ["complete", 0, STEPS]
    assert steps == list(range(1, STEPS + 1))
    assert results(here / "run") == results(undisturbed)
