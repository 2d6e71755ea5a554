"""A plot as SVG: lines over steps, with axes, ticks and units. Colours are variables of the page, light and dark.

Each plot is drawn 400 wide and takes the width that its column has, which is about that on a phone and on a laptop, so
the letters keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from titan.report.curves import Metric, Points

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 8, 40
_LOG_RANGE = 30.0
"""A curve of positive values whose largest is so many times its median is drawn over a logarithmic axis."""
_MOST_MARKS = 60
_MANY = 6
"""More curves than this are drawn finer."""


class Axis:
    """Where a value is drawn.

    Args:
        low: The smallest value.
        high: The largest.
        start: The pixel of the smallest.
        end: The pixel of the largest.
        is_log: Whether equal ratios are equally far apart.
    """

    def __init__(self, low: float, high: float, start: float, end: float, is_log: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.is_log = low, high, start, end, is_log

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        if self.is_log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about so many round values."""
        return log_ticks(self.low, self.high, count) if self.is_log else round_ticks(self.low, self.high, count)


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about so many multiples of 1, 2 or 5 times a power of ten between two values."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Return powers of ten between two values, or 1, 2 and 5 times them where those would be few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(ticks) < 2:
        ticks = [f * 10.0**power for power in powers for f in (1, 2, 5) if low <= f * 10.0**power <= high]
    stride = max(1, math.ceil(len(ticks) / max(1, count)))
    return ticks[::stride]


def format_number(value: float) -> str:
    """Return a number as an axis shows it: 12k, 3.5M, 2e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{_short(value / unit)}{name}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return _short(value)


def _short(value: float) -> str:
    text = f"{value:.4g}"
    return text if "e" not in text else f"{value:.0f}"


def draw(metric: Metric, curves: Sequence[Points], names: Sequence[str]) -> str:
    """Return a plot of the curves of all runs.

    Args:
        metric: What they show.
        curves: Steps and values, one for each run; empty ones are not drawn, but keep their colour.
        names: Of the runs.
    """
    steps = [step for curve in curves for step in curve[0]]
    x, y = _x_axis(steps), _y_axis(metric, [value for curve in curves for value in curve[1]])
    unit = f" ({metric.unit}{', logarithmic' if y.is_log else ''})" if metric.unit or y.is_log else ""
    title, kind = f"{metric.title}{unit}", "plot many" if len(curves) > _MANY else "plot"
    parts = [
        f'<figure class="{kind}" data-metric="{escape(metric.key)}" data-x="{x.low},{x.high}">',
        f"<figcaption>{escape(metric.title)} <small>{escape(unit.strip())}</small></figcaption>",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps">',
        *_grid(x, y),
    ]
    for index, (curve, name) in enumerate(zip(curves, names, strict=True)):
        if curve[0]:
            parts.append(_line(metric, curve, x, y, index, name))
    parts.append('<line class="cursor" y1="0" y2="0" x1="0" x2="0"/></svg>')
    parts.append(f"<p class=note>{escape(metric.note)}</p></figure>" if metric.note else "</figure>")
    return "".join(parts)


def colour_class(index: int) -> str:
    """Return the CSS class of a run's colour; beyond ten they come again, with dashes."""
    return f"c{index % 10}" + (" dash" if index // 10 % 2 else "")


def _x_axis(steps: list[int]) -> Axis:
    low, high = min(steps), max(steps)
    if low == high:
        low, high = low - 1, high + 1
    return Axis(low, high, LEFT, WIDTH - RIGHT)


def _y_axis(metric: Metric, values: list[float]) -> Axis:
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    pixels = (HEIGHT - BOTTOM, TOP)
    if not metric.starts_at_zero and low > 0 and high > _LOG_RANGE * middle:
        return Axis(low / 1.05, high * 1.05, *pixels, is_log=True)
    if metric.starts_at_zero and low >= 0:
        low = 0.0
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Axis(low if low == 0 and metric.starts_at_zero else low - margin, high + margin, *pixels)


def _grid(x: Axis, y: Axis) -> list[str]:
    parts = []
    for tick in y.ticks(5):
        at = f"{y.at(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".35em" text-anchor="end">{format_number(tick)}</text>')
    for tick in (tick for tick in x.ticks(5) if tick == round(tick)):
        at = f"{x.at(tick):.1f}"
        bottom = HEIGHT - BOTTOM
        anchor = "end" if x.at(tick) > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="{anchor}">{format_number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    return parts


def _line(metric: Metric, curve: Points, x: Axis, y: Axis, index: int, name: str) -> str:
    pixels = [f"{x.at(step):.1f},{y.at(value):.1f}" for step, value in zip(*curve, strict=True)]
    marks = ""
    if len(pixels) == 1 or (metric.has_marks and len(pixels) <= _MOST_MARKS):
        marks = "".join(
            f'<circle class="{colour_class(index)}" cx="{cx}" cy="{cy}" r="2.6"/>'
            for cx, _, cy in (pixel.partition(",") for pixel in pixels)
        )
    line = f'<polyline class="line {colour_class(index)}" points="{" ".join(pixels)}"/>' if len(pixels) > 1 else ""
    return f"<g><title>{escape(name)}</title>{line}{marks}</g>"
