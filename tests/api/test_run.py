"""`titan.launch` and the handle: the same run as the command's, started from a program that goes on meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import titan
from tests.support.command import TINY, clean_environment, processes_with, results, wait_until
from titan.api.run import Run, Status
from titan.config.schema import TitanConfig
from titan.errors import CommandError, ConfigError, TitanError
from titan.launch.lock import RunLock
from titan.run_directory import RunDirectory


@pytest.fixture
def mark(here: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A clean environment for what is launched, with a mark by which all of it is found and ended."""
    value = f"LAUNCHED_BY={here}"
    environment = clean_environment(cache) | {"LAUNCHED_BY": str(here)}
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    yield value
    for pid in processes_with(value):
        os.kill(pid, signal.SIGKILL)


def tiny(text_file: Path, *more: str) -> TitanConfig:
    """A run of seconds in ./run."""
    return titan.compose(*TINY, f"data.path={text_file}", "metrics.log_every=1", "run.dir=run", *more)


def test_a_launched_run_is_the_commands_run(mark: str, text_file: Path, trained: Path) -> None:
    """Losses and norms have the bits of `python -m titan.train`; the handle knows it then, and so does another one."""
    run = titan.launch(tiny(text_file))
    assert run.directory == Path("run").absolute()
    assert not run.status.has_ended
    assert run.wait(240) == Status("complete", step=2, exit_code=0)
    assert results(run.directory) == results(trained)
    assert run.metrics()["loss"] == [loss for _, loss, _ in results(trained)]
    assert "done: step 2" in run.log(3)
    again = titan.attach("run")
    assert again.status == run.status
    assert titan.diff(again, run.config) == {}
    assert titan.launch(run.config).status == run.status  # complete, so nothing is started
    assert "complete at step 2" in repr(run)
    assert "complete at step 2" in run._repr_html_()
    assert not processes_with(mark)


def test_a_run_that_is_cancelled_saves_and_goes_on_later(mark: str, text_file: Path) -> None:
    """It stops in order with 75; a second owner is refused meanwhile; another handle can cancel it too."""
    config = tiny(text_file, "training.steps=100000")
    run = titan.launch(config)
    wait_until(lambda: len(run.metrics()) > 0, "the first step")
    assert run.status.state == "running"
    assert titan.attach("run").status.state == "running"
    with pytest.raises(ConfigError, match="is in use by"):
        titan.launch(config)
    with pytest.raises(TimeoutError, match="has not ended after 0 s: running"):
        run.wait(0)
    titan.attach("run").cancel()
    ended = run.wait(120)
    assert (ended.state, ended.exit_code) == ("preempted", 75)
    assert ended.step is not None
    assert (run.directory / "checkpoints" / f"step_{ended.step:08d}").is_dir()
    run.cancel()  # of a run that has ended: nothing
    assert run.status == ended

    resumed = titan.launch(tiny(text_file, f"training.steps={ended.step + 1}"))
    assert resumed.wait(240) == Status("complete", step=ended.step + 1, exit_code=0)
    assert [step for step, _, _ in results(run.directory)] == list(range(1, ended.step + 2))


@pytest.mark.slow
def test_two_ranks_are_cancelled_and_killed_as_one_run(mark: str, text_file: Path) -> None:
    """In order: both save together. At once: no rank is left, and the handle says what ended it."""
    run = titan.launch(tiny(text_file, "training.steps=100000", "cluster.devices_per_node=2"))
    wait_until(lambda: len(run.metrics()) > 0, "the first step")
    run.cancel()
    assert run.wait(120).exit_code == 75
    run = titan.launch(run.config)
    wait_until(lambda: bool(processes_with(mark)) and run.status.state == "running", "running again")
    run.cancel(at_once=True)
    ended = run.wait(60)
    assert (ended.state, ended.exit_code) == ("failed", 137)
    assert "SIGKILL" in ended.why
    wait_until(lambda: not processes_with(mark), "all ranks have ended", 30)


@pytest.mark.slow
def test_a_run_that_fails_says_why(mark: str, text_file: Path) -> None:
    """The exit code and the words are those of the run directory, and of the log."""
    run = titan.launch(tiny(text_file, "fault_tolerance.spike_grad_norm=1e-9"))
    ended = run.wait(240)
    assert (ended.state, ended.exit_code) == ("failed", 71)
    assert "gradient norm" in ended.why
    assert "gradient norm" in run.log()
    assert titan.attach("run").status == ended


