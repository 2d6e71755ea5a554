"""How documents become rows: cut where a row ends, or packed so that hardly any is cut.

A document of n tokens makes n - 1 predictions and takes as many positions: token i is the input at one, token i + 1 its
label. Best fit keeps a document in one row. One with more predictions than a row has positions is cut into pieces of a
whole row, and the rest; a piece begins with the token that the one before predicted last, so none is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

WINDOW_DOCUMENTS = 1 << 15
"""So many documents are packed together; more would fill rows better by less and less."""


class Segment(NamedTuple):
    """A piece of a document in a row."""

    document: int
    """Which."""
    first: int
    """Its first token here, as an input."""
    length: int
    """Positions that it takes; its last label is token first + length."""


def pack_best_fit(lengths: Sequence[int] | np.ndarray, seq_len: int) -> list[list[Segment]]:
    """Pack documents into rows: the longest first, each where it leaves the least room.

    Args:
        lengths: Tokens of every document.
        seq_len: Positions of a row.

    Returns:
        The segments of every row. Documents of fewer than two tokens predict nothing and are in none.

    Source:
        Ding et al., Fewer Truncations Improve Language Modeling, 2024, https://arxiv.org/abs/2404.10830: best-fit
        packing with the room that is left as the key, here as a set of bits.
    """
    rows: list[list[Segment]] = []
    pieces = []
    for document, length in enumerate(np.asarray(lengths).tolist()):
        whole, rest = divmod(length - 1, seq_len) if length > 1 else (0, 0)
        rows += [[Segment(document, seq_len * piece, seq_len)] for piece in range(whole)]
        if rest:
            pieces.append(Segment(document, seq_len * whole, rest))
    pieces.sort(key=lambda piece: -piece.length)  # stable: equal ones stay in order
    open_rows: list[list[list[Segment]]] = [[] for _ in range(seq_len)]  # by the room they have
    rooms = 0  # bit n: some row has room for n
    for piece in pieces:
        fitting = rooms >> piece.length
        if fitting:
            room = piece.length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, []
            rows.append(row)
        row.append(piece)
        if left := room - piece.length:
            open_rows[left].append(row)
            rooms |= 1 << left
    return rows


def windows(lengths: Iterable[np.ndarray], size: int = WINDOW_DOCUMENTS) -> Iterable[tuple[int, np.ndarray]]:
    """Yield the lengths of `size` documents at a time, and the number of the first of them.

    Args:
        lengths: Of all documents, in pieces of any size.
        size: Documents of a window; the last may have fewer.
    """
    first, kept = 0, np.empty(0, np.int64)
    for more in lengths:
        kept = np.concatenate((kept, more))
        while len(kept) >= size:
            yield first, kept[:size]
            first, kept = first + size, kept[size:]
    if len(kept):
        yield first, kept
