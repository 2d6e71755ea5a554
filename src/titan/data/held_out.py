"""Every row of a finite set once, in its own order, on any number of data ranks.

Training goes on for ever and takes its rows at random; a held-out set is gone through from its first row to its last.
All ranks take part in every round, or those that have rows would wait for those that have none. So the last round is
filled up with rows in which no label counts: they cost time and change no sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from titan.data.batch import IGNORED_LABEL
from titan.data.loader import PackedRows


class HeldOutRows(Dataset[tuple[np.ndarray, ...]]):
    """The first rows of a held-out set, and behind them rows that count nothing.

    Args:
        rows: The set.
        limit: How many rows to take; -1 takes all, and so does more than there are.
    """

    def __init__(self, rows: PackedRows, limit: int = -1) -> None:
        self.rows = rows
        self.count = len(rows) if limit == -1 else min(limit, len(rows))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[np.ndarray, ...]:
        if row < self.count:
            return self.rows[row]
        inputs, labels, *rest = self.rows[0]
        return (inputs, np.full_like(labels, IGNORED_LABEL), *rest)

    def text_bytes(self, tokens: int, is_learned_whole: bool = True) -> float:
        """Return the bytes of text behind so many predicted tokens.

        Of the whole set they are known. Of a part of it, and where only some tokens of a document count, they are the
        tokens times the set's mean bytes a token.
        """
        packed = self.rows.packed
        if self.count == len(self.rows) and is_learned_whole:
            return packed.text_bytes
        return tokens * packed.text_bytes / max(1, packed.tokens)


@dataclass(frozen=True)
class Rounds:
    """What one data rank takes of every round; a round is a micro-batch on each data rank."""

    rows: int
    local_batch_size: int
    data_rank: int
    data_ranks: int

    def __len__(self) -> int:
        return -(-self.rows // (self.local_batch_size * self.data_ranks))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the rows of this rank's one micro-batch in a round; numbers beyond the set are to count nothing."""
        first = (step * self.data_ranks + self.data_rank) * self.local_batch_size
        return [list(range(first, first + self.local_batch_size))]
