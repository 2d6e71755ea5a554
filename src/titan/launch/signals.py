"""Being told to stop: which signals say so, and what keeps them from killing anything on the way.

SLURM warns a job before its time limit or a preemption with a signal (SIGUSR2 here) to *every* process of the step,
data-loader workers and compilers included, and a process that does not know the signal dies of it. So it is blocked
from the start of a rank, which everything that the rank starts inherits, and looked for between two steps.

SIGTERM may mean that as well (Kubernetes, scancel, a torchrun that was told to stop), or that another rank has failed
and this one, which may hang in a collective, is to get out of the way. It asks for an orderly stop, unless the run
directory says that a rank has failed.

SIGINT is Ctrl-C, which a terminal sends to the launcher, to all ranks and to their data loaders' workers. The first one
asks for an orderly stop, and nobody dies of it; a second one ends the run at once. Before there is something to save,
the first one does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from titan.errors import INTERRUPTED, Stopped

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send before a job's end."""

LAUNCHER_TOLD: signal.Signals = getattr(signal, "SIGRTMIN", signal.SIGXCPU)  # macOS has none
"""What titan's own launcher sends its ranks after a SIGTERM: from it, SIGTERM itself says that a rank has failed."""
_HELD = (*WARNINGS, LAUNCHER_TOLD)

FIRST_INTERRUPT = "\nstopping after this step; Ctrl-C again ends at once"

_END = b"\0"
_POLL_SECONDS = 0.2
_ONE_INTERRUPT_SECONDS = 0.5
"""What comes so soon after a SIGINT is the same one: torchrun sends it on to ranks that the terminal has told."""
_noted: set[int] = set()


def _note(number: int, frame: FrameType | None) -> None:
    _noted.add(number)


def hold_warnings() -> None:
    """Block the warnings in this process and in all that it will start; at the very start, before any thread."""
    for number in _HELD:
        signal.signal(number, _note)  # a thread that is there already does not block it
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)


def hold_interrupt(is_held: bool) -> None:
    """Put a SIGINT off, or let what was put off come; for what leaves a mess when interrupted, such as an import."""
    signal.pthread_sigmask(signal.SIG_BLOCK if is_held else signal.SIG_UNBLOCK, {signal.SIGINT})


def warning() -> int:
    """Return the signal that has told this process, or its launcher, to stop, or 0."""
    told = _noted | signal.sigpending()
    first = next((number for number in (*_HELD, signal.SIGTERM, signal.SIGINT) if number in told), 0)
    return int(signal.SIGTERM if first == LAUNCHER_TOLD else first)


def forget() -> None:
    """Take the warnings received so far as answered."""
    _noted.clear()
    for number in _HELD:
        while number in signal.sigpending():
            signal.sigwait({number})


