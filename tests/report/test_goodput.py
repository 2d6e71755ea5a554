"""Where the time went: the parts of every run add up to its wall time, and each is what was planted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from titan.report.goodput import PARTS, Goodput, account
from titan.report.runs import find_runs

from .made import BEGAN, at, eventful_run, training_row, write_run


def account_for(folder: Path, now: float = 0.0) -> Goodput:
    """Return where the time of the run in a folder went."""
    (run,) = find_runs([folder])
    found = account(run, BEGAN + now)
    assert found is not None
    assert set(found.seconds) == set(PARTS)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_seconds, abs=1e-6)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    return found


def test_each_second_is_accounted_for_once(tmp_path: Path) -> None:
    """A run with a queue, a kill, a spike, saves and validations: every part has the seconds that were planted."""
    found = account_for(eventful_run(tmp_path / "run", steps=600))
    steps = 600 - 8  # eight were left out at the spike
    assert found.attempts == 2
    planted = {
        "training": steps * 1.0,
        "data": steps * 0.05,
        "checkpoint": 6 * 4.0,
        "validation": 6 * 8.5,
        "starting": 30.0 + 25.0,
        "lost": 40.0 + 10.0,
        "stopped": 120.0,
        "other": 2.0,
    }
    assert found.seconds == pytest.approx(planted, abs=0.01)


def test_a_real_run_adds_up_too(trained: Path, tmp_path: Path) -> None:
    """A run of titan's own: no second is missing between its first event and its last."""
    found = account_for(Path(shutil.copytree(trained, tmp_path / "run")))
    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert found.seconds["starting"] > 0
    assert found.seconds["checkpoint"] > 0
    stepping = sum(row["step_seconds"] - row["data_seconds"] for row in rows)
    assert found.seconds["training"] == pytest.approx(stepping, abs=0.5)
    assert found.wall_seconds > 0
    assert events[-1]["event"] == "exit"


START = {"time": at(0), "event": "start", "ranks": 1, "attempt": 0}


@pytest.mark.parametrize(
    ("rows", "events", "wall"),
    [
        ([], [START], 0.0),
        ([], [START, {"time": at(7), "event": "exit", "code": 2}], 7.0),
        ([training_row(1, 5.0), training_row(2, 7.0)], [], 3.05),
        ([training_row(1, 5.0), training_row(2, 4.0)], [START], 5.0),
        ([training_row(1, 5.0, step_seconds=1e9, data_seconds=1e9), training_row(2, 6.0)], [START], 6.0),
        ([training_row(1, 5.0, data_seconds=None, time="noon"), training_row(2, 6.0)], [START], 6.0),
        ([training_row(9, 5.0)], [START, {"time": at(1), "event": "resume", "step": 8}, {"event": "save"}], 5.0),
        (
            [training_row(1, 2.0)],
            [START, {"time": at(3), "event": "exit", "code": 75}, START | {"time": at(60)}],
            60.0,
        ),
    ],
    ids=[
        *("nothing logged", "ended at once", "no events", "a clock that went back", "absurd numbers", "broken rows"),
        *("resumed", "put back into the queue"),
    ],
)
def test_it_adds_up_whatever_is_in_the_files(
    rows: list[dict[str, Any]], events: list[dict[str, Any]], wall: float, tmp_path: Path
) -> None:
    """No order and no number in the files makes a part negative, or the sum another than the wall time."""
    found = account_for(write_run(tmp_path / "run", rows, events, state="running"))
    assert found.wall_seconds == pytest.approx(wall, abs=1e-3)


def test_a_stop_in_order_and_a_crash_are_told_apart(tmp_path: Path) -> None:
    """Time between two starts is lost after a crash, and was only waited after a stop in order."""
    for code, part in ((75, "stopped"), (1, "lost")):
        events = [START, {"time": at(3), "event": "exit", "code": code}, START | {"time": at(63)}]
        found = account_for(write_run(tmp_path / str(code), [training_row(1, 2.0), training_row(2, 65.0)], events))
        assert found.seconds[part] >= 60.0


def test_nothing_is_said_where_no_time_is_known(tmp_path: Path) -> None:
    """Without events and rows there is no wall time."""
    (run,) = find_runs([write_run(tmp_path / "run", [])])
    assert account(run, BEGAN) is None
