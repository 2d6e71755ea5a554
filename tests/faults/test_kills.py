"""Kills, stops and damage, one after the other in one run: it ends as the run that nothing disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from random import Random

import pytest

from tests.faults import cases
from tests.faults.cases import Case, Moment
from tests.faults.conftest import INTERVAL, MakeReference, MakeRun
from tests.faults.damage import DAMAGES, put_foreign
from tests.faults.supervisor import Run
from tests.support.command import Started, processes_with, wait_until
from titan.checkpoint.manifest import step_folder

ROUNDS = range(int(os.environ.get("FAULT_ROUNDS", "1")))


def strike(run: Run, case: Case) -> None:
    """Let a fault strike at a moment drawn from the seed."""
    moment = Moment(run.draw, run.newest(), INTERVAL, run.reference.shard_bytes)
    run.survive(case.name, case.plant(moment), case.codes, lost_steps=0 if case.codes == cases.STOPPED else None)


def marathon(run: Run, faults: list[Case], damages: list[str]) -> None:
    """Start a run again after each of some faults, and damage its newest checkpoint in between, until all is done."""
    rest = list(damages)
    for case in faults:
        if rest and len(run.whole_steps()) > 1:
            name = rest.pop()
            run.damage_newest(name, DAMAGES[name])
        strike(run, case)
    assert not rest, "too few faults to make checkpoints in between"
    run.complete()


def shuffled(draw: Random, first: Case, *others: Case) -> list[Case]:
    """Return cases in an order drawn from the seed, but for the first: until it there is nothing to load."""
    return [first, *draw.sample(others, len(others))]


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", ROUNDS)
def test_killed_while_saves_make_it_wait(
    make_run: MakeRun, undisturbed: MakeReference, draw: Random, number: int
) -> None:
    """With checkpoint=sync: a kill at any point of a step, of a save or of a load, and damage between the attempts."""
    faults = shuffled(draw, *cases.STEP, *cases.SAVE, *cases.LOAD)
    marathon(make_run(undisturbed(), "checkpoint=sync"), faults, list(DAMAGES))


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", ROUNDS)
@pytest.mark.parametrize("mode", cases.BACKGROUND)
def test_killed_while_it_saves_in_the_background(
    make_run: MakeRun, undisturbed: MakeReference, draw: Random, number: int, mode: str
) -> None:
    """With saves in the background: a kill in the midst of one costs what has been done since the one before."""
    run = make_run(undisturbed(), f"checkpoint={mode}", lost_intervals=2)
    marathon(run, shuffled(draw, *cases.BACKGROUND[mode]), draw.sample(list(DAMAGES), 2))


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", ROUNDS)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_told_to_stop(make_run: MakeRun, undisturbed: MakeReference, draw: Random, number: int, mode: str) -> None:
    """However it is told to stop, no step is lost; and a rank that dies of it costs what any crash costs."""
    run = make_run(undisturbed(), f"checkpoint={mode}", lost_intervals=2 if mode == "async" else 1)
    half = cases.STOP[::2] if mode == "sync" else cases.STOP[1::2]
    marathon(run, shuffled(draw, *half), [])


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", ROUNDS)
def test_killed_or_stopped_while_it_validates(
    make_run: MakeRun, undisturbed: MakeReference, draw: Random, here: Path, number: int
) -> None:
    """A validation costs no step, for it comes after the save; it is done once, by the attempt that goes on."""
    held_out = here / "held_out.txt"
    held_out.write_text("the lazy dog sleeps\n" * 60)  # 38 rows of 32: ten rounds of two ranks' two, in three parts
    words = ["validation=text", f"validation.data.path={held_out}", f"validation.interval={INTERVAL}"]
    reference = undisturbed(39, *words)  # at most six steps an attempt, and nine the first
    run = make_run(reference, "checkpoint=sync", *words)
    for case in shuffled(draw, *cases.VALIDATION):
        moment = Moment(run.draw, run.newest(), INTERVAL, run.reference.shard_bytes)
        run.survive(case.name, case.plant(moment), case.codes, lost_steps=0)
    run.complete()


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", ROUNDS)
def test_killed_at_any_time(make_run: MakeRun, undisturbed: MakeReference, draw: Random, number: int) -> None:
    """A kill of any of its processes after any time: while it starts, while it loads, wherever that is."""
    run = make_run(undisturbed(), "checkpoint=async", lost_intervals=2)
    for _ in range(4):
        seconds = draw.uniform(0.5, 9.0)

        def kill_any(process: Started, seconds: float = seconds) -> None:
            time.sleep(seconds)
            wait_until(lambda: bool(processes_with(process.mark)), "a process")
            os.kill(draw.choice(sorted(processes_with(process.mark))), signal.SIGKILL)

        run.survive("SIGKILL of any process at any time", "slow:0:0.1", (1, -9), kill_any)
    run.complete()


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_checkpoints_that_cannot_be_used(make_run: MakeRun, undisturbed: MakeReference, here: Path) -> None:
    """Another run's checkpoint as the newest is set aside. With none left the run ends with 66, and stays there.

    Put back from a copy, they are good again.
    """
    run = make_run(undisturbed(), "checkpoint=sync")
    strike(run, cases.STEP[0])
    newest, before = run.newest(), run.rows()
    put_foreign(run.checkpoints, run.reference.checkpoint(newest + INTERVAL))
    run.report.add("another run's checkpoint is put in as the newest", None, 0, f"step {newest + INTERVAL}")
    run.survive("SIGKILL of a rank while it loads", "kill:1:loaded:1")
    assert (run.checkpoints / f"foreign_step_{newest + INTERVAL:08d}").is_dir()

    kept = here / "kept"
    shutil.copytree(run.checkpoints, kept)
    for step in run.whole_steps():
        DAMAGES["a bit is flipped in a shard"](step_folder(run.checkpoints, step), run.draw)
    run.report.add("all checkpoints are damaged: refused with 66, and again", 66, 0, "")
    for _ in range(2):
        attempt = run.attempt(codes=(66,))
        assert "no usable checkpoint" in attempt.finished.err
        assert run.rows() == before, "nothing was trained"
    shutil.rmtree(run.checkpoints)
    kept.rename(run.checkpoints)
    run.complete()
