"""What the other tests rest on: a rank begins a job as if it had done nothing before, and none dies unheard."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from . import pool
from .layouts import record_layout
from .matrix import mesh
from .pool import RankPool


def test_a_job_leaves_no_group_behind(packed_file: Path) -> None:
    """Nor one that only a cache of DTensor's or a cycle still refers to: the next job has its own and no other."""
    ranks, short = RankPool(2), ("training.steps=1", "model.n_layers=1")
    try:
        first = ranks.run(os.getpid)
        for layout in (mesh(tp=2), mesh(dp_shard=2), mesh(tp=2)):
            ranks.run(record_layout, 2, (*layout, *short), packed_file)
            assert ranks.run(pool.count_groups) == [1, 1]
        assert ranks.run(os.getpid) == first, "none had to be replaced"
    finally:
        ranks.close()


def test_ranks_that_keep_a_group_are_replaced() -> None:
    """As those do that have compiled: no later job meets what they keep."""
    ranks = RankPool(1)
    try:
        (first,) = ranks.run(os.getpid)
        ranks.run(keep_group)
        (second,) = ranks.run(os.getpid)
    finally:
        ranks.close()
    assert first != second


def keep_group() -> None:
    """Leave a reference to this job's group."""
    _kept.append(dist.distributed_c10d._get_default_group())


_kept: list[dist.ProcessGroup] = []


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
