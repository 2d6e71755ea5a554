"""Best fit: every prediction once, whole documents in one row, and the rows that a plain search finds."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from titan.data.packing import Segment, pack_best_fit, windows

LENGTHS = st.lists(st.integers(0, 60), max_size=60)


def naive(lengths: list[int], seq_len: int) -> list[list[Segment]]:
    """Pack by looking at every row: the longest piece first, into the fullest row with room, the newest."""
    rows: list[list[Segment]] = []
    pieces: list[Segment] = []
    for document, length in enumerate(lengths):
        first, left = 0, max(0, length - 1)
        while left >= seq_len:
            rows.append([Segment(document, first, seq_len)])
            first, left = first + seq_len, left - seq_len
        if left:
            pieces.append(Segment(document, first, left))
    room = [0] * len(rows)
    opened = [-1] * len(rows)
    for turn, piece in enumerate(sorted(pieces, key=lambda piece: (-piece.length, piece.document))):
        fitting = [index for index in range(len(rows)) if room[index] >= piece.length]
        if fitting:
            best = min(fitting, key=lambda index: (room[index], -opened[index]))
        else:
            best = len(rows)
            rows.append([])
            room.append(seq_len)
            opened.append(turn)
        rows[best].append(piece)
        room[best] -= piece.length
        opened[best] = turn
    return rows


@given(LENGTHS, st.integers(1, 40))
@settings(deadline=None)
def test_rows_are_those_of_a_plain_search(lengths: list[int], seq_len: int) -> None:
    """The set of bits finds the same row for every piece as looking at all of them does."""
    assert pack_best_fit(lengths, seq_len) == naive(lengths, seq_len)


@given(LENGTHS, st.integers(1, 40))
@settings(deadline=None)
def test_every_prediction_is_made_once(lengths: list[int], seq_len: int) -> None:
    """Token i of a document predicts token i + 1 in exactly one row, for all but the last token; no row overflows."""
    rows = pack_best_fit(lengths, seq_len)
    made = sorted((s.document, s.first + i) for row in rows for s in row for i in range(s.length))
    assert made == [(document, i) for document, length in enumerate(lengths) for i in range(length - 1)]
    assert all(0 < sum(segment.length for segment in row) <= seq_len for row in rows)


@given(LENGTHS, st.integers(1, 40))
@settings(deadline=None)
def test_only_documents_longer_than_a_row_are_cut(lengths: list[int], seq_len: int) -> None:
    """A document of at most a row's predictions is one segment; a longer one is whole rows and a rest."""
    segments = [segment for row in pack_best_fit(lengths, seq_len) for segment in row]
    for document, length in enumerate(lengths):
        found = sorted(segment.length for segment in segments if segment.document == document)
        assert len(found) == -(-max(0, length - 1) // seq_len)
        assert all(each == seq_len for each in found[1:])


def test_many_documents_leave_little_room() -> None:
    """With many documents the padding is a small share, and far below that of the order as it comes."""
    lengths = np.random.default_rng(0).integers(2, 1500, 20_000)
    rows = pack_best_fit(lengths, 2048)
    assert 1 - (lengths - 1).sum() / (len(rows) * 2048) < 0.005


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=9), st.integers(1, 7))
@settings(deadline=None)
def test_windows_hold_all_documents_in_order(pieces: list[list[int]], size: int) -> None:
    """Windows are of one size but for the last, and are what came, however it came in pieces."""
    found = list(windows((np.array(piece, np.int64) for piece in pieces), size))
    flat = [length for piece in pieces for length in piece]
    assert [length for _, window in found for length in window.tolist()] == flat
    assert [first for first, _ in found] == list(range(0, len(flat), size))
