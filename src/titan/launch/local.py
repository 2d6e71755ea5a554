"""Ranks as processes of this machine.

The launcher starts one `python -m titan.worker` for every device, watches them, and ends them all when one fails. It
imports no torch, so the ranks are at work some seconds earlier than behind torchrun. They are given a command and not a
function: nothing is pickled, so it works from a notebook too, and a rank started here is started as on any cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from titan.errors import ConfigError, PeerLost, RanksFailed, StepHung, Stopped, TitanError
from titan.launch.environment import CONFIG_DIGEST, STORE_FD, config_digest, threads_per_rank
from titan.launch.signals import Forwarder
from titan.run_directory import RunDirectory, short_path

_POLL_SECONDS = 0.1
_END_SECONDS = 30.0
"""How long ranks may take to end after a signal, before they are killed."""
_HOST = "127.0.0.1"


class Interrupted(TitanError):
    """The launcher was told to stop by a signal; its ranks have been stopped."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; all ranks have ended")
        self.exit_code = 128 + number


class _EndNow(Exception):
    """Raised by the handler of a signal: the ranks get this signal, and have some seconds."""

    def __init__(self, number: int) -> None:
        self.number = signal.Signals(number)


@dataclass(frozen=True)
class _Failure:
    """How a rank ended that did not end well."""

    code: int
    """As of `subprocess`: of a signal, negative."""
    seen: float
    """When, in seconds since the epoch."""
    note: Path
    """Where the rank leaves its exception, if it can (`titan.worker.tell_agent`)."""

    @property
    def message(self) -> str:
        """The exception that the rank has left, or nothing."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it may have been killed while it wrote
            return str(json.loads(self.note.read_text())["message"]["message"])
        return ""

    @property
    def precedence(self) -> tuple[int, float]:
        """Order failures by cause and time: one rank's end makes others fail within milliseconds."""
        if message := self.message:
            return 2 if message.startswith(PeerLost.__name__) else 0, self.note.stat().st_mtime
        return 3 if self.code == -signal.SIGTERM else 1, self.seen  # SIGTERM is how the launcher ends the rest


def launch_local(
    directory: RunDirectory,
    ranks: int,
    grace_seconds: float,
    command: Sequence[str] = ("titan.worker",),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Start ranks and wait for them.

    Args:
        directory: The run's; its config must be frozen.
        ranks: How many.
        grace_seconds: How long the ranks may take to save and end, once this process is told to stop.
        command: The module that each rank runs, and its arguments before the path of the config.
        environment: More variables for the ranks.

    Raises:
        RanksFailed: If a rank failed; names the first that did, and carries its exit code.
        Stopped: If this process was told to stop, and the ranks have saved and ended.
        Interrupted: If it was told to stop at once (a second Ctrl-C, or one before the first step), or the ranks did
            not end within the grace.
    """
    before_run = directory.read_status()

    def is_training() -> bool:
        status = directory.read_status()
        return status != before_run and status.get("state") == "running" and "step" in status

    def interrupt(number: signal.Signals) -> NoReturn:
        raise _EndNow(number)

    variables = {
        **os.environ,
        **(environment or {}),
        "TITAN_LAUNCHER_PID": str(os.getpid()),
        CONFIG_DIGEST: config_digest(directory.config),
    }
    variables["OMP_NUM_THREADS"] = str(threads_per_rank(ranks, variables))
    arguments = [sys.executable, "-u", "-m", *command, str(directory.config)]
    forwarder = Forwarder(grace_seconds, is_training, interrupt)
    with tempfile.TemporaryDirectory(prefix="titan_", ignore_cleanup_errors=True) as notes:
        try:
            with forwarder, _end_on(signal.SIGHUP, signal.SIGQUIT):
                failures = _run(arguments, ranks, variables, Path(notes))
        except _EndNow as end:
            raise Interrupted(forwarder.told or end.number) from None
        if not failures:
            return
        status = directory.read_status()
        if status != before_run and status.get("state") == "preempted":
            raise Stopped(status["signal"], status["step"], status["saved_step"])
        if status != before_run and status.get("exit_code") == StepHung.exit_code:
            # the first to end is one that has waited; who hangs, all ranks have found out together
            why = status["why"].removeprefix(f"{StepHung.__name__}: ")
            raise RanksFailed(why, status["rank"], StepHung.exit_code)
        raise _explain(failures, directory)


def _run(arguments: list[str], ranks: int, variables: Mapping[str, str], notes: Path) -> dict[int, _Failure]:
    """Start ranks and wait until all have ended, or one has failed and the others were ended; returns the failures."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        # Rank 0 accepts on it, so that no other process can take the port before that.
        with socket.create_server((_HOST, 0), backlog=max(128, ranks)) as meeting_place:
            for rank in range(ranks):
                place = {
                    **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
                    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks)),
                    "MASTER_ADDR": _HOST,
                    "MASTER_PORT": str(meeting_place.getsockname()[1]),
                    **({STORE_FD: str(meeting_place.fileno())} if rank == 0 else {}),
                    "TORCHELASTIC_RESTART_COUNT": "0",
                    "TORCHELASTIC_ERROR_FILE": str(notes / f"{rank}.json"),
                }
                passed = [meeting_place.fileno()] if rank == 0 else []
                processes.append(
                    # a session, for its workers to get what it gets; a terminal's Ctrl-C comes through this process
                    subprocess.Popen(arguments, env={**variables, **place}, pass_fds=passed, start_new_session=True)
                )
        failures: dict[int, _Failure] = {}
        while not failures and any(process.poll() is None for process in processes):
            time.sleep(_POLL_SECONDS)
            _note_failures(processes, notes, failures)
        _note_failures(processes, notes, failures)
        _end(processes, signal.SIGTERM)
        _note_failures(processes, notes, failures)
        return failures
    except _EndNow as end:
        _end(processes, end.number)
        raise
    finally:
        _end(processes, signal.SIGKILL)


def _note_failures(processes: list[subprocess.Popen[bytes]], notes: Path, failures: dict[int, _Failure]) -> None:
    for rank, process in enumerate(processes):
        if process.poll() and rank not in failures:
            failures[rank] = _Failure(process.returncode, time.time(), notes / f"{rank}.json")


def _end(processes: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Send a signal to the ranks that live, and to all that they have started; what is left later is killed."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)
    deadline = time.monotonic() + _END_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, deadline - time.monotonic()))
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _end_on(*numbers: signal.Signals) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise _EndNow(number)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(failures: dict[int, _Failure], directory: RunDirectory) -> RanksFailed:
    rank, failure = min(failures.items(), key=lambda item: item[1].precedence)
    message, code = failure.message, failure.code
    if code == ConfigError.exit_code and not message:
        return RanksFailed(f"rank {rank} was refused, as it says above", rank, code)
    if not message:
        message = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, no exception"
    log = short_path(directory.log(rank, 0))
    return RanksFailed(f"rank {rank} failed first: {message}\n  log: {log}", rank, code if code > 0 else 1)
