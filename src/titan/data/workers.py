"""Processes that read ahead, each with a pipe of its own.

PyTorch's DataLoader gives all its workers one queue: one that dies while it writes leaves the others and the rank
waiting for it, unless a signal handler interrupts the rank wherever it is, in the middle of a save for instance. Here
the end of a worker is the end of its pipe, which the rank sees at once and only when it reads. Tensors travel in shared
memory, not through the pipe.

A worker that fails hands titan's own errors over as they are. One that dies (most often the kernel takes it, for the
memory) is an error with its name and signal, and so is shared memory that is full, as it soon is in a container.
Workers leave SIGTERM and SIGINT to their rank, which still needs batches to stop in order, and end when it does,
however it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch
import torch.multiprocessing

from titan.errors import TitanError, WorkerLost

T = TypeVar("T")
_END_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
_MORE_SHARED_MEMORY = (
    "  Try  data.prefetch=1, data.num_workers=0 (which needs none), or a larger /dev/shm: docker run --shm-size=8g, "
    "or an emptyDir of medium Memory at /dev/shm in Kubernetes"
)


class Workers(Generic[T]):
    """Iterators that each run in a process of their own, some items ahead.

    Args:
        makers: One for each worker: makes its iterator, in the worker. None given, everything is made here.
        prefetch: Items that each worker makes ahead.
    """

    def __init__(self, makers: Sequence[Callable[[], Iterator[T]]], prefetch: int) -> None:
        context = multiprocessing.get_context("fork")
        self._workers: list[tuple[Any, Any, Any]] = []
        for number, make in enumerate(makers):
            ours, theirs = context.Pipe(duplex=False)
            free = context.Semaphore(prefetch)
            others = [connection for _, connection, _ in self._workers]
            process = context.Process(
                target=_work, args=(make, theirs, free, os.getpid(), [*others, ours]), name=f"data{number}", daemon=True
            )
            process.start()
            theirs.close()  # or the pipe would not end with the worker
            self._workers.append((process, ours, free))

    def __len__(self) -> int:
        return len(self._workers)

    def next(self, number: int) -> T:
        """Return the next item of a worker.

        Raises:
            StopIteration: If it has no more.
            WorkerLost: If it has died.
            TitanError: What it has raised.
        """
        process, connection, free = self._workers[number]
        try:
            kind, value = connection.recv()
        except (EOFError, OSError) as error:  # OSError: it has died before a tensor was fetched
            raise self._lost(number, process) from error
        free.release()
        if kind == "item":
            return value
        if kind == "end":
            raise StopIteration
        if isinstance(value, TitanError):
            raise value
        raise RuntimeError(f"data worker {number} failed:\n{value}")

    def close(self) -> None:
        """End all workers."""
        for process, connection, _ in self._workers:
            connection.close()
            process.kill()
        for process, _, _ in self._workers:
            process.join(_END_SECONDS)
        self._workers = []

    def _lost(self, number: int, process: Any) -> WorkerLost:
        process.join(_END_SECONDS)
        code = process.exitcode
        cause = f"ended with exit code {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                cause = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            cause += ", as the kernel does when memory runs out"
        if code == -signal.SIGBUS:
            cause += ", as the kernel does when shared memory runs out"
        count = len(self._workers)
        what = f"data worker {number} of this rank's {count} (process {process.pid}) {cause}\n"
        if code == -signal.SIGBUS:
            return WorkerLost(what + _MORE_SHARED_MEMORY)
        fewer = count - 1
        return WorkerLost(
            f"{what}  Try  data.num_workers={fewer}   (this run has {count}), data.prefetch=1, with data.streaming a "
            "smaller data.shuffle_window, or more memory for each rank"
        )


def _work(make: Callable[[], Iterator[T]], pipe: Connection, free: Any, rank: int, of_rank: list[Connection]) -> None:
    for connection in of_rank:  # or another worker's pipe would not end with the rank
        connection.close()
    _end_with(rank)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(BrokenPipeError):
        try:
            for item in make():
                free.acquire()
                _send(pipe, item)
            last: tuple[str, Any] = ("end", None)
        except TitanError as error:
            last = ("error", error)
        except Exception as error:
            last = ("error", "".join(traceback.format_exception(error)))
        free.acquire()
        pipe.send(last)
        signal.pause()  # the rank fetches tensors of the last items from this process


def _send(pipe: Connection, item: Any) -> None:
    """Hand an item over, its tensors in shared memory.

    Raises:
        WorkerLost: If there is no room for them.
    """
    try:
        pipe.send(("item", item))
    except RuntimeError as error:  # torch has no type of its own for it, and says what the system said
        if "shared memory" not in str(error) and "</torch_" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise WorkerLost(
            f"there is no room for what the data workers read ahead: {reason}\n{_MORE_SHARED_MEMORY}"
        ) from error


def _end_with(rank: int) -> None:
    """Ask the kernel to end this process when its rank ends, however it ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:  # it died before we asked
        os._exit(1)
