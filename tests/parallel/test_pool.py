"""What the other tests rest on: a rank begins a job as if it had done nothing before, and none dies unheard."""

from __future__ import annotations

import os
import time
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


def test_ranks_that_do_nothing_hang_and_busy_ones_do_not(capfd: pytest.CaptureFixture[str]) -> None:
    """However slow the machine is; those that hang say where they are."""
    ranks = RankPool(2)
    try:
        ranks.run(os.getpid)
        assert ranks.run(keep_busy, patience=0.5) == [True, True]
        with pytest.raises(AssertionError, match=r"ranks \[1\] hang"):
            ranks.run(wait_on_rank_1, patience=0.5)
        assert "in wait_on_rank_1" in capfd.readouterr().err
        assert ranks.run(keep_busy, patience=0.5) == [True, True], "they were started anew"
    finally:
        ranks.close()


def keep_busy() -> bool:
    """Use a processor for some time."""
    begin = time.process_time()
    while time.process_time() - begin < 1.5:
        pass
    return True


def wait_on_rank_1() -> None:
    """Do nothing for long, on one rank."""
    if dist.get_rank() == 1:
        time.sleep(60)


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
