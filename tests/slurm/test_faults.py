"""Whatever ends a job, the run that goes on is the undisturbed run, bit for bit.

Every test compares all rows of metrics.jsonl with those of a run on this machine that nothing disturbed.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, job_of
from tests.slurm.conftest import STEPS
from tests.support.command import Finished, json_lines, results, wait_until
from titan.run_directory import RunDirectory

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SLOW = {"PLANTED_FAULT": "slow:0:0.4"}
TWO_NODES = ("cluster=slurm", "cluster.nodes=2", "run.dir=run")


def events(directory: Path, name: str) -> list[dict]:
    """Return what happened under a name."""
    return RunDirectory(directory).read_events(name)


def is_at(directory: Path, step: int) -> bool:
    """Whether a run has come to a step."""
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and any(row["step"] >= step for row in json_lines(metrics))


@pytest.fixture
def submitted(slurm: Cluster, job: tuple[str, ...], here: Path) -> tuple[str, Path]:
    """A slow run on two nodes that has done some steps: its job and its directory."""
    slurm.wait_until_idle()
    finished = slurm.titan(*job, *TWO_NODES, "data.num_workers=1", folder=here, **SLOW)
    assert finished.code == 0, finished.text
    wait_until(lambda: is_at(here / "run", 4), "four steps", 120)
    return job_of(finished), here / "run"


def preempt(slurm: Cluster, number: str) -> None:
    """Have an urgent job take all nodes for a while, and wait until it and the job that it preempts are done."""
    urgent = slurm.ask(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"),
        "--wrap=sleep 5",
    ).strip()
    slurm.wait_for_state(urgent, "COMPLETED")
    slurm.wait_for_state(number, "COMPLETED")


def finish_again(slurm: Cluster, job: tuple[str, ...], folder: Path) -> Finished:
    """Type the same command again, and wait for the job's end."""
    return slurm.titan(*job, *TWO_NODES, "cluster.wait=true", folder=folder)


def test_a_warning_saves_requeues_and_resumes(slurm: Cluster, submitted: tuple[str, Path], undisturbed: Path) -> None:
    """SIGUSR2 to all processes: one checkpoint between two intervals, the same job again, the same results.

    The data-loader workers get the signal too; that they did not die of it shows in the step that was saved.
    """
    number, run = submitted
    slurm.ask("scancel", "--signal=USR2", number)
    wait_until(lambda: bool(events(run, "signal")), "the signal to be noted")
    step = events(run, "signal")[0]["step"]
    slurm.wait_for_state(number, "COMPLETED")
    assert slurm.field(number, "Restarts") == "1"
    assert [event["step"] for event in events(run, "resume")] == [step]
    assert step in [event["step"] for event in events(run, "save")]
    assert results(run) == results(undisturbed)
    assert RunDirectory(run).read_status()["state"] == "complete"
    assert "goes back into the queue, restart 1 of at most 50" in "".join(
        p.read_text() for p in run.glob("slurm/*.out")
    )


