"""The figures of a run that a page and a terminal both show, each with its words."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from titan.metrics.sinks import format_seconds
from titan.report.goodput import Goodput
from titan.report.mfu import causal_share
from titan.report.runs import Run

MOST_VARIED = 8
"""Keys that have a column in the table of runs."""
_QUIET = ("save", "start", "exit", "submit")
"""Events that are no fault."""


@dataclass(frozen=True)
class Figures:
    """What is said of a run in a line."""

    state: str
    progress: str
    loss: float | None
    validation_loss: float | None
    tokens: int | None
    tokens_per_second: float | None
    """The median over the logged steps."""
    mfu: float | None
    mfu_causal: float | None
    memory_gib: float | None
    wall: str
    goodput: float | None
    attempts: int


def figures_of(run: Run, goodput: Goodput | None) -> Figures:
    """Return a run's figures; None where there are none."""
    rows, validations = run.training, run.validation
    mfu, share = _median(rows, "mfu"), causal_share(run.config)
    memory = _numbers(rows, "memory_gib")
    validated = _numbers(validations, "validation_loss")
    losses = _numbers(rows[-1:], "loss")
    return Figures(
        state=run.state,
        progress=f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
        loss=losses[-1] if losses else None,
        validation_loss=validated[-1] if validated else None,
        tokens=rows[-1].get("tokens") if rows else None,
        tokens_per_second=_median(rows[1:] or rows, "tokens_per_second"),  # the first has warming up in it
        mfu=mfu,
        mfu_causal=mfu * share if mfu is not None and share is not None else None,
        memory_gib=max(memory) if memory else None,
        wall=format_seconds(goodput.wall_seconds) if goodput else "-",
        goodput=goodput.share if goodput else None,
        attempts=goodput.attempts if goodput else 0,
    )


def faults_of(run: Run) -> list[dict[str, Any]]:
    """Return the events of a run that are worth a look: all but saves, and starts and ends in order."""
    starts = 0
    found = []
    for event in run.events:
        name = event.get("event")
        starts += name == "start"
        is_bad_end = name == "exit" and event.get("code") != 0
        if name not in _QUIET or is_bad_end or (name == "start" and starts > 1):
            found.append(event)
    return found


def count_events(run: Run) -> str:
    """Return how often what happened, in words."""
    counts = Counter(str(event.get("event")) for event in run.events)
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def describe_event(event: dict[str, Any]) -> str:
    """Return what an event says besides its name and time."""
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))


def notices(runs: Sequence[Run]) -> list[str]:
    """Return what has to be said at the top of a page."""
    live = [run for run in runs if run.is_live]
    lost = [run for run in runs if run.state == "ended without a word"]
    empty = [run for run in runs if not run.training]
    said = []
    if live:
        which = "This run is" if len(runs) == 1 else f"{len(live)} of {len(runs)} runs are"
        where = f" at step {live[0].step:,}" if len(runs) == 1 else ""
        said.append(f"{which} still going on{where}. The same command makes a newer page.")
    for run in lost:
        said.append(
            f"{run.name} ended without a word, after step {run.step:,}: its process was killed, or its machine went "
            "away. The command that started it goes on from its newest checkpoint."
        )
    for run in empty:
        why = run.status.get("why")
        said.append(f"{run.name} has logged no step yet." + (f" It says: {why}" if why else ""))
    for run in runs:
        if run.status.get("state") == "failed" and run.training:
            said.append(f"{run.name} failed: {run.status.get('why') or 'it does not say why'}")
    return said


def best_first(runs: Sequence[Run]) -> list[int]:
    """Return the runs' indexes by their last loss; those without any come last."""
    return sorted(range(len(runs)), key=lambda index: (runs[index].final_loss, index))


def _numbers(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if isinstance(row.get(name), int | float)]


def _median(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = _numbers(rows, name)
    return statistics.median(values) if values else None