def test_what_is_wrong_is_said_before_anything_is_made(
    mark: str, text_file: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks are the command's, and not one file is made."""
    monkeypatch.setenv("PATH", str(here))  # this machine may have SLURM's commands
    for config, message in (
        (tiny(text_file, "parallelism.tp=3"), "tp 3 does not divide"),
        (tiny(text_file, "cluster=simulated"), "no run to start"),
        (tiny(text_file, "cluster=slurm", "cluster.devices_per_node=1"), "there is no sbatch"),
        (
            tiny(text_file, "cluster=slurm", "cluster.devices_per_node=1", "cluster.print_script=true"),
            "starts nothing",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            titan.launch(config)
    with pytest.raises(TypeError, match="takes a config"):
        titan.launch("model=llama3_8b")  # type: ignore[arg-type]
    assert not list(here.iterdir())
    assert not processes_with(mark)


def test_a_rank_launches_nothing(mark: str, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each of eight ranks would start a run."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "8"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="RANK=1"):
        titan.launch(tiny(text_file))


def test_only_a_run_directory_is_attached_to(here: Path) -> None:
    """A folder of something else, and one that is not there."""
    with pytest.raises(CommandError, match=r"has no config\.yaml"):
        titan.attach(here)
    with pytest.raises(CommandError, match="there is no such directory"):
        titan.attach(here / "none")


def test_a_run_whose_process_is_gone_is_lost(trained: Path, here: Path) -> None:
    """status.json says running, but nobody holds the lock; while somebody does, it runs."""
    directory = RunDirectory(Path(shutil.copytree(trained, here / "run")))
    directory.write_status("running", step=1)
    run = titan.attach("run")
    assert run.status.state == "lost"
    assert run.wait(1).state == "lost"
    holder = subprocess.Popen(
        [
            "python3",
            "-c",
            f"import fcntl; f = open({str(directory.lock)!r}, 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); input()",
        ],
        stdin=subprocess.PIPE,
    )
    with holder:
        wait_until(lambda: run.status.state == "running", "the lock is seen", 30)
        assert holder.stdin is not None
        holder.stdin.close()
    assert run.status.state == "lost"


def test_a_run_of_another_machine_is_not_cancelled_here(
    trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number means another process there."""
    directory = RunDirectory(Path(shutil.copytree(trained, here / "run")))
    directory.lock.write_text('{"host": "far", "pid": 1, "job": null, "since": "today"}\n')
    monkeypatch.setattr(Run, "_live_state", lambda run: "running")
    with pytest.raises(TitanError, match="process 1 on far"):
        titan.attach("run").cancel()


SLURM = """#!/bin/sh
# A cluster whose only job is in the state that a file says.
state=$(cat {folder}/state)
case $(basename $0) in
  sbatch) echo PENDING > {folder}/state; echo Submitted batch job 7 ;;
  scontrol) echo "JobId=7 JobState=$state Reason=None ExitCode=0:15" ;;
  squeue) case $state in PENDING|RUNNING) echo $state ;; esac ;;
  scancel) echo CANCELLED > {folder}/state; echo "$@" > {folder}/cancelled ;;
esac
"""


@pytest.fixture
def slurm(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands, and the folder whose files say what they answer."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "state").write_text("NONE\n")
    for name in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        (folder / name).write_text(SLURM.format(folder=folder))
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_run_on_slurm_has_the_same_handle(slurm: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitted and not waited for, whatever the config says; its states are SLURM's and the run's."""
    monkeypatch.setattr("titan.api.run._SLURM_POLL_SECONDS", 0.05)
    run = titan.launch(tiny(text_file, "cluster=slurm", "cluster.wait=true", "cluster.devices_per_node=1"))
    assert run.job == "7"
    assert run.status == Status("pending")
    assert "job 7: pending" in repr(run)
    (slurm / "state").write_text("RUNNING\n")
    assert run.status.state == "starting"
    RunDirectory(run.directory).write_status("running", step=0)
    again = titan.attach(run.directory)
    assert (again.job, again.status) == ("7", Status("running", step=0))
    log = run.directory / "slurm" / "7_0_log.out"
    log.write_text("one\ntwo\n")
    assert titan.attach(run.directory).log(1) == "two"
    again.cancel()
    assert (slurm / "cancelled").read_text() == "7\n"
    assert run.wait(10) == Status("failed", "SLURM says that job 7 is CANCELLED", 0, 15 + 128)
    RunDirectory(run.directory).write_status("complete", step=2)
    assert run.status == Status("complete", step=2, exit_code=0)


def test_waiting_outlasts_a_job_that_goes_back_into_the_queue(
    slurm: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM shows a preempted job as over for some seconds; that is no end."""
    monkeypatch.setattr("titan.api.run._SLURM_POLL_SECONDS", 0.05)
    run = titan.launch(tiny(text_file, "cluster=slurm", "cluster.devices_per_node=1"))
    (slurm / "state").write_text("PREEMPTED\n")
    with pytest.raises(TimeoutError):
        run.wait(0.5)
    monkeypatch.setattr("titan.api.run.SETTLE_SECONDS", 0.2)
    began = time.monotonic()
    assert run.wait(10).state == "failed"
    assert time.monotonic() - began < 5


def test_a_lock_is_seen_by_an_asker_and_kept(trained: Path, here: Path) -> None:
    """Looking at a status takes no lock from anybody: a run can begin right after."""
    directory = RunDirectory(Path(shutil.copytree(trained, here / "run")))
    assert titan.attach("run").status.state == "complete"
    lock = RunLock(directory)
    lock.acquire(0)
    lock.release()
