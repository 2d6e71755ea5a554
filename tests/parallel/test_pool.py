"""What the other tests rest on: a rank begins a job as if it had done nothing before, and none dies unheard."""

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


def count_groups() -> int:
    """Return how many gloo groups this rank has, as the threads tell that serve their connections."""
    return sum(path.read_text() == "gloo_tcp_loop\n" for path in THREADS.glob("*/comm"))


@pytest.mark.skipif(not THREADS.is_dir(), reason="native threads are counted where Linux lists them")
def test_a_job_leaves_no_group_behind(pools: Callable[[int], RankPool], packed_file: Path) -> None:
    """Nor one that only a cache of DTensor's or a cycle still refers to: the next job has its own and no other."""
    ranks, short = pools(2), ("training.steps=1", "model.n_layers=1")
    for layout in (mesh(tp=2), mesh(dp_shard=2), mesh(tp=2)):
        ranks.run(record_layout, 2, (*layout, *short), packed_file)
        assert ranks.run(count_groups) == [1, 1]


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
