"""Reading a step ahead: the same steps, the same errors, and nothing counted that was not handed out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import titan.trainer.loop
from titan.data.loader import Batch, Step
from titan.errors import DataError
from titan.trainer.ahead import Copies, prepare_steps, read_ahead
from titan.trainer.loop import steps_of_batches

WAIT_SECONDS = 30


class Source:
    """Numbers from 1, and what has become of them."""

    def __init__(self, last: int, fails_at: int = 0) -> None:
        self.last, self.fails_at = last, fails_at
        self.read: list[int] = []
        self.threads: list[int] = []
        self.was_read = [threading.Event() for _ in range(last + 1)]
        self.is_closed = False

    def items(self) -> Generator[int, None, None]:
        """Yield them."""
        try:
            for number in range(1, self.last + 1):
                if number == self.fails_at:
                    raise DataError(f"row {number} is damaged")
                self.read.append(number)
                self.threads.append(threading.get_ident())
                yield number
        finally:
            self.is_closed = True

    def start(self, number: int) -> int:
        """Note that it was read."""
        self.was_read[number].set()
        return -number


def make_step(number: int, rows: int = 2) -> Step:
    """Return a step of three micro-batches with numbers of its own, and where its stream stands after it."""
    tokens = torch.arange(rows * 8).view(rows, 8) + 100 * number
    batches = [Batch(tokens + each, -tokens - each, tokens % 3) for each in range(3)]
    return Step(number, batches, number * 7, number, np.full((1, 1), number))


def test_one_item_is_read_ahead_and_no_more() -> None:
    """While an item is in use the next one is read, and the one after that is not; none is missing at the end."""
    source = Source(4)
    found, finished = [], []

    def finish(started: int) -> int:
        finished.append(-started)
        return -started

    for number in read_ahead(source.items(), source.start, finish):
        found.append(number)
        if number < 4:
            assert source.was_read[number + 1].wait(WAIT_SECONDS)
        assert source.read == list(range(1, min(number + 2, 5)))
        assert finished == found
    assert found == [1, 2, 3, 4]
    assert source.is_closed


def test_the_first_item_is_read_by_the_caller() -> None:
    """Processes that read are started by the thread that lives as long as they do, and the others by one other."""
    source = Source(3)
    assert len(list(read_ahead(source.items(), source.start, abs))) == 3
    first, *others = source.threads
    assert first == threading.get_ident()
    assert first not in others
    assert len(set(others)) == 1


def test_an_error_comes_in_its_place() -> None:
    """A row that cannot be read ends the run when its step has come, and not the step before."""
    source = Source(4, fails_at=3)
    items = read_ahead(source.items(), source.start, abs)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(DataError, match="row 3 is damaged"):
        next(items)
    assert source.is_closed


def test_leaving_in_the_middle_ends_what_reads() -> None:
    """Closing waits for the item that is being read, hands it to nobody, and closes the source."""
    source, handed_out = Source(9), []
    items = read_ahead(source.items(), source.start, lambda started: handed_out.append(-started) or -started)
    assert next(items) == 1
    items.close()
    assert source.is_closed
    assert source.read == [1, 2]
    assert handed_out == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("is_ahead", [False, True])
def test_what_is_read_ahead_is_not_used_up(monkeypatch: pytest.MonkeyPatch, is_ahead: bool) -> None:
    """The cursors that a checkpoint would keep are those of the step handed out, whatever was read since."""
    was_read = [threading.Event() for _ in range(6)]

    def prepare(steps: Generator[Step, None, None], device: Any, positions: Any) -> Generator[Step, None, None]:
        def start(step: Step) -> Step:
            was_read[step.number].set()
            return step.prepared_for(device, positions)

        return read_ahead(steps, start, lambda step: step)

    if is_ahead:
        monkeypatch.setattr(titan.trainer.loop, "prepare_steps", prepare)
    data = SimpleNamespace(
        cursors=None, steps=lambda first, last, left_out: (make_step(number + 1) for number in range(first, last))
    )
    trainer: Any = SimpleNamespace(
        data=data,
        state=SimpleNamespace(step=1),
        config=SimpleNamespace(training=SimpleNamespace(steps=5)),
        device=torch.device("cpu"),
        positions=torch.tensor([1, 3]),
    )
    meter: Any = SimpleNamespace(data_seconds=0.0)
    numbers = []
    for step in steps_of_batches(trainer, meter):
        numbers.append(step.number)
        if is_ahead and step.number < 5:
            assert was_read[step.number + 1].wait(WAIT_SECONDS)
        assert data.cursors is step.cursors
        assert data.cursors.item() == step.number
        assert step.batches[1].tokens.equal(make_step(step.number).batches[1].tokens[:, [1, 3]])
    assert numbers == [2, 3, 4, 5]
    assert meter.data_seconds > 0


def test_on_a_cpu_nothing_is_read_ahead() -> None:
    """There is nothing to copy, so no thread takes time from the training."""
    read: list[int] = []

    def steps() -> Generator[Step, None, None]:
        for number in (1, 2, 3):
            read.append(number)
            yield make_step(number)

    for step in prepare_steps(steps(), torch.device("cpu"), None):
        assert read == list(range(1, step.number + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("work", [lambda device: None, lambda device: torch.cuda._sleep(50_000_000)])
def test_copies_arrive_whole_on_a_gpu(work: Callable[[torch.device], None]) -> None:
    """Each step on the device has its own numbers, however long the device has worked on others before using it.

    Memory that was given back too early would show: the steps are freed while the device still has to read them.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    copies = Copies(device, None)
    sums = []
    items = read_ahead((make_step(number, 4096) for number in range(1, 20)), copies.start, copies.finish)
    for step in items:
        work(device)
        assert all(batch.tokens.is_cuda for batch in step.batches)
        sums.append(torch.stack([batch.tokens.sum() + 2 * batch.labels.sum() for batch in step.batches]))
        del step
    expected = [
        torch.stack([batch.tokens.sum() + 2 * batch.labels.sum() for batch in make_step(number, 4096).batches])
        for number in range(1, 20)
    ]
    assert torch.stack(sums).cpu().equal(torch.stack(expected))
