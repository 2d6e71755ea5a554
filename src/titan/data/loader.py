"""The steps of one data rank, from any step on.

A step is G rows; data rank r of D takes the rows from r*G/D to (r+1)*G/D, in micro-batches one after the other. Which
rows they are is a function of the step, so prepared data has no state to save; `titan.data.stream_loader` reads rows
that are made while training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from titan.data.batch import Order
from titan.data.digest import count_padding, row_digest
from titan.data.rows import Row
from titan.data.workers import Workers


@dataclass(frozen=True)
class Batch:
    """Some rows.

    Shape:
        tokens, labels, starts: (B, S) int64.
    """

    tokens: Tensor
    labels: Tensor
    starts: Tensor | None = None
    """Where in its row the document of each token begins; None where attention may cross documents."""

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def at(self, positions: Tensor | None) -> Batch:
        """Keep some positions of every row; None keeps all. Shape: positions (N,) -> tokens, labels (B, N)."""
        return self if positions is None else self._map(lambda x: x[:, positions])

    def chunk(self, parts: int) -> list[Batch]:
        """Cut into so many batches of as many rows each. Shape: tokens, labels (B, S) -> (B/parts, S)."""
        columns = [self.tokens, self.labels] + ([] if self.starts is None else [self.starts])
        return [Batch(*pieces) for pieces in zip(*(column.chunk(parts) for column in columns), strict=True)]

    def pin_memory(self) -> Batch:
        """Copy to memory from which a GPU can fetch by itself."""
        return self._map(lambda x: x.pin_memory())

    def rows(self, first: int, last: int) -> Batch:
        """Keep the rows [first, last)."""
        return self._map(lambda x: x[first:last])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        starts = None if self.starts is None else change(self.starts)
        return Batch(change(self.tokens), change(self.labels), starts)


class Readable(Protocol):
    """Rows that can be read by their numbers."""

    def read(self, rows: Sequence[int] | np.ndarray) -> Row:
        """Return some rows. Shape: (B, S) each."""
        ...


@dataclass(frozen=True)
class Step:
    """What one data rank has of a step."""

    number: int
    """Counted from 1."""
    batches: list[Batch]
    """Its micro-batches; none for a step that is left out."""
    digest: int = 0
    """The sum of its rows' digests: `titan.data.digest`."""
    padding: int = 0
    """Positions at the ends of its rows that are only filled up."""
    cursors: np.ndarray | None = None
    """With streaming: where its streams stand after the step. Shape: (components * streams, K) int64, -1 for others."""

    def prepared_for(self, device: torch.device, positions: Tensor | None) -> Step:
        """Return the step with some positions of every row, on a device."""
        batches = [batch.at(positions) for batch in self.batches]
        if device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        moved = [batch.to(device) for batch in batches]
        return Step(self.number, moved, self.digest, self.padding, self.cursors)


@dataclass(frozen=True)
class Share:
    """What one data rank takes of every step."""

    global_batch_size: int
    local_batch_size: int
    data_rank: int
    data_ranks: int

    @property
    def places(self) -> range:
        """Return which rows of the global batch this rank takes."""
        size = self.global_batch_size // self.data_ranks
        return range(self.data_rank * size, (self.data_rank + 1) * size)

    @property
    def micro_batches(self) -> list[range]:
        """Return which rows of the global batch each micro-batch of this rank has."""
        size, places = self.local_batch_size, self.places
        return [range(first, first + size) for first in range(places.start, places.stop, size)]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a step that were read together."""

    batch: Batch
    digest: int
    padding: int


def build_loader(
    rows: Readable,
    order: Order,
    share: Share,
    padding: int,
    first_step: int,
    last_step: int,
    num_workers: int = 0,
    prefetch: int = 2,
    left_out: Collection[int] = (),
) -> Generator[Step, None, None]:
    """Yield this rank's part of steps [first_step, last_step), counted from 0, in order.

    Args:
        rows: Where the rows are.
        order: Which of them a step has.
        share: Which of those this rank takes.
        padding: The token that fills rows up.
        first_step: The first.
        last_step: The one after the last.
        num_workers: Processes that read ahead; 0 reads here.
        prefetch: Micro-batches that each of them reads ahead.
        left_out: Steps that come without rows.

    Raises:
        TitanError: What reading a row has raised, in a worker too.
        WorkerLost: If a worker has died.
    """
    parts = share.micro_batches
    steps = [step for step in range(first_step, last_step) if step not in left_out]

    def make(worker: int, count: int) -> Iterator[MicroBatch]:
        for number in range(worker, len(steps) * len(parts), count):
            step, part = divmod(number, len(parts))
            chosen = order.rows_of_step(steps[step])
            yield _read(rows, padding, [(place, int(chosen[place])) for place in parts[part]])

    makers = [lambda worker=worker: make(worker, num_workers) for worker in range(num_workers)]
    workers: Workers[MicroBatch] = Workers(makers, prefetch)
    here = make(0, 1)
    try:
        number = 0
        for step in range(first_step, last_step):
            read: list[MicroBatch] = []
            for _ in parts if step not in left_out else ():
                read.append(workers.next(number % num_workers) if num_workers else next(here))
                number += 1
            digest, padding = sum(micro.digest for micro in read), sum(micro.padding for micro in read)
            yield Step(step + 1, [micro.batch for micro in read], digest, padding)
    finally:
        workers.close()


def _read(rows: Readable, padding: int, chosen: Sequence[tuple[int, int]]) -> MicroBatch:
    return account([place for place, _ in chosen], rows.read([row for _, row in chosen]), padding)


def account(places: Sequence[int], rows: Row, padding: int) -> MicroBatch:
    """Return rows as a batch, with what is to be known of them: see `Step`.

    Args:
        places: Where each row is in the global batch.
        rows: Several.
        padding: The token that fills rows up.
    """
    digest = sum(row_digest(place, rows.at(index)) for index, place in enumerate(places))
    return MicroBatch(collate(rows), digest, count_padding(rows, padding))


def collate(rows: Row) -> Batch:
    """Make a batch of rows that were read together."""
    return Batch(*(None if column is None else torch.from_numpy(column) for column in rows))  # type: ignore[arg-type]
