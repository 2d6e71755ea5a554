"""Jobs that have been submitted: what SLURM says of them, what their rank 0 writes, and how they ended.

SLURM's controller may be restarting, or busy, at any moment: no answer is never taken for an answer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan.config.schema import TitanConfig
from titan.errors import ConfigError, Problem
from titan.run_directory import RunDirectory

_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "REVOKED"),
    *("NODE_FAIL", "PREEMPTED", "UNKNOWN"),
)
_MAY_CHANGE = ("NODE_FAIL", "PREEMPTED", "UNKNOWN")
"""States that SLURM shows for up to some seconds before it puts the job back into the queue."""
SETTLE_SECONDS = 30.0
"""How long a job may be shown so."""
_STATE_SECONDS = 2.0
_LOG_SECONDS = 0.2


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    name: str
    """PENDING, RUNNING, COMPLETED, FAILED and so on; UNKNOWN where SLURM has forgotten it, empty without an answer."""
    reason: str = ""
    """Why it waits, where it does."""
    exit_code: int = 0
    """As a shell has it: 128 and the signal, where one ended it."""

    @property
    def has_ended(self) -> bool:
        """Whether it is over, as far as SLURM knows at this moment."""
        return self.name in _ENDED

    @property
    def may_go_on(self) -> bool:
        """Whether SLURM may put it back into the queue within `SETTLE_SECONDS`, although it is over."""
        return self.name in _MAY_CHANGE


@dataclass
class SlurmJob:
    """A run that has been submitted."""

    id: str
    """The job's number; in an array, the array's, an underscore, and the point's."""
    config: TitanConfig
    directory: RunDirectory
    log: Path
    """The console of rank 0."""
    _read: int = field(default=0, repr=False)
    _last: JobState | None = field(default=None, repr=False)

    def state(self) -> JobState:
        """Return what SLURM says now."""
        shown = _ask("scontrol", "show", "job", "--oneliner", self.id)
        if shown:
            found = dict(re.findall(r"(JobState|Reason|ExitCode)=(\S+)", shown.splitlines()[0]))
            return _state(found.get("JobState", "UNKNOWN"), found.get("Reason", ""), found.get("ExitCode", "0:0"))
        if shown is None:
            return JobState("")
        # The controller forgets an ended job after minutes; SLURM's accounting does not, where there is one.
        columns = ("--noheader", "--parsable2", "--allocations", "--format=State,ExitCode")
        shown = _ask("sacct", *columns, f"--jobs={self.id}")
        if not shown or not shown.strip():
            return JobState("UNKNOWN")
        name, _, code = shown.splitlines()[-1].partition("|")
        return _state(name.split()[0], "", code)

    def end(self, state: JobState) -> None:
        """Note the last state, while SLURM still knows it."""
        self._last = state

    def new_lines(self) -> list[str]:
        """Return what rank 0 has written on its console since the last call, without submitit's own lines."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except OSError:
            return []
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        return [line for line in text.decode(errors="replace").splitlines() if not line.startswith("submitit ")]

    def status(self) -> dict[str, Any]:
        """Return status.json, if this job has written it and not an earlier one."""
        try:
            written = (self.directory.path / "status.json").stat().st_mtime_ns
            return self.directory.read_status() if written > self.directory.config.stat().st_mtime_ns else {}
        except OSError:
            return {}

    def exit_code(self) -> int:
        """Return the run's exit code, once the job is over: a rank's own where it has left one, else SLURM's."""
        state, status = self._last or self.state(), self.status()
        if state.name == "COMPLETED" or status.get("state") == "complete":
            return 0
        if status.get("state") == "failed":
            return int(status.get("exit_code") or 1)
        return state.exit_code or 1


def watch(jobs: Sequence[SlurmJob]) -> Iterator[tuple[SlurmJob, JobState | str]]:
    """Yield every new state of the jobs, and of a single one every new line of rank 0's log, until all are over."""
    left = {job.id: job for job in jobs}
    known = dict.fromkeys(left, JobState(""))
    since = dict.fromkeys(left, 0.0)
    while left:
        listed = _list_states(list(left))
        for name, job in list(left.items()):
            state = listed.get(name) or job.state()
            if not state.name:
                continue
            if (state.name, state.reason) != (known[name].name, known[name].reason):
                known[name], since[name] = state, time.monotonic()
                yield job, state
            settled = not state.may_go_on or time.monotonic() - since[name] > SETTLE_SECONDS
            if state.has_ended and settled:
                job.end(job.state() if name in listed else state)  # the list has no exit codes
                del left[name]
        deadline = time.monotonic() + _STATE_SECONDS
        while True:
            for line in jobs[0].new_lines() if len(jobs) == 1 else ():
                yield jobs[0], line
            if not left or time.monotonic() > deadline:
                break
            time.sleep(_LOG_SECONDS)


def live_job(directory: RunDirectory) -> str | None:
    """Return the job that was last submitted for a run directory, if it waits or runs still.

    Raises:
        ConfigError: If SLURM does not say.
    """
    submitted = directory.read_events("submit")
    if not submitted or shutil.which("squeue") is None:  # where there is no SLURM, the files have come from elsewhere
        return None
    job = submitted[-1]["job"]
    shown = _ask("squeue", "--all", "--noheader", f"--jobs={job}", "--format=%T")
    if shown is None:
        raise ConfigError(
            [
                Problem(
                    f"run.dir = {directory.path} was submitted as job {job}, which may not have ended",
                    "SLURM does not answer. Two jobs would write to the same files.",
                    "the same again, once SLURM answers, or  run.dir=ANOTHER   for a new run",
                )
            ]
        )
    return job if shown.strip() else None


def _list_states(jobs: list[str]) -> dict[str, JobState]:
    """Ask for many jobs at once; those that SLURM lists no longer are left out."""
    command = ["squeue", "--all", "--noheader", "--array", "--states=all", "--format=%i %T %r"]
    shown = _ask(*command, f"--jobs={','.join(jobs)}") or ""
    lines = [line.split(maxsplit=2) for line in shown.splitlines()]
    return {words[0]: _state(words[1], words[2]) for words in lines if len(words) == 3}


def _state(name: str, reason: str, code: str = "0:0") -> JobState:
    number, _, ended_by = code.partition(":")
    exit_code = int(number or 0) or (128 + int(ended_by) if ended_by.isdigit() and int(ended_by) else 0)
    return JobState(name, "" if reason == "None" else reason, exit_code)


def _ask(*command: str) -> str | None:
    """Return what one of SLURM's commands prints; nothing if it knows no such job, and None if there is no answer."""
    # the user's own filters are for their eyes
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode == 0:
        return done.stdout
    return "" if "Invalid job id" in done.stderr else None
