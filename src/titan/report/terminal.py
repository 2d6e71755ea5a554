"""The same for a terminal: a line a curve, a table for a sweep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from titan.metrics.sinks import format_seconds
from titan.report.curves import METRICS, Points
from titan.report.facts import (
    MOST_VARIED,
    Figures,
    best_first,
    count_events,
    describe_event,
    faults_of,
    figures_of,
    notices,
)
from titan.report.goodput import PARTS, Goodput, account
from titan.report.plot import format_number
from titan.report.runs import Run, varied_keys

_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_EVENTS = 12


def describe(runs: Sequence[Run], now: float, width: int) -> Iterator[str]:
    """Yield the lines about one run or several.

    Args:
        runs: To speak of.
        now: In seconds.
        width: Of the terminal, in letters.
    """
    goodputs = [account(run, now) for run in runs]
    figures = [figures_of(run, goodput) for run, goodput in zip(runs, goodputs, strict=True)]
    lines = _one(runs[0], figures[0], goodputs[0], width) if len(runs) == 1 else _table(runs, figures)
    for line in itertools.chain((f"! {notice}" for notice in notices(runs)), lines):
        yield printable(line)


def _one(run: Run, figures: Figures, goodput: Goodput | None, width: int) -> Iterator[str]:
    yield f"{run.name}  {figures.state}, step {figures.progress}"
    for metric in METRICS:
        points = metric.points(run)
        if points[0]:
            yield _curve(metric.title, metric.unit, points, max(10, min(60, width - 76)))
    if goodput is not None:
        yield f"wall time {figures.wall}, goodput {goodput.share:.1%}, {goodput.attempts} starts"
        for part, seconds in goodput.seconds.items():
            if seconds > 0:
                share = seconds / max(goodput.wall_seconds, 1e-9)
                yield f"  {share:>6.1%}  {format_seconds(seconds):>8}  {PARTS[part]}"
    yield f"events: {count_events(run)}"
    for event in faults_of(run)[-_MOST_EVENTS:]:
        line = f"  {str(event.get('time', ''))[:19].replace('T', ' ')}  {event.get('event')}  {describe_event(event)}"
        yield line[:width]


def _curve(title: str, unit: str, points: Points, width: int) -> str:
    values = points[1]
    low, high = format_number(min(values)), format_number(max(values))
    line = f"{title:<32}{sparkline(values, width)}  {low} to {high}, last {format_number(values[-1])} {unit}"
    return line.rstrip()


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as blocks of different height, each the mean of a stretch."""
    count = min(width, len(values))
    means = []
    for index in range(count):
        stretch = values[index * len(values) // count : (index + 1) * len(values) // count]
        means.append(sum(stretch) / len(stretch))
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[3] * count
    return "".join(_BLOCKS[min(7, int((mean - low) / (high - low) * 8))] for mean in means)


def _table(runs: Sequence[Run], figures: Sequence[Figures]) -> Iterator[str]:
    """Yield the runs by their last loss, with what varies."""
    all_varied = varied_keys(runs)
    varied = all_varied[:MOST_VARIED]

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [("run", "last loss", "validation", *varied, "step", "tokens/s", "MFU", "GiB", "goodput", "state")]
    for index in best_first(runs):
        run, each = runs[index], figures[index]
        rows.append(
            (
                run.name,
                shown(each.loss, ".4f"),
                shown(each.validation_loss, ".4f"),
                *(str(run.config.get(key)) for key in varied),
                each.progress,
                shown(each.tokens_per_second, ",.0f"),
                shown(each.mfu, ".1%"),
                shown(each.memory_gib, ".2f"),
                shown(each.goodput, ".1%"),
                each.state,
            )
        )
    kept = [column for column in zip(*rows, strict=True) if any(cell != "-" for cell in column[1:])]
    widths = [max(map(len, column)) for column in kept]
    for row in zip(*kept, strict=True):
        yield "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
    if more := len(all_varied) - len(varied):
        yield f"{more} more key{'s differ' if more > 1 else ' differs'}: see the page, without --text"


def printable(text: str) -> str:
    """Return text without what would move the cursor or change the terminal's colours."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
