"""Which rows make up step t: a function of (seed, t) and of nothing else.

Rows are visited in the order of a permutation that is new in every epoch. Position p of the endless sequence of rows
is row permute(p mod n) of epoch p div n, and step t takes the positions from t*G to (t+1)*G. How many ranks, workers or
micro-batches share them out does not enter, so a run can go on with another number of each and sees exactly the rows
that it would have seen.

The permutation is a small cipher (a Feistel network) on the row numbers: it needs no memory and any row of any
step is found at once, where shuffling an index of n rows would cost n numbers in every rank.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

IGNORED_LABEL = -100
"""The label of a position that does not count in the loss; PyTorch's default."""
_ROUNDS = 6
_ONE = 1 << 32


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


class Order(ABC):
    """The endless order in which rows are visited."""

    global_batch_size: int
    """Rows of a step."""

    def rows_of_step(self, step: int) -> np.ndarray:
        """Return the rows of a step, counted from 0. Shape: (global_batch_size,), int64."""
        start = step * self.global_batch_size
        return self.rows_at(np.arange(start, start + self.global_batch_size))

    @abstractmethod
    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at some positions of the endless order. Shape: (N,) int64 -> (N,) int64."""


@dataclass(frozen=True)
class RowOrder(Order):
    """The endless order in which the rows of one source are visited."""

    rows: int
    """Rows in the data."""
    global_batch_size: int
    seed: int
    name: str = ""
    """Of the mixture's component, which gives it an order of its own."""

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at some positions of the endless order. Shape: (N,) int64 -> (N,) int64."""
        out = np.empty_like(positions)
        epochs, offsets = np.divmod(positions, self.rows)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = permute(offsets[chosen], self.rows, self._key(int(epoch)))
        return out

    def _key(self, epoch: int) -> int:
        name = f"{self.seed}/{self.name}/{epoch}" if self.name else f"{self.seed}/{epoch}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


@dataclass(frozen=True)
class MixtureOrder(Order):
    """The endless order in which the rows of several components are visited, each by its share.

    Position p is the heaviest component's if floor((p + 1) * w) is above floor(p * w), w being its share; the positions
    that are left go to the others in the same way, by their shares of what is left. So at every position p each
    component has had its share of the p rows so far, to less than the number of components, and each position's is
    found without looking at any other. A component's rows follow its own order, through epochs of its own.

    The rows of all components are numbered one component after the other.
    """

    components: tuple[RowOrder, ...]
    weights: tuple[float, ...]
    """Of any sum."""
    global_batch_size: int

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at some positions of the endless order. Shape: (N,) int64 -> (N,) int64."""
        out = np.empty_like(positions)
        components, turns = self.components_at(positions)
        first = 0
        for index, order in enumerate(self.components):
            chosen = components == index
            if chosen.any():
                out[chosen] = first + order.rows_at(turns[chosen])
            first += order.rows
        return out

    def components_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return whose each position is, and which of that component's own positions.

        Shape:
            (N,) int64 -> two of (N,) int64.
        """
        components, turns = np.empty_like(positions), np.empty_like(positions)
        todo, left = np.arange(len(positions)), positions.astype(np.uint64)
        for index, share in self._splits():
            before, after = _multiply(left, share), _multiply(left + np.uint64(1), share)
            mine = after > before
            components[todo[mine]], turns[todo[mine]] = index, before[mine].astype(np.int64)
            todo, left = todo[~mine], (left - before)[~mine]
        return components, turns

    def counts_before(self, position: int) -> list[int]:
        """Return how many of the first positions are each component's."""
        counts, left = [0] * len(self.components), np.array([position], np.uint64)
        for index, share in self._splits():
            taken = _multiply(left, share)
            counts[index], left = int(taken[0]), left - taken
        return counts

    def _splits(self) -> list[tuple[int, int]]:
        """Return the components, the heaviest first, each with its share of what those before leave, in 2**-32."""
        order = sorted(range(len(self.weights)), key=lambda index: (-self.weights[index], self.components[index].name))
        order = [index for index in order if self.weights[index] > 0]
        splits = []
        for at, index in enumerate(order):
            left = math.fsum(self.weights[other] for other in order[at:])
            splits.append((index, round(self.weights[index] / left * _ONE)))
        return splits


def count_rows(tokens: int, seq_len: int) -> int:
    """Return how many rows the tokens make; every token but the first is the label of exactly one position."""
    return max(1, -(-(tokens - 1) // seq_len))


def _multiply(values: np.ndarray, share: int) -> np.ndarray:
    """Return floor(values * share / 2**32), exactly, where a product of floats would skip or repeat a row."""
    high, low = values >> np.uint64(32), values & np.uint64(_ONE - 1)
    return high * np.uint64(share) + ((low * np.uint64(share)) >> np.uint64(32))


def _mix(values: np.ndarray, key: int, index: int) -> np.ndarray:
    # splitmix64's finaliser, keyed; wrap-around is meant
    with np.errstate(over="ignore"):
        z = values + np.uint64((key + 0x9E3779B97F4A7C15 * (index + 1)) % (1 << 64))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
