"""Ranks that stand still, and two runs that want one directory."""

from __future__ import annotations

import pytest

from tests.faults.conftest import INTERVAL, SHORT, MakeReference, MakeRun
from tests.faults.supervisor import HANG_SECONDS
from tests.support.command import finish, kill_all, processes_with, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

LIMITS = (
    "fault_tolerance.step_timeout_seconds=6",
    "fault_tolerance.first_step_timeout_seconds=90",
    "fault_tolerance.save_timeout_seconds=10",
)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_rank_that_stands_still(make_run: MakeRun, undisturbed: MakeReference, mode: str) -> None:
    """In a step, in a save, or stopped by a signal: all end with 74, the rank is named, and the run goes on."""
    run = make_run(undisturbed(SHORT), f"checkpoint={mode}", *LIMITS, lost_intervals=1 if mode == "sync" else 2)
    rank, step = run.draw.randrange(2), run.draw.randrange(INTERVAL + 1, 2 * INTERVAL)
    byte = run.reference.shard_bytes + run.draw.randrange(run.reference.shard_bytes)
    action, name = ("sleep", "a rank hangs in a step") if mode == "sync" else ("stop", "SIGSTOP of a rank in a step")
    hung = run.survive(name, f"{action}:{rank}:step:{step}", (74,)).finished
    assert f"rank {rank} " in hung.err
    assert "Traceback" not in hung.text
    hung = run.survive(f"a rank hangs in a save, checkpoint={mode}", f"sleep:{1 - rank}:byte:{byte}", (74,)).finished
    assert f"rank {1 - rank} " in hung.err
    run.complete()


def test_two_at_once(make_run: MakeRun, undisturbed: MakeReference) -> None:
    """Two commands started at once in one directory: one is refused with 2, and the other is the undisturbed run.

    A third, while it trains, is refused too, before it starts a rank.
    """
    run = make_run(undisturbed(SHORT), "checkpoint=async")
    both = [run.start("slow:0:0.4") for _ in range(2)]
    try:
        wait_until(lambda: run.last_row() > INTERVAL, "some steps", HANG_SECONDS)
        third = finish(run.start())
        assert third.code == 2
        assert "is in use by" in third.err
        ended = [finish(process, HANG_SECONDS) for process in both]
        wait_until(lambda: not any(processes_with(process.mark) for process in both), "the end of all processes")
    finally:
        for process in both:
            kill_all(process)
            process.communicate()
    assert sorted(each.code for each in ended) == [0, 2], [each.text for each in ended]
    assert "is in use by" in max(ended, key=lambda each: each.code).err
    for when in ("at once", "while it trains"):
        run.report.add("a second run is started in the same directory: refused with 2", 2, 0, when)
    run.expect_end()
