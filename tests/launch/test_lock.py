"""Two runs in one directory: the second is refused, and changes nothing of the first."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.support.command import (
    FAULT,
    TINY,
    Started,
    clean_environment,
    files_below,
    finish,
    kill_all,
    processes_with,
    start,
    wait_until,
)
from titan.launch.lock import RunInUse, RunLock, check_not_in_use
from titan.run_directory import RunDirectory

RUN = (*TINY, "training.steps=1000000", "checkpoint=disabled", "run.dir=run")

HOLD = """
import sys, time
from pathlib import Path
from titan.launch.lock import RunLock
from titan.run_directory import RunDirectory
RunLock(RunDirectory(Path(sys.argv[1]))).acquire()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a process that holds a directory's lock for so long."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[RunDirectory, subprocess.Popen[str]]]:
    """A directory that another process has for longer than anybody waits."""
    process = hold(tmp_path / "run", 600)
    yield RunDirectory(tmp_path / "run"), process
    process.kill()
    process.wait()


def test_a_held_directory_is_refused_and_its_owner_named(held: tuple[RunDirectory, subprocess.Popen[str]]) -> None:
    """Who asks for a directory that another process has learns which, since when, and what to type."""
    directory, process = held
    for ask in (lambda: check_not_in_use(directory, 0.1), lambda: RunLock(directory).acquire(0.1)):
        with pytest.raises(RunInUse, match=rf"in use by process {process.pid} on \S+, since 2") as refusal:
            ask()
        assert "run.dir=ANOTHER" in str(refusal.value)
        assert refusal.value.exit_code == 2


def test_the_lock_ends_with_its_owner_however_that_ends(held: tuple[RunDirectory, subprocess.Popen[str]]) -> None:
    """After a kill that leaves its owner no time, the directory is free; what the file says then means nothing."""
    directory, process = held
    process.kill()
    process.wait()
    check_not_in_use(directory, 0)
    lock = RunLock(directory)
    lock.acquire(0)
    assert f'"pid": {os.getpid()}' in directory.lock.read_text()
    lock.release()


def test_an_owner_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    """A run that takes the place of one that just ends (a requeue, a restart) is not refused."""
    process = hold(tmp_path, 0.5)
    began = time.monotonic()
    lock = RunLock(RunDirectory(tmp_path))
    lock.acquire(20)
    assert time.monotonic() - began < 10
    lock.release()
    assert process.wait() == 0


def test_a_data_loader_worker_does_not_inherit_the_lock(tmp_path: Path) -> None:
    """A process forked from the owner, which may outlive it for a moment, does not keep the directory."""
    code = HOLD.replace('print("held"', 'pid = __import__("os").fork() or time.sleep(30)\nprint("held"')
    command = [sys.executable, "-c", code, str(tmp_path), "0.1"]
    owner = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        assert owner.wait() == 0
        check_not_in_use(RunDirectory(tmp_path), 0)
    finally:
        os.killpg(owner.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """Where the kernel has no lock to give, a run goes on unprotected, and says so."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr("titan.log.logger.propagate", True)
    directory = RunDirectory(tmp_path)
    RunLock(directory).acquire()
    check_not_in_use(directory)
    assert [record.message.count("has no locks") for record in caplog.records] == [1]


@pytest.fixture
def live(here: Path, cache: Path, text_file: Path) -> Iterator[Started]:
    """A run in `run` that stands still in its second step: whatever changes in its files, another has changed."""
    fault = {"PYTHONPATH": str(FAULT), "PLANTED_FAULT": "sleep:0:2"}
    arguments = ["-m", "titan.train", *RUN, f"data.path={text_file}", "metrics.log_every=1", "cluster.device=cpu"]
    process = start(arguments, here, clean_environment(cache, **fault))
    metrics = here / "run" / "metrics.jsonl"
    try:
        wait_until(lambda: process.poll() is not None or (metrics.exists() and bool(metrics.read_text())), "a step")
        assert process.poll() is None, finish(process)
        yield process
    finally:
        kill_all(process)
        finish(process)


def test_a_second_run_is_refused_before_anything_is_changed(
    titan: Command, live: Started, here: Path, text_file: Path
) -> None:
    """The same command while the first one runs: exit code 2, the owner's name, and not one file touched."""
    before = files_below(here / "run")
    again = titan(*RUN, f"data.path={text_file}", "metrics.log_every=1", "cluster.device=cpu")
    assert again.code == 2
    assert f"is in use by process {live.pid} on " in again.err
    assert "run.dir=ANOTHER" in again.err
    assert files_below(here / "run") == before


@pytest.mark.slow
def test_ranks_that_come_too_late_are_refused_together(live: Started, here: Path, cache: Path) -> None:
    """Ranks started by hand, past the front end: rank 0 says why once, and all end with 2, and soon."""
    before = files_below(here / "run")
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "titan.worker"]
    began = time.monotonic()
    finished = finish(start([*ranks, "run/config.yaml"], here, clean_environment(cache)))
    assert time.monotonic() - began < 40
    assert finished.code == 1, "torchrun's own"
    assert finished.err.count("is in use by") == 1
    assert "exitcode  : 2 " in finished.err
    assert "exitcode  : 1 " not in finished.err
    assert processes_with(finished.mark) == {}
    after = files_below(here / "run")
    new = {"logs", "logs/rank_00001.attempt_0.log"}  # rank 1 logs that it cannot meet the others, if it comes to that
    changed = {name for name, when in after.items() if before.get(name) != when}
    assert changed <= new
    assert set(before) <= set(after)
