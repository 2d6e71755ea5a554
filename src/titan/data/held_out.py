"""Every row of a finite set once, in its own order, on any number of data ranks.

Training goes on for ever and takes its rows at random; a held-out set is gone through from its first row to its last.
All ranks take part in every round, or those that have rows would wait for those that have none. So the last round is
filled up with rows in which no label counts: they cost time and change no sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan.data.batch import IGNORED_LABEL, Order
from titan.data.rows import Row, Rows


class HeldOutRows:
    """The first rows of a held-out set, and behind them rows that count nothing.

    Args:
        rows: The set.
        limit: How many rows to take; -1 takes all, and so does more than there are.
    """

    def __init__(self, rows: Rows, limit: int = -1) -> None:
        self.rows = rows
        self.count = len(rows) if limit == -1 else min(limit, len(rows))

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Sequence[int] | np.ndarray) -> Row:
        """Return some rows. Shape: (B, S) each."""
        wanted = np.asarray(rows)
        is_beyond = wanted >= self.count
        found = self.rows.read(np.where(is_beyond, 0, wanted))
        if not is_beyond.any():
            return found
        return found._replace(labels=np.where(is_beyond[:, None], IGNORED_LABEL, found.labels))

    def text_bytes(self, tokens: int, is_learned_whole: bool = True) -> float:
        """Return the bytes of text behind so many predicted tokens.

        Of the whole set they are known. Of a part of it, and where only some tokens of a document count, they are the
        tokens times the set's mean bytes a token.
        """
        if self.count == len(self.rows) and is_learned_whole:
            return self.rows.text_bytes
        return tokens * self.rows.text_bytes / max(1, self.rows.tokens)


@dataclass(frozen=True)
class InOrder(Order):
    """The order of a set that is gone through once: round by round, each of so many rows."""

    global_batch_size: int

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the positions themselves; numbers beyond the set are to count nothing."""
        return positions
