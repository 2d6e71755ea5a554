"""A step that takes too long ends the run, and says which rank hangs and where.

One rank that hangs (a dead disk, a lock, a bug on one node) makes all others wait for it: in silence, and until a
collective times out, which then is an error of the ranks that waited. So every rank has a thread that looks at the
clock. The first to find a step too long raises an alarm in `events.jsonl`, which the threads of the others read; all
write down their Python stacks, rank 0 judges them (`titan.trainer.stacks`), and all end with the same words.

- Where rank 0 does not judge, because it is the one that is stopped, the next rank does, and so on.
- A rank that holds Python's lock has no thread to look at the clock; `faulthandler`'s own, which needs no lock, then
  writes down its stack.
- Through files and not through the ranks' store, whose host may be the rank that hangs.
- A step costs the main thread one assignment.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from titan.config.schema import FaultToleranceConfig, TitanConfig
from titan.errors import StepHung, TitanError
from titan.log import logger
from titan.run_directory import RunDirectory, short_path
from titan.trainer.stacks import judge

_LOOK_SECONDS = 1.0
_RANKS_A_SECOND = 200
"""How many ranks may look at the run directory every second, all together."""
_MOST_JUDGES = 8
_PAUSE_SECONDS = 5.0
"""A thread that was kept from looking for longer was in a process that was stopped (Ctrl-Z, a debugger)."""
_TIMED_OUT = re.compile(r"[Tt]imed out waiting|Timed out after|wait timeout after|collective operation timeout")
"""How gloo, NCCL and the ranks' store speak of a rank that did not come, in time."""


@dataclass(frozen=True)
class _Stage:
    """What is being done now, since when (of the monotonic clock), and for how long it may."""

    what: str
    key: str
    limit_seconds: float
    began: float


