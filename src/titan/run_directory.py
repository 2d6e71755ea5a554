"""The files of a run, and the two of them that say what became of it.

    <run.dir>/config.yaml     the frozen config, the only thing a rank reads
              overrides.yaml  what was typed
              identity        what its checkpoints know the run by
              status.json     the run's state now, replaced as a whole
              events.jsonl    what happened, in order, appended
              .lock           held by rank 0 of the live run; who has it, or had it last
              metrics.jsonl   one line a logged step
              data.jsonl      one line a step: which rows it had
              samples.jsonl   one line a prompt and validation, where validation.sample_prompts has any
              skipped_steps.jsonl   steps left out after a spike, appended; a resumed run leaves them out too
              wandb.json      which run of Weights & Biases this is, and which steps it has been sent
              tensorboard/    event files
              report.html     what titan.report makes of all this
              logs/           one file per rank and attempt; and .stacks beside it, after a hang; console.log, where a
                              program has started it
              checkpoints/    step_00000010/ and so on
              slurm/          batch script and console of a job, where SLURM ran it

Names are a contract with other tools; nothing else in titan spells them out.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from titan.log import logger

_LEFT_SECONDS = 86400.0
"""A file that is being written is written to more often than this."""


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The frozen config."""
        return self.path / "config.yaml"

    @property
    def overrides(self) -> Path:
        """The overrides of the command line, for the record."""
        return self.path / "overrides.yaml"

    @property
    def lock(self) -> Path:
        """The file that rank 0 of a live run holds a lock on: `titan.launch.lock`."""
        return self.path / ".lock"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object a prompt that was continued after a validation."""
        return self.path / "samples.jsonl"

    @property
    def rows(self) -> Path:
        """One JSON object a step: the digest of its rows, and what they count."""
        return self.path / "data.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of committed checkpoints."""
        return self.path / "checkpoints"

    @property
    def slurm(self) -> Path:
        """The folder of batch scripts and what SLURM's tasks wrote on their consoles."""
        return self.path / "slurm"

    @property
    def profiles(self) -> Path:
        """The folder of profiler traces."""
        return self.path / "profiles"

    @property
    def ledger(self) -> Path:
        """The steps left out after a spike."""
        return self.path / "skipped_steps.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object for each thing that happened."""
        return self.path / "events.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Which run of Weights & Biases this is, and what it has been sent."""
        return self.path / "wandb.json"

    @property
    def report(self) -> Path:
        """The page of `titan.report`."""
        return self.path / "report.html"

    def log(self, rank: int, attempt: int) -> Path:
        """Return the log file of one rank in one attempt."""
        return self.path / "logs" / f"rank_{rank:05d}.attempt_{attempt}.log"

    @property
    def console(self) -> Path:
        """What a run that a program has started writes on its console, appended."""
        return self.path / "logs" / "console.log"

    def stacks(self, rank: int, attempt: int) -> Path:
        """Return the file for the Python stacks of one rank that hangs, or waits for one that does."""
        return self.log(rank, attempt).with_suffix(".stacks")

    def read_status(self) -> dict[str, Any]:
        """Return status.json, or an empty dict where there is none or it is unreadable."""
        try:
            return json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def read_identity(self) -> str:
        """Return what the run's checkpoints know it by; empty where it has saved nothing yet."""
        try:
            return (self.path / "identity").read_text().strip()
        except OSError:
            return ""

    def write_identity(self, identity: str) -> None:
        """Write down what the run's checkpoints know it by."""
        write_atomically(self.path / "identity", identity + "\n")

    def read_failure(self) -> int:
        """Return the exit code of the rank that failed first, or 0 where none has."""
        status = self.read_status()
        return int(status.get("exit_code") or 1) if status.get("state") == "failed" else 0

    def is_complete(self, steps: int) -> bool:
        """Whether the run has come to its end, and that was not before `steps`."""
        status = self.read_status()
        return status.get("state") == "complete" and status.get("step", 0) >= steps

    def write_status(self, state: str, why: str = "", **details: Any) -> None:
        """Replace status.json: `state` is complete, running, preempted or failed. A full disk is told, not raised."""
        text = json.dumps({"state": state, "why": why, "time": utc_now(), **details}, indent=2)
        try:
            write_atomically(self.path / "status.json", text + "\n")
        except OSError as error:
            logger.warning(f"status.json cannot be written ({error.strerror}): {state} {why}")

    def read_events(self, event: str) -> list[dict[str, Any]]:
        """Return what was appended to events.jsonl under a name, oldest first."""
        return [each for each in self.read_new_events(0)[0] if each.get("event") == event]

    def last_saved_step(self) -> int:
        """Return the largest step that was ever saved, or 0."""
        return max((event["step"] for event in self.read_events("save")), default=0)

    def read_new_events(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Return what was appended to events.jsonl after it had so many bytes, oldest first; and where to go on."""
        try:
            with self.events.open("rb") as file:
                file.seek(offset)
                whole, newline, _ = file.read().rpartition(b"\n")  # a line without end is still being written
        except OSError:
            return [], offset
        return read_objects(whole.decode(errors="replace").splitlines()), offset + len(whole + newline)

    def events_size(self) -> int:
        """Return how many bytes events.jsonl has."""
        try:
            return self.events.stat().st_size
        except OSError:
            return 0

    def read_ledger(self) -> list[dict[str, Any]]:
        """Return the rows of skipped_steps.jsonl, each with first_step and last_step, oldest first."""
        try:
            lines = self.ledger.read_text().splitlines()
        except FileNotFoundError:
            return []
        return read_objects(lines)

    def append_ledger(self, row: dict[str, Any]) -> None:
        """Append a row to skipped_steps.jsonl, and return when the disk has it.

        Raises:
            OSError: If it cannot be written.
        """
        append_line(self.ledger, {"time": utc_now(), **row}, is_synced=True)

    def append_event(self, event: str, **details: Any) -> None:
        """Append one line to events.jsonl. A full disk is told, not raised."""
        row = {"time": utc_now(), "event": event, **details}
        try:
            append_line(self.events, row)
        except OSError as error:
            logger.warning(f"events.jsonl cannot be written ({error.strerror}): {json.dumps(row)}")


def append_line(path: Path, row: dict[str, Any], is_synced: bool = False) -> None:
    """Append one object as a line of its own, also behind a line that a crash or a full disk has cut short.

    Args:
        path: The file; made if it is not there.
        row: The object.
        is_synced: Return only when the disk has it.

    Raises:
        OSError: If it cannot be written.
    """
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        is_cut = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        data = b"\n" * is_cut + json.dumps(row).encode() + b"\n"
        if os.write(file.fileno(), data) < len(data):  # in one piece, for ranks append to the same file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if is_synced:
            os.fsync(file.fileno())


def read_objects(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return the objects of lines; those that were cut short are left out."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                found.append(row)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    temporary = unique_temporary(path)
    try:
        write_synced(temporary, text)  # or the rename may outlive the text, if the power goes
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # each has another name, and a disk that is full would get fuller
        raise


def unique_temporary(path: Path) -> Path:
    """Return a name beside a file that nobody else writes to: no thread, no process, no other machine or container.

    It says who writes, for `remove_leftovers`.
    """
    owner = f"{os.uname().nodename}.{_process_space()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove what a process that is no more has left under a name of `unique_temporary`.

    Whether a process of another machine or container still is cannot be known: what it has left stays until it has not
    been written to for a day.

    Args:
        folder: Where to look.
        pattern: The names of the files that were to be written, as for `glob`.
    """
    for file in folder.glob(f".{pattern}.*.tmp"):
        space, pid = file.name.split(".")[-4:-2]
        with contextlib.suppress(OSError):
            is_here = space == _process_space() and pid.isdigit()
            if _is_gone(int(pid)) if is_here else time.time() - file.stat().st_mtime > _LEFT_SECONDS:
                file.unlink()


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@functools.cache
def _process_space() -> str:
    """Return what machines and containers differ in that number their processes apart from each other."""
    told = os.uname().nodename
    with contextlib.suppress(OSError):  # no Linux
        told += Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def write_synced(path: Path, text: str) -> None:
    """Write a file, and return when the disk has it."""
    with path.open("wb") as file:
        file.write(text.encode())
        close_synced(file)


def close_synced(file: BinaryIO) -> None:
    """Close a file that was written to, and return when the disk has it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def short_path(path: Path) -> str:
    """Return a path as a person would type it: relative where it lies below the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
