"""Which rows make up a step, of one source and of several."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan.data.batch import MixtureOrder, RowOrder, permute


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
def mixture(weights: list[float], sizes: list[int], batch: int = 4, seed: int = 7) -> MixtureOrder:
    """Return the order of components called a, b, c and so on."""
    orders = [RowOrder(size, batch, seed, chr(97 + index)) for index, size in enumerate(sizes)]
    return MixtureOrder(tuple(orders), tuple(weights), batch)


WEIGHTS = st.lists(st.floats(0.001, 100), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(0, 10**9))
@settings(deadline=None)
def test_shares_hold_at_every_scale(weights: list[float], start: int) -> None:
    """In the first p rows, for any p, each component is off its share by less than the number of components."""
    order = mixture(weights, [10] * len(weights))
    counts = np.array(order.counts_before(start))
    shares = np.array(weights) / sum(weights)
    of, _ = order.components_at(np.arange(start, start + 200))
    for position, component in enumerate(of.tolist(), start):
        assert np.abs(counts - shares * position).max() < max(1, len(weights) - 1) + 0.3
        counts[component] += 1
    assert counts.tolist() == order.counts_before(start + 200)


@given(WEIGHTS, st.integers(0, 2**40))
@settings(deadline=None)
def test_a_component_takes_its_rows_in_turn(weights: list[float], start: int) -> None:
    """Each component's positions are numbered without a gap, however far on one begins to look."""
    order = mixture(weights, [10] * len(weights))
    turns = order.counts_before(start)
    of, found = order.components_at(np.arange(start, start + 100))
    for component, turn in zip(of.tolist(), found.tolist(), strict=True):
        assert turn == turns[component]
        turns[component] += 1


def test_each_component_of_a_mixture_has_epochs_of_its_own() -> None:
    """A component's rows come as by its own order: each once an epoch, in another order every time."""
    order = mixture([0.7, 0.3], [50, 9])
    rows = order.rows_at(np.arange(1000))
    small = rows[rows >= 50] - 50
    assert small.tolist() == order.components[1].rows_at(np.arange(len(small))).tolist()
    epochs = small[: len(small) // 9 * 9].reshape(-1, 9)
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 20


def test_components_of_the_same_size_are_in_different_orders() -> None:
    """The name enters the order, so two sources of one size do not go through it in step."""
    order = mixture([1, 1], [64, 64])
    first, second = (component.rows_at(np.arange(64)).tolist() for component in order.components)
    assert first != second


def test_the_order_of_a_mixture_does_not_depend_on_where_one_begins() -> None:
    """A step's rows are the same asked for alone, or with all that come before it."""
    order = mixture([5, 2, 1], [30, 20, 10])
    together = order.rows_at(np.arange(400)).reshape(-1, 4)
    assert all(order.rows_of_step(step).tolist() == together[step].tolist() for step in range(100))


def test_a_component_without_weight_is_left_out() -> None:
    """A weight of 0 takes no row, and one alone takes all."""
    order = mixture([0, 3], [10, 10])
    assert set(order.components_at(np.arange(500))[0].tolist()) == {1}
