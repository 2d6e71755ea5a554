"""Processes that read ahead: what they make arrives, what they raise is raised, and their end is noticed."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from titan.data.workers import Workers
from titan.errors import DataError, WorkerLost

Item = tuple[int, torch.Tensor]


def count(worker: int, items: int) -> Iterator[Item]:
    """Yield a worker's number and a tensor of each item's."""
    for item in range(items):
        yield worker, torch.full((1000,), item)


def no_workers_left() -> bool:
    """Return whether this process has no child of these tests any more."""
    return not [child for child in multiprocessing.active_children() if child.name.startswith("data")]


def test_items_come_in_order_from_each_worker() -> None:
    """All of them, tensors included; and a worker that has made all it makes stays until they have been taken."""
    workers: Workers[Item] = Workers([lambda w=w: count(w, 5) for w in range(3)], prefetch=2)
    for item in range(5):
        for worker in range(3):
            number, tensor = workers.next(worker)
            assert (number, tensor.tolist()) == (worker, [item] * 1000)
    with pytest.raises(StopIteration):
        workers.next(1)
    workers.close()
    assert no_workers_left()


def test_a_worker_makes_no_more_ahead_than_it_is_told() -> None:
    """Or a slow rank would have all its data in memory."""
    made = multiprocessing.get_context("fork").Value("i", 0)

    def counted() -> Iterator[int]:
        for item in range(100):
            with made.get_lock():
                made.value += 1
            yield item

    workers: Workers[int] = Workers([counted], prefetch=3)
    for taken in range(1, 20):
        assert workers.next(0) == taken - 1
        assert made.value <= taken + 3 + 1  # the one that waits for its turn
    workers.close()


def test_titans_errors_arrive_as_they_are() -> None:
    """Behind the items that came before."""

    def failing() -> Iterator[int]:
        yield 1
        raise DataError("a.jsonl, line 7: broken JSON")

    workers: Workers[int] = Workers([failing], prefetch=2)
    assert workers.next(0) == 1
    with pytest.raises(DataError, match=r"^a.jsonl, line 7: broken JSON$"):
        workers.next(0)
    workers.close()


def test_other_errors_arrive_with_where_they_were_raised() -> None:
    """For they are defects."""

    def failing() -> Iterator[int]:
        yield 1 // 0

    workers: Workers[int] = Workers([failing], prefetch=2)
    with pytest.raises(RuntimeError, match=r"(?s)data worker 0 failed:.*in failing.*ZeroDivisionError"):
        workers.next(0)
    workers.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_worker_that_dies_is_named_with_its_signal(number: signal.Signals) -> None:
    """In the middle of its work, with others beside it that hold no pipe open."""

    def dying() -> Iterator[int]:
        yield 1
        os.kill(os.getpid(), number)
        yield 2

    workers: Workers[int] = Workers([dying, lambda: iter(range(9))], prefetch=2)
    assert workers.next(0) == 1
    with pytest.raises(
        WorkerLost, match=rf"data worker 0 of this rank's 2 \(process \d+\) was killed by {number.name}"
    ):
        workers.next(0)
    workers.close()
    assert no_workers_left()


def test_shared_memory_that_is_full_says_what_to_do() -> None:
    """As it soon is in a container; the limit of a file's size makes torch fail where a full /dev/shm does."""

    def large() -> Iterator[torch.Tensor]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        yield torch.ones(10_000)

    workers: Workers[torch.Tensor] = Workers([large], prefetch=2)
    try:
        with pytest.raises(WorkerLost, match=r"no room(.|\n)*data\.prefetch=1, data\.num_workers=0(.|\n)*--shm-size"):
            workers.next(0)
    finally:
        workers.close()


@pytest.mark.parametrize("is_shared_memory", [True, False])
def test_only_what_torch_says_of_shared_memory_is_taken_for_it(is_shared_memory: bool) -> None:
    """In the words of a full /dev/shm; any other RuntimeError stays a defect with its traceback."""
    words = "unable to allocate shared memory(shm) for file </torch_7_1>: No space left on device (28)"

    class Failing:
        def __reduce__(self) -> str:
            raise RuntimeError(words if is_shared_memory else "something else")

    workers: Workers[Failing] = Workers([lambda: iter([Failing()])], prefetch=2)
    expected = (WorkerLost, "No space left") if is_shared_memory else (RuntimeError, "something else")
    try:
        with pytest.raises(expected[0], match=expected[1]):
            workers.next(0)
    finally:
        workers.close()


def test_a_worker_that_finds_no_shared_memory_says_what_to_do() -> None:
    """The kernel ends a process that touches memory it was promised and does not get."""

    def dying() -> Iterator[int]:
        faulthandler.disable()  # pytest's, whose stacks are not wanted here
        os.kill(os.getpid(), signal.SIGBUS)
        yield 1

    workers: Workers[int] = Workers([dying], prefetch=2)
    with pytest.raises(WorkerLost, match=r"SIGBUS, as the kernel does when shared memory runs out\n.*--shm-size"):
        workers.next(0)
    workers.close()


_RANK = """
import sys, time
from titan.data.workers import Workers

def endless():
    while True:
        yield 1

workers = Workers([endless, endless], prefetch=2)
workers.next(0), workers.next(1)
print(*(process.pid for process, _, _ in workers._workers), flush=True)
time.sleep(600)
"""


def test_workers_end_with_their_rank_however_it_ends() -> None:
    """SIGKILL leaves the rank no time to end them, and SIGTERM, which all processes get, they leave to it."""
    rank = subprocess.Popen([sys.executable, "-c", _RANK], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    pids = [int(text) for text in rank.stdout.readline().split()]
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    rank.kill()
    rank.wait()
    rank.stdout.close()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