def test_requeues_are_bounded(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """At the bound the job ends with 75, and says what goes on from there."""
    finished = slurm.titan(*job, *TWO_NODES, "cluster.max_requeues=0", folder=here, **SLOW)
    number = job_of(finished)
    wait_until(lambda: is_at(here / "run", 2), "two steps", 120)
    slurm.ask("scancel", "--signal=USR2", number)
    slurm.wait_for_state(number, "FAILED")
    assert slurm.field(number, "ExitCode") == "75:0"
    status = RunDirectory(here / "run").read_status()
    assert (status["state"], status["saved_step"]) == ("preempted", status["step"])
    said = "".join(path.read_text() for path in here.glob("run/slurm/*.out"))
    assert "has come back 0 times, and may not again; the same command goes on" in said


@pytest.mark.timeout(1000)
def test_a_time_limit_is_survived(slurm: Cluster, job: tuple[str, ...], here: Path, undisturbed: Path) -> None:
    """A limit that is too short for the run: as many starts as it takes, and the same results.

    Its steps alone take longer, and a start takes less of it, on whatever machine.
    """
    slower = {"PLANTED_FAULT": "slow:0:4"}
    limit = ("cluster.time=0:02:00", "cluster.grace_seconds=20")
    finished = slurm.titan(*job, *TWO_NODES, *limit, folder=here, **slower)
    number = job_of(finished)
    slurm.wait_for_state(number, "COMPLETED", timeout_seconds=800)
    assert int(slurm.field(number, "Restarts")) >= 1
    assert {event["signal"] for event in events(here / "run", "signal")} == {"SIGUSR2"}
    assert results(here / "run") == results(undisturbed)


def test_a_preemption_is_survived(slurm: Cluster, submitted: tuple[str, Path], undisturbed: Path, here: Path) -> None:
    """An urgent job takes the nodes; the run makes room, waits, and goes on."""
    number, run = submitted
    preempt(slurm, number)
    assert slurm.field(number, "Restarts") == "1"
    assert [event["signal"] for event in events(run, "signal")] == ["SIGUSR2"]
    assert results(run) == results(undisturbed)


def test_a_preemption_without_a_signal_is_survived(
    slurm: Cluster, job: tuple[str, ...], undisturbed: Path, here: Path
) -> None:
    """Many sites send nothing but SIGTERM before a preemption: to the ranks and to the batch script."""
    with slurm.configured("preempt_send_user_signal", "enable_configless"):
        slurm.wait_until_idle()
        number = job_of(slurm.titan(*job, *TWO_NODES, folder=here, **SLOW))
        run = here / "run"
        wait_until(lambda: is_at(run, 4), "four steps", 120)
        preempt(slurm, number)
    assert slurm.field(number, "Restarts") == "1"
    assert [event["signal"] for event in events(run, "signal")] == ["SIGTERM"]
    assert results(run) == results(undisturbed)


def test_scontrol_requeue_loses_nothing(slurm: Cluster, submitted: tuple[str, Path], undisturbed: Path) -> None:
    """Requeued from outside, the ranks get SIGTERM, save and end; the job starts again from there."""
    number, run = submitted
    slurm.ask("scontrol", "requeue", number)
    wait_until(lambda: bool(events(run, "signal")), "the signal to be noted")
    slurm.wait_for_state(number, "COMPLETED")
    assert [event["signal"] for event in events(run, "signal")] == ["SIGTERM"]
    assert [event["step"] for event in events(run, "resume")] == [event["step"] for event in events(run, "signal")]
    assert results(run) == results(undisturbed)


def test_scancel_ends_the_job_for_good(
    slurm: Cluster, submitted: tuple[str, Path], job: tuple[str, ...], undisturbed: Path, here: Path
) -> None:
    """A cancelled job saves, and does not come back by itself; the same command goes on."""
    number, run = submitted
    slurm.ask("scancel", number)
    slurm.wait_for_state(number, "CANCELLED")
    wait_until(lambda: slurm.ask("squeue", "--noheader", f"--jobs={number}").strip() == "", "the job to be gone", 60)
    assert RunDirectory(run).read_status()["state"] == "preempted"
    assert slurm.field(number, "Restarts") == "0"
    again = finish_again(slurm, job, here)
    assert again.code == 0, again.text
    assert job_of(again) != number
    assert results(run) == results(undisturbed)


def test_a_killed_rank_fails_the_job_at_once(
    slurm: Cluster, job: tuple[str, ...], here: Path, undisturbed: Path
) -> None:
    """SIGKILL to one rank: the job is FAILED within seconds, and the same command goes on from the last checkpoint."""
    slurm.wait_until_idle()
    finished = slurm.titan(
        *job, *TWO_NODES, "cluster.wait=true", folder=here, PLANTED_FAULT="kill:1:15", timeout_seconds=120
    )
    assert finished.code not in (0, 75), finished.text
    number = job_of(finished)
    assert slurm.field(number, "JobState") == "FAILED"
    assert "another rank ended" in finished.err
    again = finish_again(slurm, job, here)
    assert again.code == 0, again.text
    assert [event["step"] for event in events(here / "run", "resume")] == [10]
    assert results(here / "run") == results(undisturbed)


def test_a_failing_rank_fails_the_job_and_is_named(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """An exception in one rank: FAILED for SLURM with the rank's exit code, which the waiting command takes over."""
    slurm.wait_until_idle()
    began = time.monotonic()
    finished = slurm.titan(*job, *TWO_NODES, "cluster.wait=true", folder=here, PLANTED_FAULT="error:1:3")
    assert time.monotonic() - began < 60
    assert finished.code == 1, finished.text
    number = job_of(finished)
    assert slurm.field(number, "JobState") == "FAILED"
    assert slurm.field(number, "ExitCode") == "1:0"
    assert "RuntimeError: a planted error" in finished.err
    assert "run/logs/rank_00001.attempt_0.log" in finished.err


def test_a_node_powered_off_is_survived(slurm: Cluster, submitted: tuple[str, Path], undisturbed: Path) -> None:
    """A node is lost: SLURM puts the job back, and it goes on from the last checkpoint on other nodes."""
    number, run = submitted
    wait_until(lambda: bool(events(run, "save")), "a checkpoint", 60)
    lost = slurm.field(number, "BatchHost").replace("1", "2")
    slurm.power("kill-node", lost)
    try:
        slurm.wait_for_state(number, "COMPLETED", timeout_seconds=300)
    finally:
        slurm.power("start-node", lost)
        slurm.wait_until_idle()
    assert slurm.field(number, "Restarts") == "1"
    assert len(events(run, "resume")) == 1
    assert lost not in slurm.field(number, "NodeList")
    assert results(run) == results(undisturbed)
    assert results(run)[-1][0] == STEPS
