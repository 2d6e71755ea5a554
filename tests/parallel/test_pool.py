"""What the other tests rest on: a rank that begins a job is as one that has done nothing before, and none dies unheard."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from . import pool
from .layouts import record_layout
from .matrix import mesh
from .pool import RankPool

THREADS = Path("/proc/self/task")


def count_threads() -> int:
    """Return how many threads this rank has, native ones too: a gloo group has several."""
    return len(list(THREADS.iterdir()))


@pytest.mark.skipif(not THREADS.is_dir(), reason="native threads are counted where Linux lists them")
def test_a_job_leaves_no_group_behind(pools: Callable[[int], RankPool], packed_file: Path) -> None:
    """Nor one that a cache of DTensor's or a cycle of references still knows: after some jobs there is not one more."""
    ranks, short = pools(2), ("training.steps=1", "model.n_layers=1")
    before = ranks.run(count_threads)
    for layout in (mesh(tp=2), mesh(dp_shard=2), mesh(tp=2)):
        ranks.run(record_layout, 2, (*layout, *short), packed_file)
        assert ranks.run(count_threads) == before


def test_a_rank_that_dies_says_where_and_ranks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """After some jobs the next has a new process; a signal is named, with the stacks of Python and of native code."""
    monkeypatch.setattr(pool, "JOBS_OF_A_PROCESS", 2)
    ranks = RankPool(1)
    try:
        (first,), (second,), (third,) = (ranks.run(os.getpid) for _ in range(3))
        assert first == second != third
        with pytest.raises(AssertionError, match="rank 0 died of SIGABRT"):
            ranks.run(os.abort)
    finally:
        ranks.close()
    said = capfd.readouterr().err
    assert "Fatal Python error: Aborted" in said
    assert "in _serve" in said
    assert "frame #1" in said
