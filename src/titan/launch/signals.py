"""Being told to stop: which signals say so, and what keeps them from killing anything on the way.

SLURM warns a job before its time limit or a preemption with a signal (SIGUSR2 here) to *every* process of the step,
data-loader workers and compilers included, and a process that does not know the signal dies of it. So it is blocked
from the start of a rank, which everything that the rank starts inherits, and looked for between two steps.

SIGTERM may mean that as well (Kubernetes, scancel, a torchrun that was told to stop), or that another rank has failed
and this one, which may hang in a collective, is to get out of the way. It asks for an orderly stop, unless the run
directory says that a rank has failed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from titan.errors import Stopped

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send before a job's end."""

_END = b"\0"
_POLL_SECONDS = 0.2
_noted: set[int] = set()


def _note(number: int, frame: FrameType | None) -> None:
    _noted.add(number)


def hold_warnings() -> None:
    """Block the warnings in this process and in all that it will start; at the very start, before any thread."""
    for number in WARNINGS:
        signal.signal(number, _note)  # a thread that is there already does not block it
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)


def warning() -> int:
    """Return the signal that has told this process to stop, or 0."""
    pending = signal.sigpending()
    return next((int(number) for number in (*WARNINGS, signal.SIGTERM) if number in _noted or number in pending), 0)


def forget() -> None:
    """Take the warnings received so far as answered."""
    _noted.clear()
    for number in WARNINGS:
        while number in signal.sigpending():
            signal.sigwait({number})


class OrderlyTermination:
    """A context in which SIGTERM is a warning too.

    Args:
        failure: Returns the exit code of a rank that has failed, or 0. Where one has, SIGTERM ends this process at
            once and with the same code, so that the job has it too.
    """

    def __init__(self, failure: Callable[[], int]) -> None:
        self.failure = failure

    def __enter__(self) -> OrderlyTermination:
        self._before = signal.signal(signal.SIGTERM, _note)
        # The handler runs between two lines of Python, so never while a collective hangs. The number of the signal
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
        has_stopped = isinstance(exception[1], Stopped)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if has_stopped else self._before)
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
                is_told |= signal.SIGTERM in numbers
            if is_told and (code := self.failure()):
                os._exit(code)


class Forwarder:
    """A context in which this process, told to stop, tells its children instead of ending.

    It keeps looking for ranks that have been started since, and sends itself SIGQUIT when the grace is over.

    Args:
        grace_seconds: How long the children have.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.told = 0
        """The signal received, or 0."""

    def __enter__(self) -> Forwarder:
        hold_warnings()
        self._over = threading.Event()
        self._term = threading.Event()
        self._before = signal.signal(signal.SIGTERM, lambda number, frame: self._term.set())
        self._thread = threading.Thread(target=self._forward, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        signal.signal(signal.SIGTERM, self._before)
        forget()

    def _forward(self) -> None:
        waited, ranks = 0.0, set[int]()
        while not self._over.wait(_POLL_SECONDS):
            self.told = self.told or (signal.SIGTERM if self._term.is_set() else warning())
            if not self.told:
                continue
            tell_ranks(signal.SIGUSR1, ranks)
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
