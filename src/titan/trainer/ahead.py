"""Batches on their way to the device while it still computes the step before.

On CUDA a thread reads the next step, pins its memory and starts its copy on a stream of its own, as soon as a step has
been handed out. One step ahead is enough: what takes longer than a step has to be read by more workers, and not
earlier. On a CPU there is nothing to copy, and a thread would take time from the training.

What was read ahead counts only once it is handed out: until then neither its place in the data nor an error in it is
anyone's business. So a run that stops or goes back has used up nothing that it has not trained on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from titan.data.loader import Step

T = TypeVar("T")
R = TypeVar("R")


def prepare_steps(
    steps: Generator[Step, None, None], device: torch.device, positions: Tensor | None
) -> Generator[Step, None, None]:
    """Yield steps with some positions of every row, on a device; closes `steps`.

    Args:
        steps: As they are read.
        device: Where they are wanted; on CUDA the next one is on its way already.
        positions: Which to keep; None keeps all. Shape: (N,).
    """
    if device.type == "cuda":
        copies = Copies(device, positions)
        yield from read_ahead(steps, copies.start, copies.finish)
        return
    with contextlib.closing(steps):
        for step in steps:
            yield step.prepared_for(device, positions)


def read_ahead(
    items: Generator[T, None, None], start: Callable[[T], R], finish: Callable[[R], T]
) -> Generator[T, None, None]:
    """Yield items, the next of them being read meanwhile, in a thread; closes `items`.

    Args:
        items: What to read.
        start: Called in the thread with an item that was read.
        finish: Called in the caller's own thread, when the item is handed out.

    Raises:
        Exception: What reading or starting an item has raised, in its place among them.
    """
    with contextlib.closing(items), ThreadPoolExecutor(1, "read-ahead") as thread:

        def read() -> R | None:
            item = next(items, None)
            return None if item is None else start(item)

        # The first is read here, for that starts the processes that read, which the kernel ends together with the
        # thread that has started them.
        started = read()
        while started is not None:
            ahead: Future[R | None] = thread.submit(read)
            # Whoever leaves in the middle leaves a thread that reads: the executor waits for it, before `items` ends.
            yield finish(started)
            started = ahead.result()


class Copies:
    """Copies steps to a CUDA device on a stream of their own.

    Args:
        device: Where to.
        positions: Which of every row; None for all. Shape: (N,).
    """

    def __init__(self, device: torch.device, positions: Tensor | None) -> None:
        self.device, self.positions = device, positions
        self.stream = torch.cuda.Stream(device)

    def start(self, step: Step) -> tuple[Step, torch.cuda.Event]:
        """Start copying a step, from any thread; returns it as it will be, and when it is."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):  # both belong to the thread
            copied = step.prepared_for(self.device, self.positions)
            done = torch.cuda.Event()
            done.record(self.stream)
        return copied, done

    def finish(self, started: tuple[Step, torch.cuda.Event]) -> Step:
        """Return the step for use on the current stream, which waits for the copy; the host does not."""
        step, done = started
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for batch in step.batches:
            for tensor in (batch.tokens, batch.labels, batch.starts):
                if tensor is not None:
                    tensor.record_stream(current)  # or its memory could be the next copy's while this step computes
        return step
