"""The digest of a step's rows: the same however ranks, workers and micro-batches share them out.

Each row is hashed by itself, with its place in the global batch, where it is made; the digest of the step is the sum.
So each rank adds up what it has, in any order, and one number is all that has to travel.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash

from titan.data.batch import IGNORED_LABEL
from titan.data.rows import Row

_MODULUS = 1 << 64


def row_digest(index: int, row: Row) -> int:
    """Return the digest of a row: XXH3, 64 bits, of its index in the global batch, inputs, labels and starts.

    All as little-endian int64, one after the other; a row without starts has none.
    """
    digest = xxhash.xxh3_64(index.to_bytes(8, "little"))
    for part in (row.inputs, row.labels, row.starts):
        if part is not None:
            digest.update(np.ascontiguousarray(part, dtype="<i8").data)
    return digest.intdigest()


def step_digest(rows: Iterable[Row]) -> str:
    """Return the digest of a step from all its rows in the order of the global batch: 16 hexadecimal digits."""
    return format_digest(sum(row_digest(index, row) for index, row in enumerate(rows)))


def count_padding(rows: Row, padding: int) -> int:
    """Return how many positions at the ends of rows hold the padding token and predict nothing. Shape: (B, S) each."""
    is_padding = (rows.inputs == padding) & (rows.labels == IGNORED_LABEL)
    return int(np.logical_and.accumulate(is_padding[:, ::-1], axis=1).sum())


def format_digest(total: int) -> str:
    """Return a sum of rows' digests as 16 hexadecimal digits; sums of signed 64-bit numbers that wrapped round too."""
    return f"{total % _MODULUS:016x}"


def to_signed(total: int) -> int:
    """Return a sum of rows' digests as the signed 64-bit number with the same bits, as tensors have it."""
    total %= _MODULUS
    return total - _MODULUS if total >= _MODULUS // 2 else total
