"""Sweeps become job arrays: every point gets the resources it asks for, and a point that fails fails alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.support.command import finish, results, wait_until
from titan.run_directory import RunDirectory

from .test_faults import SLOW

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SWEEP = ("--multirun", "cluster=slurm", "run.dir=sweep", "training.steps=2")


def jobs_of(text: str) -> list[str]:
    """Return the jobs in the table at the end of a sweep, in the order of the points."""
    return re.findall(r"^\d+ +job (\S+)", text, re.MULTILINE)


def test_one_array_for_each_shape_of_resources(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """A sweep over nodes and seeds: an array of two jobs of one node, and one of two jobs of two nodes."""
    finished = slurm.titan(
        *job, *SWEEP, "cluster.nodes=1,2", "training.seed=1,2", "cluster.array_parallelism=1", folder=here
    )
    assert finished.code == 0, finished.text
    numbers = jobs_of(finished.out)
    arrays = [number.partition("_")[0] for number in numbers]
    assert [number.partition("_")[2] for number in numbers] == ["0", "1", "0", "1"]
    assert arrays[0] == arrays[1] != arrays[2] == arrays[3]
    assert "0-1%1" in (here / "sweep" / "slurm" / f"{arrays[0]}_submission.sh").read_text()
    for index, number in enumerate(numbers):
        slurm.wait_for_state(number, "COMPLETED")
        assert slurm.field(number, "NumNodes") == str(1 + index // 2)
        directory = RunDirectory(here / "sweep" / str(index))
        assert directory.read_status()["state"] == "complete"
        assert directory.read_events("start")[0]["ranks"] == 1 + index // 2
        assert len(results(directory.path)) == 2
    assert results(here / "sweep" / "0") != results(here / "sweep" / "1"), "two seeds"

    again = slurm.titan(*job, *SWEEP, "cluster.nodes=1,2", "training.seed=1,2", folder=here)
    assert again.code == 0
    assert again.out.count("this run is complete") == 4
    assert jobs_of(again.out) == []


def test_a_failing_point_is_failed_and_the_others_go_on(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """One point's loss becomes infinite: FAILED with 71 in SLURM, its siblings COMPLETED, and 71 for who waits."""
    finished = slurm.titan(
        *job, *SWEEP, "optimizer.lr=1e-3,1e30", "training.max_grad_norm=0", "lr_scheduler.warmup_steps=0",
        "training.steps=4", "cluster.wait=true", folder=here,
    )  # fmt: skip
    assert finished.code == 71, finished.text
    table = finished.out[finished.out.index("point  status") :]
    assert re.search(r"^0 +complete +\d+\.\d+ .*optimizer.lr=0.001 ", table, re.MULTILINE)
    assert re.search(r"^1 +failed .*optimizer.lr=1e\+30 ", table, re.MULTILINE)
    states = dict(re.findall(r"^job \d+_(\d): (COMPLETED|FAILED)", finished.out, re.MULTILINE))
    assert states == {"0": "COMPLETED", "1": "FAILED"}
    (array,) = set(re.findall(r"^job (\d+)_", finished.out, re.MULTILINE))
    assert slurm.field(f"{array}_1", "ExitCode") == "71:0"


