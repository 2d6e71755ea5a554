"""A finite set of rows: each once on any number of data ranks, and what it is filled up with counts nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from titan.data.held_out import HeldOutRows, Rounds
from titan.data.loader import PackedRows, build_loader
from titan.data.packing import PackedTokens

TOKENS, SEQ_LEN = 103, 10


@pytest.fixture
def rows(tmp_path: Path) -> PackedRows:
    """Eleven rows of ten, the last one almost all padding; of 206 bytes of text."""
    path = tmp_path / "tokens.bin"
    np.arange(TOKENS, dtype=np.uint16).tofile(path)
    return PackedRows(PackedTokens(path, TOKENS, 1, 206, {}, TOKENS, 256), SEQ_LEN, padding=0, document_start=50)


@pytest.mark.parametrize("data_ranks", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("local_batch_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [-1, 1, 7, 99])
def test_every_row_comes_once_and_every_rank_takes_part_in_every_round(
    rows: PackedRows, data_ranks: int, local_batch_size: int, limit: int
) -> None:
    """All ranks together see the labels of the first rows once, in order; all have as many micro-batches."""
    held_out = HeldOutRows(rows, limit)
    shares = [Rounds(len(held_out), local_batch_size, rank, data_ranks) for rank in range(data_ranks)]
    loaded = [list(build_loader(held_out, share, 0, len(share))) for share in shares]
    assert len({len(batches) for batches in loaded}) == 1
    by_round = [batch for together in zip(*loaded, strict=True) for batch in together]
    seen = np.concatenate([batch.labels.numpy() for batch in by_round])
    assert all(batch.tokens.shape == batch.labels.shape == (local_batch_size, SEQ_LEN) for batch in by_round)
    assert all(batch.starts is not None for batch in by_round)
    last = min(TOKENS - 1, (11 if limit == -1 else limit) * SEQ_LEN)
    assert seen[seen != -100].tolist() == list(range(1, last + 1))
    assert len(loaded[0]) * data_ranks * local_batch_size - len(held_out) < data_ranks * local_batch_size


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(rows: PackedRows, workers: int) -> None:
    """The same micro-batches in the same order, however many processes read them."""
    held_out, share = HeldOutRows(rows), Rounds(11, 2, 1, 2)
    found = [
        [(batch.tokens.tolist(), batch.labels.tolist()) for batch in build_loader(held_out, share, 0, 3, number)]
        for number in (0, workers)
    ]
    assert found[0] == found[1]


def test_bytes_are_those_of_the_whole_or_the_tokens_share(rows: PackedRows) -> None:
    """Of the whole set exact; of some rows, or where only answers are learned, by the set's bytes a token."""
    assert HeldOutRows(rows).text_bytes(102) == 206
    assert HeldOutRows(rows, 99).text_bytes(102) == 206
    assert HeldOutRows(rows, 5).text_bytes(50) == pytest.approx(50 * 206 / 103)
    assert HeldOutRows(rows).text_bytes(40, is_learned_whole=False) == pytest.approx(40 * 206 / 103)
