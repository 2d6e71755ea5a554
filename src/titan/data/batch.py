"""Which rows make up step t: a function of (seed, t) and of nothing else.

Row r of the data is tokens[r*S : r*S + S + 1]: S inputs and, shifted by one, S labels. Rows are visited in the order of
a permutation that is new in every epoch. Position p of the endless sequence of rows is row permute(p mod n) of
epoch p div n, and step t takes the positions from t*G to (t+1)*G. How many ranks, workers or micro-batches share
them out does not enter, so a run can go on with another number of each and sees exactly the rows that it would have
seen.

The permutation is a small cipher (a Feistel network) on the row numbers: it needs no memory and any row of any
step is found at once, where shuffling an index of n rows would cost n numbers in every rank.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from titan.data.packing import TokenFile

IGNORED_LABEL = -100
"""The label of a position that does not count in the loss; PyTorch's default."""
_ROUNDS = 6


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return where each position of [0, size) goes under the permutation that `key` names.

    Args:
        positions: Any of 0 .. size - 1.
        size: How many there are.
        key: 64 bits; every key gives another order.

    Shape:
        (N,) int64 -> (N,) int64.

    Source:
        Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002: a Feistel network on the next even power of
        two, walked along until it lands inside.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    out = np.empty(len(positions), dtype=np.uint64)
    values = positions.astype(np.uint64)
    todo = np.arange(len(positions))
    while len(todo):
        left, right = values >> np.uint64(half_bits), values & mask
        for index in range(_ROUNDS):
            left, right = right, left ^ (_mix(right, key, index) & mask)
        values = (left << np.uint64(half_bits)) | right
        inside = values < size
        out[todo[inside]] = values[inside]
        todo, values = todo[~inside], values[~inside]
    return out.astype(np.int64)


@dataclass(frozen=True)
class RowOrder:
    """The endless order in which rows are visited."""

    rows: int
    """Rows in the data."""
    global_batch_size: int
    """Rows of a step."""
    seed: int

    def rows_of_step(self, step: int) -> np.ndarray:
        """Return the rows of a step, counted from 0. Shape: (global_batch_size,), int64."""
        start = step * self.global_batch_size
        return self.rows_at(np.arange(start, start + self.global_batch_size))

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at some positions of the endless order. Shape: (N,) int64 -> (N,) int64."""
        out = np.empty_like(positions)
        epochs, offsets = np.divmod(positions, self.rows)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = permute(offsets[chosen], self.rows, self._key(int(epoch)))
        return out

    def _key(self, epoch: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()[:8], "little")


def count_rows(tokens: int, seq_len: int) -> int:
    """Return how many rows the tokens make; every token but the first is the label of exactly one position."""
    return max(1, -(-(tokens - 1) // seq_len))


def read_row(tokens: np.ndarray | TokenFile, row: int, seq_len: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a row's inputs and labels; past the end of the data come padding and labels that do not count.

    Shape:
        tokens: (N,). Returns two of (seq_len,), int64.
    """
    piece = tokens[row * seq_len : row * seq_len + seq_len + 1].astype(np.int64)
    inputs = np.full(seq_len, padding, dtype=np.int64)
    labels = np.full(seq_len, IGNORED_LABEL, dtype=np.int64)
    inputs[: min(len(piece), seq_len)] = piece[:seq_len]
    labels[: len(piece) - 1] = piece[1:]
    return inputs, labels


def find_starts(inputs: np.ndarray, document_start: int) -> np.ndarray:
    """Return where in the row the document of each token begins; 0 for one that began in an earlier row.

    Shape:
        (S,) int64 -> (S,) int64.
    """
    positions = np.arange(len(inputs))
    return np.maximum.accumulate(np.where(inputs == document_start, positions, 0))


def _mix(values: np.ndarray, key: int, index: int) -> np.ndarray:
    # splitmix64's finaliser, keyed; wrap-around is meant
    with np.errstate(over="ignore"):
        z = values + np.uint64((key + 0x9E3779B97F4A7C15 * (index + 1)) % (1 << 64))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
