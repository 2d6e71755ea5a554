"""Which rows make up a step, and what a row holds."""

from __future__ import annotations

import numpy as np
import pytest

from titan.data.batch import IGNORED_LABEL, RowOrder, count_rows, permute, read_row

PADDING = 9999


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_a_permutation_hits_every_row_once_at_any_size(key: int) -> None:
    """For every size from 1 to 300, and around powers of two, positions go to each row exactly once."""
    sizes = [*range(1, 301), 1023, 1024, 1025, 4095, 4097, 65_535, 65_537, 100_003]
    for size in sizes:
        rows = permute(np.arange(size), size, key)
        assert rows.dtype == np.int64
        assert np.array_equal(np.sort(rows), np.arange(size)), size


def test_any_row_is_found_at_once_and_alone() -> None:
    """A position goes to the same row whether it is asked for alone, in another order, or with all others."""
    size, key = 10_007, 12345
    whole = permute(np.arange(size), size, key)
    some = np.array([7, 0, 10_006, 5000, 7])
    assert np.array_equal(permute(some, size, key), whole[some])
    for position in some:
        assert permute(np.array([position]), size, key)[0] == whole[position]
    assert len(permute(np.array([], dtype=np.int64), size, key)) == 0


def test_a_permutation_of_more_rows_than_any_memory_holds() -> None:
    """Ten to the fifteenth rows cost no more than a thousand, and none is met twice."""
    size = 10**15
    rows = permute(np.arange(10_000), size, 1)
    assert len(np.unique(rows)) == 10_000
    assert rows.min() >= 0
    assert rows.max() < size
    assert rows.mean() == pytest.approx(size / 2, rel=0.05)


def test_a_permutation_mixes() -> None:
    """The order has no trace of the rows' own: no correlation, no neighbours left together, few fixed points."""
    size = 20_000
    for key in range(5):
        rows = permute(np.arange(size), size, key)
        assert abs(np.corrcoef(rows, np.arange(size))[0, 1]) < 0.03
        assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.03
        assert (np.abs(np.diff(rows)) == 1).sum() < 20
        assert (rows == np.arange(size)).sum() < 10
        thousands = np.histogram(rows[: size // 4], bins=20, range=(0, size))[0]
        assert thousands.min() > 180
        assert thousands.max() < 320


def test_every_key_gives_another_order() -> None:
    """Different keys share hardly a position."""
    orders = [permute(np.arange(1000), 1000, key) for key in range(20)]
    for first in range(20):
        for second in range(first):
            assert (orders[first] == orders[second]).mean() < 0.02


@pytest.mark.parametrize("batch", [1, 3, 10, 37, 100])
def test_an_epoch_visits_every_row_once(batch: int) -> None:
    """Steps end to end visit each of the rows once before any twice, also where batches do not divide the rows."""
    order = RowOrder(rows=37, global_batch_size=batch, seed=5)
    steps = -(-37 * 4 // batch)
    visited = np.concatenate([order.rows_of_step(step) for step in range(steps)])[: 37 * 4].reshape(4, 37)
    for epoch in visited:
        assert np.array_equal(np.sort(epoch), np.arange(37))
    assert len({tuple(epoch) for epoch in visited}) == 4, "every epoch has an order of its own"


def test_the_seed_decides_the_order() -> None:
    """The same seed gives the same order again, another gives another."""
    first = RowOrder(1000, 8, seed=0).rows_of_step(3)
    assert np.array_equal(RowOrder(1000, 8, seed=0).rows_of_step(3), first)
    assert not np.array_equal(RowOrder(1000, 8, seed=1).rows_of_step(3), first)


def test_the_batch_size_only_cuts_the_order() -> None:
    """Twice the rows a step are two steps of half as many, so a run's order does not hang on its batch size."""
    small, large = RowOrder(101, 4, 0), RowOrder(101, 8, 0)
    for step in range(60):
        halves = np.concatenate((small.rows_of_step(2 * step), small.rows_of_step(2 * step + 1)))
        assert np.array_equal(large.rows_of_step(step), halves)


def test_a_late_step_is_found_without_the_earlier_ones() -> None:
    """Step ten million is as quick as step 0, so resuming skips nothing."""
    order = RowOrder(rows=1_000_003, global_batch_size=512, seed=0)
    rows = order.rows_of_step(10_000_000)
    assert rows.shape == (512,)
    assert rows.min() >= 0
    assert rows.max() < 1_000_003


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 99, 100, 101])
@pytest.mark.parametrize("tokens", [2, 3, 16, 17, 33, 100, 101])
def test_every_token_but_the_first_is_a_label_once(tokens: int, seq_len: int) -> None:
    """Over all rows the labels that count are tokens 1 to N-1 in order, each behind the token before it."""
    data = np.arange(tokens, dtype=np.uint16)
    labels, inputs = [], []
    rows = count_rows(tokens, seq_len)
    for row in range(rows):
        row_inputs, row_labels = read_row(data, row, seq_len, PADDING)
        assert row_inputs.shape == row_labels.shape == (seq_len,)
        assert row_inputs.dtype == row_labels.dtype == np.int64
        counts = row_labels != IGNORED_LABEL
        assert counts.any(), "a row without a label would be waste"
        labels += row_labels[counts].tolist()
        inputs += row_inputs[counts].tolist()
    assert labels == list(range(1, tokens))
    assert inputs == list(range(tokens - 1))


def test_the_last_row_is_padded_and_its_padding_does_not_count() -> None:
    """Behind the last token come padding, which is a valid token, and labels that the loss ignores."""
    inputs, labels = read_row(np.arange(10, dtype=np.uint32), row=1, seq_len=6, padding=PADDING)
    assert inputs.tolist() == [6, 7, 8, 9, PADDING, PADDING]
    assert labels.tolist() == [7, 8, 9, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL]


def test_data_shorter_than_a_row_is_one_row() -> None:
    """Even two tokens can be trained on."""
    assert count_rows(2, 512) == 1
    inputs, labels = read_row(np.array([256, 257]), 0, 4, PADDING)
    assert inputs.tolist() == [256, 257, PADDING, PADDING]
    assert labels.tolist() == [257, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL]


def test_large_token_ids_survive() -> None:
    """Ids above 32,767 and above 65,535 are not taken for negative ones."""
    for dtype, largest in ((np.uint16, 65_535), (np.uint32, 128_255)):
        inputs, labels = read_row(np.array([largest, largest], dtype=dtype), 0, 1, PADDING)
        assert inputs.tolist() == labels.tolist() == [largest]