def test_one_bad_point_stops_all_before_anything_is_submitted(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """Every point is checked first: nothing is in the queue, and not a file on the disk."""
    before = slurm.ask("squeue", "--noheader", "--states=all", "--format=%i").split()
    finished = slurm.titan(*job, *SWEEP, "parallelism.tp=1,3", "cluster.devices_per_node=3", folder=here)
    assert finished.code == 2
    assert "parallelism.tp = 3 does not divide model.n_kv_heads = 2" in finished.err
    assert "at 1 of 2 points: " in finished.err
    assert slurm.ask("squeue", "--noheader", "--states=all", "--format=%i").split() == before
    assert list(here.iterdir()) == []


def test_what_was_submitted_before_a_refusal_stays_and_is_shown(
    slurm: Cluster, job: tuple[str, ...], here: Path
) -> None:
    """The second of two arrays is refused: the first is named, and the same sweep again leaves it alone."""
    held = (*job, *SWEEP, "+cluster.sbatch.hold=")
    refused = slurm.titan(*held, "cluster.partition=main,nosuch", folder=here)
    assert refused.code == 1, refused.text
    assert "invalid partition specified: nosuch" in refused.err
    (first,) = re.findall(r"^cancel +scancel (\d+)", refused.out, re.MULTILINE)
    assert (here / "sweep" / "0" / "config.yaml").exists()
    assert not (here / "sweep" / "1").exists()
    again = slurm.titan(*held, "cluster.partition=main,urgent", folder=here)
    assert again.code == 0, again.text
    assert f"sweep/0: job {first} has it already" in again.out
    assert jobs_of(again.out)[0] == first
    assert jobs_of(again.out)[1] != first
    slurm.ask("scancel", *jobs_of(again.out))


def test_a_point_of_an_array_comes_back_alone(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """One point of an array is told to stop: it alone is put back into the queue, and goes on."""
    finished = slurm.titan(*job, *SWEEP, "training.seed=1,2", "training.steps=12", folder=here, **SLOW)
    first, second = jobs_of(finished.out)
    directory = RunDirectory(here / "sweep" / "1")
    slurm.wait_for_state(second, "RUNNING")
    while not directory.metrics.exists() or not directory.metrics.read_text():
        assert slurm.field(second, "JobState") == "RUNNING"
    slurm.ask("scancel", "--signal=USR2", second)
    slurm.wait_for_state(first, "COMPLETED")
    slurm.wait_for_state(second, "COMPLETED")
    assert (slurm.field(first, "Restarts"), slurm.field(second, "Restarts")) == ("0", "1")
    assert len(directory.read_events("resume")) == 1
    assert [row[0] for row in results(directory.path)] == list(range(1, 13))


STOCK = ("--multirun", "hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=1",
         "hydra.launcher.timeout_min=20", "run.dir=sweep", "training.steps=3")  # fmt: skip


def test_the_stock_launcher_trains_on_all_of_its_tasks(
    slurm: Cluster, job: tuple[str, ...], here: Path, undisturbed: Path
) -> None:
    """hydra-submitit-launcher's tasks are the ranks of one run a point, in one directory."""
    finished = slurm.titan(*job, *STOCK, "training.seed=0,1", folder=here)
    assert finished.code == 0, finished.text
    for point in ("0", "1"):
        directory = RunDirectory(here / "sweep" / point)
        assert directory.read_status()["state"] == "complete"
        assert directory.read_events("start")[0]["ranks"] == 2
        assert len(results(directory.path)) == 3


def test_the_stock_launcher_tells_the_truth_about_a_failure(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """A rank that fails, even if it is not the first, makes the job FAILED and the command's exit code not 0."""
    finished = slurm.titan(*job, *STOCK, folder=here, PLANTED_FAULT="error:1:2")
    assert finished.code != 0, finished.text
    numbers = {path.name.split("_")[0] for path in here.rglob("*_submission.sh")}
    (number,) = numbers
    assert slurm.field(number, "JobState") == "FAILED"
    assert RunDirectory(here / "sweep" / "0").read_status()["why"] == "RuntimeError: a planted error"


def test_the_stock_launchers_jobs_come_back_too(
    slurm: Cluster, job: tuple[str, ...], here: Path, undisturbed: Path
) -> None:
    """Told to stop, all ranks save together, and then submitit puts its job back in its own way."""
    whole = [word for word in STOCK if not word.startswith("training.steps")]
    sweep = slurm.start(sys.executable, "-m", "titan.train", *job, *whole, folder=here, **SLOW)
    directory = RunDirectory(here / "sweep" / "0")
    wait_until(lambda: directory.metrics.exists() and len(results(directory.path)) > 3, "some steps", 120)
    (script,) = here.rglob("*_submission.sh")
    number = script.name.split("_")[0]
    slurm.ask("scancel", "--signal=USR2", number)
    finished = finish(sweep, 240)
    assert finished.code == 0, finished.text
    assert slurm.field(number, "Restarts") == "1"
    (stop,) = directory.read_events("signal")
    assert [event["step"] for event in directory.read_events("resume")] == [stop["step"]]
    assert results(directory.path) == results(undisturbed)


def test_optuna_learns_from_a_waiting_launcher(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """The sweeper that chooses points by their losses gets them, and writes down the best."""
    optuna = (
        *("--multirun", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2"),
        *("hydra.sweeper.direction=minimize", "optimizer.lr=interval(0.0001,0.01)"),
        *("cluster=slurm", "run.dir=sweep", "training.steps=2"),
    )
    refused = slurm.titan(*job, *optuna, folder=here)
    assert refused.code == 2
    assert "cluster.wait=true" in refused.err
    finished = slurm.titan(*job, *optuna, "cluster.wait=true", folder=here)
    assert finished.code == 0, finished.text
    losses = [results(here / "sweep" / str(point))[-1][1] for point in range(3)]
    best = (here / "sweep" / "optimization_results.yaml").read_text()
    assert float(re.search(r"best_value: (\S+)", best).group(1)) == pytest.approx(min(losses), rel=1e-9)  # type: ignore[union-attr]


def test_optuna_survives_a_point_that_fails(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """A failed point is a failed trial; the study goes on as far as the user allows."""
    finished = slurm.titan(
        *(*job, "--multirun", "cluster=slurm", "cluster.wait=true", "hydra/sweeper=optuna", "run.dir=sweep"),
        *("hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=4", "hydra.sweeper.max_failure_rate=0.8"),
        *("hydra.sweeper.sampler.seed=1", "optimizer.lr=choice(0.001,1e30)", "training.max_grad_norm=0"),
        *("lr_scheduler.warmup_steps=0", "training.steps=4"),
        folder=here,
    )
    assert finished.code == 71, finished.text
    assert "Traceback" not in finished.text
    states = [RunDirectory(here / "sweep" / str(point)).read_status()["state"] for point in range(4)]
    assert set(states) == {"complete", "failed"}
    assert "optimizer.lr: 0.001" in (here / "sweep" / "optimization_results.yaml").read_text()