class Watchdog:
    """A context in which a step may take only so long.

    Args:
        settings: The limits, in seconds; a limit of 0 is none.
        directory: The run's; shared by all ranks.
        rank: This rank.
        ranks: How many there are.
        attempt: Names this rank's file.
        report: Writes down what has happened; called in another thread, right before the process ends.
    """

    def __init__(
        self,
        settings: FaultToleranceConfig,
        directory: RunDirectory,
        rank: int,
        ranks: int,
        attempt: int,
        report: Callable[[StepHung], object],
    ) -> None:
        self.settings, self.directory, self.report = settings, directory, report
        self.rank, self.ranks, self.attempt = rank, ranks, attempt
        self.is_on = settings.step_timeout_seconds > 0
        self._look_seconds = max(_LOOK_SECONDS, ranks / _RANKS_A_SECOND)
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._steps = 0
        self._begin("the first step", "first_step_timeout_seconds", settings.first_step_timeout_seconds)

    def step(self, number: int) -> None:
        """Begin a step: the clock starts anew. The first one's has run since the watchdog was there."""
        self._steps += 1
        if self._steps > 1:
            self._begin(f"step {number}", "step_timeout_seconds", self.settings.step_timeout_seconds)

    @contextlib.contextmanager
    def extended(self) -> Iterator[None]:
        """Allow what is done inside as long as saving; on leaving, the step has its own time anew."""
        before = self._stage
        self._begin(
            f"saving or validating in {before.what}", "save_timeout_seconds", self.settings.save_timeout_seconds
        )
        try:
            yield
        finally:
            self._begin(before.what, before.key, before.limit_seconds)

    def __enter__(self) -> Watchdog:
        if self.is_on:
            try:
                self._file = self._open_stacks()
            except OSError as error:
                logger.warning(f"no watchdog: the file for its stacks cannot be made ({error.strerror})")
                self.is_on = False
                return self
            self._read, self._events = self.directory.events_size(), []
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def _open_stacks(self) -> int:
        path = self.directory.stacks(self.rank, self.attempt)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:  # of an earlier hang, which somebody may still look into
            path.replace(path.with_name(f"{path.name}.before"))
        # at once to where other machines see it, for the kernel may not get to write it out later
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | os.O_SYNC, 0o644)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_hang = error is not None and not isinstance(error, TitanError) and bool(_TIMED_OUT.search(str(error)))
        if is_hang and not self.is_on:
            raise StepHung([self.rank], f"rank {self.rank} has waited for another one in vain: {error}") from error
        if not self.is_on:
            return
        if is_hang:
            self._error = error
        else:
            self._over.set()
        self._thread.join()  # without end, if it is about to end this process
        faulthandler.cancel_dump_traceback_later()
        os.close(self._file)
        path = self.directory.stacks(self.rank, self.attempt)
        with contextlib.suppress(OSError):
            if not path.stat().st_size:
                path.unlink()

    def _begin(self, what: str, key: str, limit_seconds: float) -> None:
        limit = max(limit_seconds, self.settings.step_timeout_seconds) if limit_seconds else 0
        self._stage = _Stage(what, key, limit, time.monotonic())

    def _watch(self) -> None:
        looked = since = time.monotonic()
        self._set_reserve(self.settings.step_timeout_seconds)
        while not self._over.wait(self._look_seconds):
            now, stage = time.monotonic(), self._stage
            if now - looked > self._look_seconds + _PAUSE_SECONDS:
                since = now
                os.ftruncate(self._file, 0)
            looked = now
            left = max(stage.began, since) + stage.limit_seconds - now if stage.limit_seconds else float("inf")
            if left < 0 or self._error is not None or self._has_heard():
                self._end_run(stage)
            self._set_reserve(min(left, self.settings.step_timeout_seconds))

    def _has_heard(self) -> bool:
        """Return whether another rank has raised the alarm; a look that fails is no reason to stop looking."""
        try:
            return self._heard("alarm", "hang") is not None
        except Exception as error:
            logger.debug(f"the watchdog cannot look at the events: {error}")
            return False

    def _set_reserve(self, seconds: float) -> None:
        """Have the stack written down by itself, unless this rank has looked again by then.

        One that was written and then looks again was only slow: its stack of then is not where it hangs later.
        """
        faulthandler.cancel_dump_traceback_later()
        if os.fstat(self._file).st_size:
            os.ftruncate(self._file, 0)
        faulthandler.dump_traceback_later(seconds + 1.5 * self._look_seconds, file=self._file)

    def _end_run(self, stage: _Stage) -> None:
        try:
            self._say_who_hangs(stage)
        except Exception:  # a full disk, say; this process ends in any case
            traceback.print_exc()
        readers = multiprocessing.active_children()
        for reader in readers:
            reader.kill()  # it may hang as well, and would stay
        for reader in readers:
            reader.join(_LOOK_SECONDS)  # this rank's end is the run's, after which none of it is there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(StepHung.exit_code)

    def _say_who_hangs(self, stage: _Stage) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._write_stack()
        if not self._heard("alarm", "hang"):
            self.directory.append_event("alarm", rank=self.rank, attempt=self.attempt, during=stage.what)
        verdict = self._wait_for_verdict()
        if verdict is None:
            found = judge(self._read_stacks())
            where = short_path(self.directory.path / "logs")
            text = f"{self._what_took_long(stage)}: {found.text}\n  stacks: {where}/*.attempt_{self.attempt}.stacks"
            verdict = {"ranks": found.ranks, "why": text}
            self.directory.append_event("hang", attempt=self.attempt, **verdict)
        self.report(StepHung(verdict["ranks"], verdict["why"]))
        time.sleep(2 * self._look_seconds)  # until the others have said so too: one rank's end may end them all

    def _write_stack(self) -> None:
        if os.fstat(self._file).st_size:
            return
        if self._error is None:
            faulthandler.dump_traceback(self._file, all_threads=True)
            return
        # the main thread has left the place where it waited
        frames = reversed(traceback.extract_tb(self._error.__traceback__))
        lines = [f'  File "{frame.filename}", line {frame.lineno} in {frame.name}' for frame in frames]
        text = "\n".join([f"{self._error}", "Thread 0x0 (most recent call first):", *lines])
        os.write(self._file, f"{text}\n".encode())

    def _wait_for_verdict(self) -> dict | None:
        """Return another rank's verdict, or None where it is this rank's turn."""
        gathering = 3 * self._look_seconds + 1
        deadline = time.monotonic() + gathering + 2 * self._look_seconds * min(self.rank, _MOST_JUDGES)
        while time.monotonic() < deadline:
            if verdict := self._heard("hang"):
                return verdict
            time.sleep(self._look_seconds / 4)
        return None

    def _heard(self, *names: str) -> dict | None:
        """Return the last such event since the watchdog was there."""
        new, self._read = self.directory.read_new_events(self._read)
        self._events += [event for event in new if event.get("attempt") == self.attempt]
        return next((event for event in reversed(self._events) if event.get("event") in names), None)

    def _read_stacks(self) -> dict[int, str]:
        stacks = dict.fromkeys(range(self.ranks), "")
        for rank in stacks:
            with contextlib.suppress(OSError):
                stacks[rank] = self.directory.stacks(rank, self.attempt).read_text(errors="replace")
        return stacks

    def _what_took_long(self, stage: _Stage) -> str:
        if self._error is not None:
            return f"{stage.what} hangs, and a collective has timed out (cluster.timeout_seconds)"
        if time.monotonic() - stage.began < stage.limit_seconds:
            return f"{stage.what} hangs on another rank"
        return f"{stage.what} has taken longer than fault_tolerance.{stage.key} = {stage.limit_seconds:.0f}"


def describe_limits(config: TitanConfig) -> str:
    """Say in a line how long what may take."""
    limits, wait = config.fault_tolerance, config.cluster.timeout_seconds
    if not limits.step_timeout_seconds:
        return f"off; a collective waits {wait} s for a rank"
    parts = [f"{limits.step_timeout_seconds} s a step"]
    for what, seconds in (
        ("for the first", limits.first_step_timeout_seconds),
        ("where it saves", limits.save_timeout_seconds),
    ):
        parts.append(f"{max(seconds, limits.step_timeout_seconds)} s {what}" if seconds else f"no limit {what}")
    if wait < limits.step_timeout_seconds:
        parts.append(f"but a collective gives up after {wait} s (cluster.timeout_seconds)")
    return ", ".join(parts)
