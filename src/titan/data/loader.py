"""Micro-batches for one data rank, from any step on.

PyTorch's DataLoader does the reading ahead; it hands batches out in the order of its sampler however many workers
it has, and the sampler here is a plain function of the step, so there is no state to save.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from titan.data.batch import Order
from titan.data.rows import Row, Rows


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

    def pin_memory(self) -> Batch:
        """Copy to memory from which a GPU can fetch by itself; DataLoader calls this."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        starts = None if self.starts is None else change(self.starts)
        return Batch(change(self.tokens), change(self.labels), starts)


@dataclass(frozen=True)
class Share:
    """What one data rank takes of every step."""

    order: Order
    local_batch_size: int
    data_rank: int
    data_ranks: int

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the rows of each of this rank's micro-batches in a step."""
        rows = self.order.rows_of_step(step)
        shaped = rows.reshape(-1, self.data_ranks, self.local_batch_size)
        return shaped[:, self.data_rank].tolist()


class _Steps(Sampler[list[int]]):
    def __init__(self, share: Share, first_step: int, last_step: int, left_out: Collection[int]) -> None:
        self.share, self.first_step, self.last_step, self.left_out = share, first_step, last_step, left_out

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            if step not in self.left_out:
                yield from self.share.micro_batches(step)


def build_loader(
    rows: Rows,
    share: Share,
    first_step: int,
    last_step: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    left_out: Collection[int] = (),
) -> Iterable[Batch]:
    """Return this rank's micro-batches of steps [first_step, last_step), counted from 0, in order; some left out."""
    return DataLoader(  # type: ignore[return-value]
        rows,  # type: ignore[arg-type]
        batch_sampler=_Steps(share, first_step, last_step, left_out),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=False,
        generator=torch.Generator(),  # or a new loader draws from torch's own, which a resumed run must find as it was
        worker_init_fn=_leave_stopping_to_the_rank,
    )


def _leave_stopping_to_the_rank(worker: int) -> None:
    """Let a worker outlive what schedulers (SIGTERM) and terminals (SIGINT) send to all processes.

    Its rank still needs batches to stop. It ends when its rank says so, or has ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def collate(rows: Row | list[Row]) -> Batch:
    """Make a batch of rows that were read together, or one by one."""
    if isinstance(rows, list):
        rows = Row(*(None if column[0] is None else np.stack(column) for column in zip(*rows, strict=True)))  # type: ignore[arg-type]
    return Batch(*(None if column is None else torch.from_numpy(column) for column in rows))  # type: ignore[arg-type]
