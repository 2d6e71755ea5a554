"""Where a run's time went, from its first start to its end: every second once, so that the parts add up to the whole.

Taken from the times of metrics.jsonl and events.jsonl. An attempt begins with a start event. From there to its first
logged step is starting; between two logged steps each row says itself how long it waited for data and for checkpoints,
validations have rows of their own, and the rest is training. What a run has lost is not in metrics.jsonl any more,
because steps that are done again are dropped there: it is the time from the last step that was kept to the next start,
or to the spike at which the run went back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from titan.report.runs import Run

PARTS = {
    "training": "training",
    "data": "waiting for data",
    "checkpoint": "waiting for checkpoints",
    "validation": "validation",
    "starting": "starting: building, loading, resuming",
    "lost": "lost: steps done again, and waiting for the next start after a failure",
    "stopped": "stopped in order, or in the queue",
    "other": "other: ending, and what no file accounts for",
}
"""What the time can have gone into, in words."""

_IN_ORDER = (0, 75)
"""Exit codes of an attempt that lost nothing."""


@dataclass(frozen=True)
class Goodput:
    """Where the time went."""

    wall_seconds: float
    """From the first submission or start to the end, or until now."""
    seconds: dict[str, float]
    """By part, all of `PARTS`."""
    attempts: int
    """How often the run was started."""

    @property
    def share(self) -> float:
        """Training's share of all."""
        return self.seconds["training"] / self.wall_seconds if self.wall_seconds else 0.0


@dataclass
class _Attempt:
    began: float
    ended: float
    """The last that is known of it."""
    is_in_order: bool
    is_live: bool
    rows: list[tuple[float, dict[str, Any]]]
    events: list[tuple[float, dict[str, Any]]]


def account(run: Run, now: float) -> Goodput | None:
    """Return where a run's time went; None where nothing says when it was.

    Args:
        run: The run.
        now: In seconds; the end of one that still goes on.
    """
    rows, events = _timed(run.metrics), _timed(run.events)
    attempts = _attempts(run, rows, events, now)
    if not attempts:
        return None
    seconds = dict.fromkeys(PARTS, 0.0)
    first = min([at for at, event in events if event.get("event") == "submit"] + [attempts[0].began])
    seconds["stopped"] += attempts[0].began - first
    last_step = 0
    for attempt, following in itertools.zip_longest(attempts, attempts[1:]):
        last_step = _account_attempt(attempt, last_step, following is not None, seconds)
        if following is not None:
            seconds["stopped" if attempt.is_in_order else "lost"] += following.began - attempt.ended
    return Goodput(attempts[-1].ended - first, seconds, len(attempts))


def parse_time(text: object) -> float | None:
    """Return a time of titan's files in seconds, or None if it is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _timed(objects: Iterable[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Return objects with their times, which never go back, whatever the clock did."""
    found, latest = [], float("-inf")
    for each in objects:
        at = parse_time(each.get("time"))
        if at is not None:
            latest = max(latest, at)
            found.append((latest, each))
    return found


def _attempts(
    run: Run, rows: list[tuple[float, dict[str, Any]]], events: list[tuple[float, dict[str, Any]]], now: float
) -> list[_Attempt]:
    starts = [at for at, event in events if event.get("event") == "start"]
    if rows and (not starts or starts[0] > rows[0][0]):  # events.jsonl is not there, or not whole
        starts.insert(0, rows[0][0] - _seconds(rows[0][1], "step_seconds"))
    attempts = []
    for began, until in itertools.zip_longest(starts, starts[1:], fillvalue=float("inf")):
        mine = [(at, row) for at, row in rows if began <= at < until]
        happened = [(at, event) for at, event in events if began <= at < until]
        codes = [event.get("code") for _, event in happened if event.get("event") == "exit"]
        is_live = run.is_live and until == float("inf")
        ended = max([began, *(at for at, _ in mine), *(at for at, e in happened if e.get("event") != "submit")])
        if is_live:
            ended = max(ended, now)
        is_in_order = bool(codes) and all(code in _IN_ORDER for code in codes)
        attempts.append(_Attempt(began, ended, is_in_order or is_live, is_live, mine, happened))
    return attempts


def _account_attempt(attempt: _Attempt, last_step: int, is_followed: bool, seconds: dict[str, float]) -> int:
    """Add an attempt's time to the parts; returns the last step that it logged."""
    resumed = [event.get("step", 0) for _, event in attempt.events if event.get("event") == "resume"]
    step_before = resumed[0] if resumed else 0
    clock, is_first, last_row = attempt.began, True, attempt.began
    for at, row in attempt.rows:
        is_validation = "validation_loss" in row
        if is_first and not is_validation:  # what the first row covers began so long before it
            covered = _seconds(row, "step_seconds") * max(1, row["step"] - step_before)
            begin = max(clock, at - covered - _seconds(row, "checkpoint_seconds"))
            seconds["starting"] += begin - clock
            clock, is_first = begin, False
        left = at - clock
        if is_validation:
            took = min(left, _seconds(row, "validation_seconds"))
            seconds["validation"] += took
            left -= took
            clock = at - left  # what was before it belongs to the next row
            if is_first:
                seconds["starting"] += left
                clock = at
            continue
        for spiked, event in attempt.events:
            if event.get("event") == "spike" and event.get("action") == "rollback" and clock < spiked <= at:
                lost = min(left, spiked - clock)
                seconds["lost"] += lost
                left -= lost
                clock = spiked
        for part, key in (("checkpoint", "checkpoint_seconds"), ("data", "data_seconds")):
            took = min(left, _seconds(row, key))
            seconds[part] += took
            left -= took
        seconds["training"] += left
        clock = last_row = at
        last_step = row["step"]
    _account_end(attempt, clock, last_row, is_first, is_followed, seconds)
    return last_step


def _account_end(
    attempt: _Attempt, clock: float, last_row: float, is_first: bool, is_followed: bool, seconds: dict[str, float]
) -> None:
    """Add what comes after the last row of an attempt."""
    left = attempt.ended - clock
    if is_first and not attempt.rows:
        seconds["starting" if attempt.is_in_order else "lost"] += left
        return
    waited = sum(
        _seconds(event, "waited_seconds")
        for at, event in attempt.events
        if at > last_row and event.get("event") in ("save", "failed save")
    )
    took = min(left, waited)
    seconds["checkpoint"] += took
    left -= took
    if attempt.is_live:
        seconds["training"] += left  # steps that are not logged yet
    elif attempt.is_in_order or not is_followed:
        seconds["other"] += left
    else:
        seconds["lost"] += left


def _seconds(row: dict[str, Any], key: str) -> float:
    value = row.get(key)
    return max(0.0, float(value)) if isinstance(value, int | float) and value == value else 0.0
