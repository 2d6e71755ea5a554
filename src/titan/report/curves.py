"""Curves of a page: which there are, and a thinned copy of each that still shows its highest and lowest points.

A run logs a hundred thousand rows and a plot has four hundred pixels. Averages would hide the spike that one looks for;
so of each stretch of rows the smallest and the largest value stay, where they were.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from titan.report.mfu import causal_share
from titan.report.runs import Run

Points = tuple[list[int], list[float]]
"""Steps and values."""

_MOST_POINTS = 600
_PAGE_POINTS = 6000
"""Of one metric over all runs of a page, which keeps it small."""
_LEAST_POINTS = 60
_MEANS = 40
_LEAST_ROWS = 80
"""Of fewer the second half is easily seen as it is."""


@dataclass(frozen=True)
class Metric:
    """One plot."""

    key: str
    """What it is called in the page's data."""
    title: str
    unit: str
    points: Callable[[Run], Points]
    note: str = ""
    has_marks: bool = False
    """Whether each point has a mark, because they are few."""
    starts_at_zero: bool = False


def _column(name: str, factor: float = 1.0) -> Callable[[Run], Points]:
    return lambda run: collect(run.training, name, factor)


def _validation(name: str) -> Callable[[Run], Points]:
    return lambda run: collect(run.validation, name, 1.0)


def _causal_mfu(run: Run) -> Points:
    share = causal_share(run.config)
    return ([], []) if share is None else collect(run.training, "mfu", 100 * share)


def _recent_loss(run: Run) -> Points:
    """Return the means of the losses of the second half, in which curves that lie close can be told apart."""
    steps, values = collect(run.training, "loss", 1.0)
    if len(steps) < _LEAST_ROWS:
        return [], []
    middle = steps[0] + (steps[-1] - steps[0]) / 2
    first = next(index for index, step in enumerate(steps) if step >= middle)
    return average((steps[first:], values[first:]), _MEANS)


METRICS = (
    Metric("loss", "Training loss", "nats a token", _column("loss")),
    Metric("recent_loss", "Training loss, second half", "nats a token, means", _recent_loss),
    Metric("validation_loss", "Validation loss", "nats a token", _validation("validation_loss"), has_marks=True),
    Metric("grad_norm", "Gradient norm", "before clipping", _column("grad_norm")),
    Metric("learning_rate", "Learning rate", "", _column("learning_rate"), starts_at_zero=True),
    Metric("tokens_per_second", "Throughput", "tokens a second", _column("tokens_per_second"), starts_at_zero=True),
    Metric("mfu", "MFU, full attention", "% of peak", _column("mfu", 100.0), starts_at_zero=True),
    Metric("mfu_causal", "MFU, causal attention", "% of peak", _causal_mfu, starts_at_zero=True),
    Metric("memory_gib", "Memory, the fullest rank's peak", "GiB", _column("memory_gib"), starts_at_zero=True),
)


def collect(rows: Sequence[dict[str, Any]], name: str, factor: float) -> Points:
    """Return a column's finite values with their steps."""
    steps, values = [], []
    for row in rows:
        value = row.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            steps.append(row["step"])
            values.append(value if factor == 1.0 else value * factor)
    return steps, values


def average(points: Points, most: int) -> Points:
    """Return the means of at most so many stretches, each at its middle step."""
    steps, values = points
    count = min(most, len(steps))
    cuts = [index * len(steps) // count for index in range(count + 1)]
    stretches = list(itertools.pairwise(cuts))
    return (
        [steps[(start + end) // 2] for start, end in stretches],
        [math.fsum(values[start:end]) / (end - start) for start, end in stretches],
    )


def thin(points: Points, most: int) -> Points:
    """Return at most so many of the points: the first, the last, and each stretch's smallest and largest."""
    steps, values = points
    if len(steps) <= most:
        return points
    stretches = max(1, (most - 2) // 2)
    kept = {0, len(steps) - 1}
    for index in range(stretches):
        stretch = range(index * len(steps) // stretches, (index + 1) * len(steps) // stretches)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[at] for at in order], [values[at] for at in order]


def points_per_curve(runs: int) -> int:
    """Return how many points each curve of a page of so many runs may have."""
    return max(_LEAST_POINTS, min(_MOST_POINTS, _PAGE_POINTS // max(1, runs)))


def curves_of(runs: Sequence[Run]) -> dict[str, list[Points]]:
    """Return the thinned curves of every metric that any run has, for all runs in their order."""
    most, found = points_per_curve(len(runs)), {}
    for metric in METRICS:
        curves = [thin(metric.points(run), most) for run in runs]
        if any(steps for steps, _ in curves):
            found[metric.key] = curves
    return found
