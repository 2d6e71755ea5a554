"""What `cluster=slurm` submits trains the same run as this machine does; and what it refuses, it refuses in time."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, job_of
from tests.support.command import (
    REPOSITORY,
    clean_environment,
    files_below,
    finish,
    json_lines,
    results,
    start,
    wait_until,
)
from titan.run_directory import RunDirectory

from .test_faults import SLOW, TWO_NODES

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

NO_TORCH = """
import sys
from titan import train
try:
    train.main()
finally:
    assert "submitit" in sys.modules, "nothing was submitted"
    assert "torch" not in sys.modules, "torch was imported"
"""


def test_two_nodes_of_two_ranks_equal_four_ranks_here(
    slurm: Cluster, job: tuple[str, ...], here: Path, cache: Path
) -> None:
    """The layout decides the numbers, not the machines: every loss and gradient norm has the same bits."""
    four = (*job, "parallelism.tp=2")
    arguments = ["-m", "titan.train", *four, "cluster.devices_per_node=4", "run.dir=local"]
    assert finish(start(arguments, here, clean_environment(cache))).code == 0
    finished = slurm.titan(
        *four, "cluster=slurm", "cluster.nodes=2", "cluster.devices_per_node=2", "cluster.wait=true", "run.dir=run",
        folder=here,
    )  # fmt: skip
    assert finished.code == 0, finished.text
    assert results(here / "run") == results(here / "local")
    number = job_of(finished)
    assert slurm.field(number, "JobState") == "COMPLETED"
    assert slurm.field(number, "NumNodes") == "2"
    assert f"job {number}: COMPLETED" in finished.out
    assert "step 30/30" in finished.out, "the log of rank 0 is shown while waiting"
    assert "submitit INFO" not in finished.out
    (event,) = RunDirectory(here / "run").read_events("start")
    assert event["ranks"] == 4


def test_submission_returns_at_once_and_without_torch(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """The login node composes, checks, freezes and submits without importing torch, and says what it has done."""
    (here / "watched.py").write_text(NO_TORCH)
    finished = slurm.run(
        sys.executable, "watched.py", *job, *TWO_NODES, "training.steps=1", "cluster.time=0:20:00", folder=here
    )
    assert finished.code == 0, finished.text
    number = job_of(finished)
    assert finished.out.splitlines() == [
        "run        run",
        f"job        {number}, 2 nodes x 1 = 2 ranks, time 0:20:00",
        f"log        run/slurm/{number}_0_log.out",
        f"cancel     scancel {number}",
    ]
    slurm.wait_for_state(number, "COMPLETED")
    assert (here / "run" / "slurm" / f"{number}_0_log.out").exists()
    assert slurm.field(number, "JobName") == "llama3_debug"
    assert slurm.field(number, "TimeLimit") == "00:20:00"


def test_ctrl_c_while_waiting_leaves_the_job_running(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """Whoever stops watching is told how to end the job, and has not ended it."""
    process = slurm.start(
        sys.executable, "-m", "titan.train", *job, *TWO_NODES, "cluster.wait=true", folder=here, **SLOW
    )
    wait_until(lambda: bool(RunDirectory(here / "run").read_events("start")), "the job to start")
    process.send_signal(signal.SIGINT)
    finished = finish(process)
    assert finished.code == 130
    assert "Traceback" not in finished.text
    number = job_of(finished)
    assert f"scancel {number}" in finished.err
    assert slurm.field(number, "JobState") == "RUNNING"
    slurm.ask("scancel", number)
    slurm.wait_for_state(number, "CANCELLED")


def test_a_run_that_waits_or_runs_is_not_submitted_twice(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """Two jobs would write to the same files; once the first is done, the command says so and submits nothing."""
    held = (*job, *TWO_NODES, "+cluster.sbatch.hold=")
    first = slurm.titan(*held, folder=here)
    number = job_of(first)
    before = files_below(here / "run")
    second = slurm.titan(*held, "optimizer.lr=0.5", folder=here)
    assert second.code == 2
    assert f"belongs to job {number}, which has not ended" in second.err
    assert files_below(here / "run") == before
    slurm.ask("scontrol", "release", number)
    slurm.wait_for_state(number, "COMPLETED")
    third = slurm.titan(*held, folder=here)
    assert third.code == 0
    assert "this run is complete" in third.out
    assert "job  " not in third.out


def test_what_slurm_refuses_leaves_nothing_behind(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """A partition that is not there: SLURM's own words, exit code 2, and no file."""
    finished = slurm.titan(*job, *TWO_NODES, "cluster.partition=nosuch", folder=here)
    assert finished.code == 2
    assert "invalid partition specified: nosuch" in finished.err
    assert "Traceback" not in finished.text
    assert not (here / "run" / "config.yaml").exists()
    assert RunDirectory(here / "run").read_events("submit") == []


