"""A finite set of rows: each once on any number of data ranks, and what it is filled up with counts nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from titan.data.held_out import HeldOutRows, InOrder
from titan.data.loader import Batch, Share, build_loader
from titan.data.prepared import write_documents
from titan.data.rows import PreparedRows

TOKENS, SEQ_LEN = 103, 10


@pytest.fixture
def rows(tmp_path: Path) -> PreparedRows:
    """Eleven rows of ten, the last one almost all padding; of two documents."""
    tokens = np.arange(TOKENS, dtype=np.uint32)
    prepared = write_documents(tmp_path / "prepared", [tokens[:50], tokens[50:]], 256)
    return PreparedRows(prepared, SEQ_LEN, 0, None, mask_documents=True)


def load(rows: HeldOutRows, local_batch_size: int, rank: int, data_ranks: int, workers: int = 0) -> list[Batch]:
    """Return a rank's micro-batches, one of each round."""
    share = Share(local_batch_size * data_ranks, local_batch_size, rank, data_ranks)
    rounds = -(-len(rows) // share.global_batch_size)
    steps = list(build_loader(rows, InOrder(share.global_batch_size), share, 0, 0, rounds, workers))
    assert [len(step.batches) for step in steps] == [1] * rounds
    return [step.batches[0] for step in steps]


@pytest.mark.parametrize("data_ranks", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("local_batch_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [-1, 1, 7, 99])
def test_every_row_comes_once_and_every_rank_takes_part_in_every_round(
    rows: PreparedRows, data_ranks: int, local_batch_size: int, limit: int
) -> None:
    """All ranks together see the labels of the first rows once, in order; all have as many micro-batches."""
    held_out = HeldOutRows(rows, limit)
    loaded = [load(held_out, local_batch_size, rank, data_ranks) for rank in range(data_ranks)]
    assert len({len(batches) for batches in loaded}) == 1
    by_round = [batch for together in zip(*loaded, strict=True) for batch in together]
    seen = np.concatenate([batch.labels.numpy() for batch in by_round])
    assert all(batch.tokens.shape == batch.labels.shape == (local_batch_size, SEQ_LEN) for batch in by_round)
    assert all(batch.starts is not None for batch in by_round)
    last = min(TOKENS - 1, (11 if limit == -1 else limit) * SEQ_LEN)
    assert seen[seen != -100].tolist() == list(range(1, last + 1))
    assert len(loaded[0]) * data_ranks * local_batch_size - len(held_out) < data_ranks * local_batch_size


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(rows: PreparedRows, workers: int) -> None:
    """The same micro-batches in the same order, however many processes read them."""
    found = [
        [(batch.tokens.tolist(), batch.labels.tolist()) for batch in load(HeldOutRows(rows), 2, 1, 2, number)]
        for number in (0, workers)
    ]
    assert found[0] == found[1]


def test_bytes_are_those_of_the_whole_or_the_tokens_share(rows: PreparedRows) -> None:
    """Of the whole set exact; of some rows, or where only answers are learned, by the set's bytes a token."""
    whole = rows.text_bytes
    assert whole > 0
    assert HeldOutRows(rows).text_bytes(102) == whole
    assert HeldOutRows(rows, 99).text_bytes(102) == whole
    assert HeldOutRows(rows, 5).text_bytes(50) == pytest.approx(50 * whole / 103)
    assert HeldOutRows(rows).text_bytes(40, is_learned_whole=False) == pytest.approx(40 * whole / 103)
