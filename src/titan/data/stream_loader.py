"""The steps of one data rank whose rows are made while training: which streams it reads, and where they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from titan.data.loader import Batch, MicroBatch, Share, Step, account
from titan.data.rows import Row
from titan.data.stream import Cursor, Stream
from titan.data.workers import Workers


@dataclass(frozen=True)
class StreamPlan:
    """Which stream makes which row of which step."""

    global_batch_size: int
    streams: int
    """V, for each component; a divisor of the global batch."""
    components: int
    components_at: Callable[[np.ndarray], np.ndarray]
    """Which component the row at each position of the endless order comes from. Shape: (N,) int64 -> (N,) int64."""
    padding: int
    """The token that fills rows up."""
    build: Callable[[int, int, Cursor], Stream]
    """Makes the stream of a component, from a cursor on."""

    @property
    def rows_of_stream(self) -> int:
        """Rows of a step that each stream makes."""
        return self.global_batch_size // self.streams

    def streams_of(self, share: Share) -> list[int]:
        """Return the streams that make a rank's rows; with fewer streams than ranks several read the same one."""
        size, places = self.rows_of_stream, share.places
        return list(range(places.start // size, (places.stop - 1) // size + 1))

    def initial_cursors(self) -> np.ndarray:
        """Return where all streams begin. Shape: (components * streams, K) int64."""
        return np.tile(np.array(Cursor(), dtype=np.int64), (self.components * self.streams, 1))

    def open(self, streams: Sequence[int], cursors: np.ndarray) -> dict[int, Stream]:
        """Return some streams of every component by their numbers, from where the cursors stand."""
        numbers = [component * self.streams + stream for component in range(self.components) for stream in streams]
        return {
            number: self.build(number // self.streams, number % self.streams, Cursor(*cursors[number].tolist()))
            for number in numbers
        }

    def rows_of(
        self, step: int, streams: Sequence[int], sources: Mapping[int, Stream]
    ) -> Iterator[tuple[int, Row, int]]:
        """Make the rows of a step that come from some streams: place in the global batch, row, number of the stream."""
        size = self.rows_of_stream
        places = np.concatenate([np.arange(stream * size, (stream + 1) * size) for stream in streams])
        components = self.components_at(step * self.global_batch_size + places)
        for place, component in zip(places.tolist(), components.tolist(), strict=True):
            number = component * self.streams + place // size
            yield place, sources[number].next_row(), number

    def read(
        self, streams: Sequence[int], cursors: np.ndarray, share: Share, steps: range, left_out: Collection[int]
    ) -> Iterator[StreamedPart]:
        """Make a rank's rows that come from some of its streams, step by step.

        Args:
            streams: Which of them.
            cursors: Where all streams stand before the first step. Shape: (components * streams, K).
            share: What the rank takes.
            steps: Counted from 0.
            left_out: Those of the steps whose rows are made and dropped.
        """
        sources = self.open(streams, cursors)
        numbers = list(sources)
        for step in steps:
            made = [
                (place, row)
                for place, row, _ in self.rows_of(step, streams, sources)
                if place in share.places and step not in left_out
            ]
            of_rank = (
                account([place for place, _ in made], _stack([row for _, row in made]), self.padding) if made else None
            )
            yield StreamedPart(
                [place for place, _ in made],
                of_rank,
                numbers,
                np.array([sources[number].cursor for number in numbers], dtype=np.int64),
                sum(stream.tokens for stream in sources.values()),
                sum(stream.text_bytes for stream in sources.values()),
                dict(sum((stream.skipped for stream in sources.values()), Counter())),
            )


@dataclass(frozen=True)
class StreamedPart:
    """What one process has made of a rank's part of a step."""

    places: list[int]
    """Of the rows, in the global batch."""
    rows: MicroBatch | None
    streams: list[int]
    """Numbers of the streams that it reads: component * streams + stream."""
    cursors: np.ndarray
    """Where they stand after the step. Shape: (streams, K)."""
    tokens: int
    """Tokenised since it began."""
    text_bytes: int
    """Of the text that made them, in UTF-8."""
    skipped: dict[str, int]
    """Documents left out since it began, by reason."""


@dataclass
class Tokenised:
    """What a rank has tokenised so far."""

    tokens: int = 0
    text_bytes: int = 0
    skipped: Counter[str] | None = None
    """Documents left out, by reason."""


def build_stream_loader(
    plan: StreamPlan,
    share: Share,
    cursors: np.ndarray,
    first_step: int,
    last_step: int,
    num_workers: int = 0,
    prefetch: int = 2,
    left_out: Collection[int] = (),
    tokenised: Callable[[Tokenised], object] = lambda found: None,
) -> Generator[Step, None, None]:
    """Yield this rank's part of steps [first_step, last_step), counted from 0, in order.

    Args:
        plan: Which stream makes which row.
        share: Which rows this rank takes.
        cursors: Where all streams stand before the first step. Shape: (components * streams, K).
        first_step: The first.
        last_step: The one after the last.
        num_workers: Processes that make rows; 0 makes them here. More than the rank has streams are of no use.
        prefetch: Steps that each of them makes ahead.
        left_out: Steps that come without rows, though their documents are used up.
        tokenised: Is told at every step what has been tokenised so far.

    Raises:
        TitanError: What making a row has raised, in a worker too.
        WorkerLost: If a worker has died.
    """
    streams, steps = plan.streams_of(share), range(first_step, last_step)
    count = min(num_workers, len(streams))

    def make(worker: int) -> Iterator[StreamedPart]:
        return plan.read(streams[worker :: max(1, count)], cursors, share, steps, left_out)

    makers = [lambda worker=worker: make(worker) for worker in range(count)]
    workers: Workers[StreamedPart] = Workers(makers, prefetch)
    here = make(0)
    try:
        for step in steps:
            parts = [workers.next(worker) for worker in range(count)] if count else [next(here)]
            tokenised(
                Tokenised(
                    sum(part.tokens for part in parts),
                    sum(part.text_bytes for part in parts),
                    sum((Counter(part.skipped) for part in parts), Counter()),
                )
            )
            yield _assemble(plan, share, step, parts)
    finally:
        workers.close()


def _assemble(plan: StreamPlan, share: Share, step: int, parts: list[StreamedPart]) -> Step:
    cursors = np.full_like(plan.initial_cursors(), -1)
    for part in parts:
        cursors[part.streams] = part.cursors
    made = [part.rows for part in parts if part.rows is not None]
    batches: list[Batch] = []
    if made:
        whole = _join([part.batch for part in made], [place for part in parts for place in part.places])
        first = share.places.start
        batches = [whole.rows(places.start - first, places.stop - first) for places in share.micro_batches]
    digest, padding = sum(part.digest for part in made), sum(part.padding for part in made)
    return Step(step + 1, batches, digest, padding, cursors)


def _stack(rows: list[Row]) -> Row:
    starts = [row.starts for row in rows if row.starts is not None]
    inputs, labels = np.stack([row.inputs for row in rows]), np.stack([row.labels for row in rows])
    return Row(inputs, labels, np.stack(starts) if starts else None)


def _join(batches: list[Batch], places: list[int]) -> Batch:
    """Return the rows of all batches in the order of their places."""
    if len(batches) == 1 and places == sorted(places):
        return batches[0]
    order = torch.tensor(sorted(range(len(places)), key=places.__getitem__))
    starts = [batch.starts for batch in batches if batch.starts is not None]
    return Batch(
        torch.cat([batch.tokens for batch in batches])[order],
        torch.cat([batch.labels for batch in batches])[order],
        torch.cat(starts)[order] if starts else None,
    )