class OrderlyStop:
    """A context in which SIGTERM and SIGINT are warnings too; a second SIGINT ends this process at once.

    Args:
        failure: Returns the exit code of a rank that has failed, or 0. Where one has, SIGTERM ends this process at
            once and with the same code, so that the job has it too.
        interrupt: Says that this process ends at once, before it does.
        has_launcher: Whether titan's own launcher has started this process. It sends SIGTERM only after a failure, and
            it counts how often somebody presses Ctrl-C, which a terminal tells every process.
        is_console: Whether this process tells the user what SIGINT does.
    """

    def __init__(
        self,
        failure: Callable[[], int],
        interrupt: Callable[[], object] = lambda: None,
        has_launcher: bool = False,
        is_console: bool = True,
    ) -> None:
        self.failure, self.interrupt = failure, interrupt
        self.has_launcher, self.is_console = has_launcher, is_console
        self._interrupted: float | None = None

    def __enter__(self) -> OrderlyStop:
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, _note)}
        if not self.has_launcher:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _note)
        # A handler runs between two lines of Python, so never while a collective hangs. The number of the signal
        # comes through this pipe at once, to a thread of its own.
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        self._wakeup_before = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        # A rank that has stopped in order is about to end by itself. The first to do so makes srun send SIGTERM to the
        # others, and one that dies of it would hide the exit code of all.
        # Titan's launcher may pass a SIGINT on at any moment.
        has_stopped = isinstance(exception[1], Stopped)
        for number, before in self._before.items():
            is_answered = has_stopped or (number == signal.SIGINT and self.has_launcher)
            signal.signal(number, signal.SIG_IGN if is_answered else before)
        os.write(self._in, _END)  # closing it would not do: a data-loader worker may have it too
        self._thread.join()
        os.close(self._in)
        os.close(self._out)

    def _watch(self) -> None:
        is_told = False
        poll = select.poll()  # select() knows only the first 1024 files of a process
        poll.register(self._out, select.POLLIN)
        while True:
            if poll.poll(1000 * _POLL_SECONDS if is_told else None):
                numbers = os.read(self._out, 64)
                if _END in numbers:
                    return
                is_told |= signal.SIGTERM in numbers and not self.has_launcher
                if signal.SIGINT in numbers and not self.has_launcher:
                    self._on_interrupt()
            if is_told and (code := self.failure()):
                os._exit(code)

    def _on_interrupt(self) -> None:
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            if self.is_console:
                print(FIRST_INTERRUPT, file=sys.stderr, flush=True)
        elif now > self._interrupted + _ONE_INTERRUPT_SECONDS:
            try:
                self.interrupt()
            finally:
                os._exit(INTERRUPTED)


class Forwarder:
    """A context in which this process, told to stop, tells its children instead of ending.

    It keeps looking for ranks that have been started since, and sends itself SIGQUIT when the grace is over.

    Args:
        grace_seconds: How long the children have.
        is_training: Whether the children have something to save.
        interrupt: Ends this process and its children: called with SIGINT where there is nothing to save, and with
            SIGQUIT after a second SIGINT, when the children take no notice of it any more.
    """

    def __init__(
        self, grace_seconds: float, is_training: Callable[[], bool], interrupt: Callable[[signal.Signals], NoReturn]
    ) -> None:
        self.grace_seconds, self.is_training, self.interrupt = grace_seconds, is_training, interrupt
        self.told = 0
        """The signal received, or 0."""

    def __enter__(self) -> Forwarder:
        hold_warnings()
        self._over = threading.Event()
        self._term = threading.Event()
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: self._term.set()),
            signal.SIGINT: signal.signal(signal.SIGINT, self._on_interrupt),
        }
        self._thread = threading.Thread(target=self._forward, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        for number, before in self._before.items():
            signal.signal(number, before)
        forget()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.told == signal.SIGINT:
            self.interrupt(signal.SIGQUIT)
        if not self.is_training():
            self.interrupt(signal.SIGINT)
        self.told = signal.SIGINT
        print(FIRST_INTERRUPT, file=sys.stderr, flush=True)

    def _forward(self) -> None:
        waited, ranks = 0.0, set[int]()
        while not self._over.wait(_POLL_SECONDS):
            self.told = self.told or (signal.SIGTERM if self._term.is_set() else warning())
            if not self.told:
                continue
            # where a terminal or SLURM has told the ranks itself, one signal more is the same to them
            tell_ranks(LAUNCHER_TOLD if self.told == signal.SIGTERM else signal.Signals(self.told), ranks)
            waited += _POLL_SECONDS
            if waited > self.grace_seconds:
                os.kill(os.getpid(), signal.SIGQUIT)
                return


def tell_ranks(number: signal.Signals, told: set[int]) -> int:
    """Send a signal to every rank that this process has started; returns how many there are.

    Other children, a notebook's for instance, may not know the signal and would die of it.

    Args:
        number: The signal.
        told: Those that have had it, and do not get it twice; those that get it now are added.
    """
    ranks = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):
            parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]  # before it is a free name
            if int(parent) == os.getpid() and b"\0RANK=" in b"\0" + Path(f"/proc/{name}/environ").read_bytes():
                ranks += 1
                if int(name) not in told:
                    told.add(int(name))
                    os.kill(int(name), number)
    return ranks