def test_a_job_that_ends_before_its_ranks_is_accounted_for(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """A set-up command fails: nobody but SLURM can say so, and the run does not stay "running" for ever."""
    finished = slurm.titan(
        *job, *TWO_NODES, "cluster.setup=['echo no module', 'exit 3']", "cluster.wait=true", folder=here
    )
    assert finished.code == 3, finished.text
    assert "no module" in finished.out
    assert "is FAILED" in finished.err
    status = RunDirectory(here / "run").read_status()
    assert (status["state"], status["exit_code"]) == ("failed", 3)


def test_a_job_does_not_submit_jobs_unless_told_to(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """From inside an allocation cluster=slurm is refused; forced, the new job inherits nothing of the old one."""
    command = (sys.executable, "-m", "titan.train", *job, *TWO_NODES)
    inside = ("srun", "--nodes=1", "--ntasks=1", "--exclusive", *command)
    refused = slurm.run(*inside, folder=here)
    assert refused.code == 2
    assert "is inside SLURM job" in refused.err
    assert not (here / "run").exists()
    forced = slurm.run(*inside, "cluster.inside_job=true", folder=here)
    assert forced.code == 0, forced.text
    number = job_of(forced)
    slurm.wait_for_state(number, "COMPLETED")
    assert slurm.field(number, "NumNodes") == "2"


def test_gpus_are_counted_and_asked_for(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """Without devices_per_node a node's GPUs are as many as SLURM says: four here, which only pretend to be some."""
    gpus = [word for word in job if word != "cluster.device=cpu"]
    finished = slurm.titan(*gpus, *TWO_NODES, "training.global_batch_size=-1", folder=here)
    assert finished.code == 0, finished.text
    assert "2 nodes x 4 = 8 ranks" in finished.out
    number = job_of(finished)
    script = (here / "run" / "slurm" / f"{number}_submission.sh").read_text()
    assert "--gpus-per-node=4" in script
    assert slurm.wait_for_state(number, "FAILED") == "FAILED"
    assert RunDirectory(here / "run").read_status()["exit_code"] == 2, "PyTorch sees no GPU"
    assert slurm.field(number, "TresPerNode") == "gres:gpu:4"


def test_variables_reach_the_ranks_and_secrets_stay_out_of_files(
    slurm: Cluster, job: tuple[str, ...], here: Path
) -> None:
    """What the shell exports and what the config says reaches every rank; of a secret no file of the run knows."""
    secret = "hf_" + "q7" * 12
    finished = slurm.titan(
        *(*job, *TWO_NODES, "cluster.wait=true", "training.steps=1", "+cluster.environment.SHOWN=told"),
        *("cluster.setup=['echo setup ran on $(hostname)']", "+cluster.srun.nice=3", "cluster.cpus_per_task=2"),
        folder=here,
        HF_TOKEN=secret,
        PLANTED_FAULT="environment:HF_TOKEN,SHOWN,SLURM_CPUS_PER_TASK:1",
    )
    assert finished.code == 0, finished.text
    logs = [path.read_text() for path in (here / "run" / "logs").iterdir()]
    assert len(logs) == 2
    console = finished.out + "".join(logs)
    assert console.count(f"HF_TOKEN {len(secret)} SHOWN 4 SLURM_CPUS_PER_TASK 1") == 2
    assert "setup ran on node" in finished.out
    files = [path for path in here.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pkl" for path in files)
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("module", ["titan.worker", "titan.train"])
def test_tasks_of_srun_are_ranks(
    slurm: Cluster, job: tuple[str, ...], here: Path, undisturbed: Path, module: str
) -> None:
    """`srun python -m ...` of several tasks trains one run in one directory, whichever module it is given."""
    arguments = [*job, "run.dir=run"]
    if module == "titan.worker":
        frozen = slurm.titan(*job, *TWO_NODES, "+cluster.sbatch.hold=", folder=here)
        slurm.ask("scancel", job_of(frozen))
        arguments = ["run/config.yaml"]
    command = ("srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", module, *arguments)
    finished = slurm.run(*command, folder=here, timeout_seconds=120)
    assert finished.code == 0, finished.text
    assert results(here / "run") == results(undisturbed)
    assert finished.out.count("mesh  ") == 1


def test_a_shell_on_a_node_starts_its_own_ranks(slurm: Cluster, job: tuple[str, ...], here: Path) -> None:
    """What is typed in `srun --pty bash`, or in a batch script, is a command and not a rank."""
    arguments = (sys.executable, "-m", "titan.train", *job, "cluster.devices_per_node=2", "training.steps=1")
    finished = slurm.run("srun", "--nodes=1", "--ntasks=1", *arguments, "run.dir=run", folder=here, timeout_seconds=120)
    assert finished.code == 0, finished.text
    (event,) = RunDirectory(here / "run").read_events("start")
    assert event["ranks"] == 2


def test_the_batch_file_by_hand_is_survived_too(
    slurm: Cluster, job: tuple[str, ...], here: Path, undisturbed: Path
) -> None:
    """launchers/slurm/titan.sbatch does what cluster=slurm does: told to stop, it saves, comes back and goes on."""
    script = REPOSITORY / "launchers" / "slurm" / "titan.sbatch"
    environment = {"PYTHON": sys.executable, **SLOW}
    submitted = slurm.run(
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", str(script), *job),
        "run.dir=run",
        folder=here,
        **environment,
    )
    assert submitted.code == 0, submitted.text
    number = submitted.out.strip()
    metrics = here / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(json_lines(metrics)) > 3, "some steps", 120)
    slurm.ask("scancel", "--signal=USR2", number)
    slurm.wait_for_state(number, "COMPLETED")
    assert slurm.field(number, "Restarts") == "1"
    assert re.search(r"goes back into the queue", (here / f"titan-{number}.out").read_text())
    assert results(here / "run") == results(undisturbed)
