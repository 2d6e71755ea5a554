"""Where the time of profiled steps went: shares of the wall clock that add up to 1, and the costliest operators.

Every moment of the steps is one of five, on this rank:

- data: waiting for rows. On a GPU only while it has nothing to do; what is read ahead costs nothing.
- optimizer: the update and clipping are being computed.
- compute: anything else is being computed.
- communication: a collective, a send or a receive is under way and nothing is computed: what is not hidden. Waiting for
  a slower rank or for another pipeline stage is in it, for that is how a rank notices them. `hidden` is what is under
  way while something is computed, and is part of those shares.
- other: none of these. Python between two operators, checkpoints, the console.

On a GPU, computing is what runs there, kernels and copies alike, whatever the CPU does meanwhile; communication is
NCCL's kernels. On a CPU, computing is PyTorch's operators and compiled code on the thread that trains; communication
is gloo's work, from its start to its end. An operator's time is its own, without that of others that it calls: on a GPU
that of the kernels it has started, which may overlap; a backward pass starts its own from a thread of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.autograd import DeviceType

DATA, OPTIMIZER = "titan data", "titan optimizer"
"""The ranges that the trainer marks with `torch.profiler.record_function`."""

_STEP = "ProfilerStep"
_STEP_OF_OPTIMIZER = "Optimizer.step#"
_COMPILED = ("## Call CompiledFxGraph", "Torch-Compiled Region")
_NO_COMPUTE = (
    "autograd::",
    "c10d::",
    "_c10d_functional::",
    "c10d_functional::",
    "gloo:",
    "nccl:",
    "record_param_comms",
)
_COLLECTIVES = ("gloo:", "_c10d_functional::wait_tensor")
_ROWS = 10
_NAME_WIDTH = 52

Intervals = list[tuple[float, float]]
"""Begin and end in microseconds, ascending, apart from each other."""


@dataclass(frozen=True)
class Operator:
    """What one kind of operator took."""

    name: str
    calls_per_step: float
    seconds_per_step: float
    share: float
    """Of the steps' wall clock."""

    def line(self) -> str:
        """Return it as a row of the table."""
        half = _NAME_WIDTH // 2 - 2  # the end of a name is what tells a backward pass
        name = self.name if len(self.name) <= _NAME_WIDTH else f"{self.name[:half]}...{self.name[-half:]}"
        milliseconds = self.seconds_per_step * 1e3
        return f"{name:<{_NAME_WIDTH}} {self.calls_per_step:>7,.0f} {milliseconds:>10,.2f} {self.share:>7.1%}"


@dataclass(frozen=True)
class Breakdown:
    """Where the time of some steps went."""

    steps: int
    seconds_per_step: float
    shares: dict[str, float]
    """compute, communication, data, optimizer, other; they add up to 1."""
    hidden: float
    """Share of the time in which communication is under way behind something that is computed."""
    operators: list[Operator]
    """All of them, the costliest first."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Return it as a table of at most 80 columns."""
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        yield f"{self.seconds_per_step:.3f} s a step: {shares}"
        if self.hidden:
            yield f"communication behind compute and optimizer: {self.hidden:.1%}"
        yield f"{'operator':<{_NAME_WIDTH}} {'calls':>7} {'ms':>10} {'share':>7}   a step"
        for row in self.operators[:_ROWS]:
            yield row.line()
        if rest := self.operators[_ROWS:]:
            sums = (sum(getattr(row, name) for row in rest) for name in ("calls_per_step", "seconds_per_step", "share"))
            yield Operator(f"and {len(rest)} more", *sums).line()


def break_down(events: Sequence[Any], steps: int) -> Breakdown:
    """Return where the time went.

    Args:
        events: `FunctionEvent`s of `torch.profiler`.
        steps: How many whole steps they are of, the first ones; what comes behind them does not count.
    """
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = [event for event in on_cpu if event.name.startswith(_STEP)]
    ranges = sorted(ranges, key=lambda event: event.time_range.start)[:steps]
    assert len(ranges) == steps, "whole ones"
    thread, whole = ranges[0].thread, union(map(_span, ranges))
    last = whole[-1][1]
    all_cpu = [event for event in on_cpu if not event.is_async and _span(event)[0] < last]
    mine = [event for event in all_cpu if event.thread == thread]
    data = union(_span(event) for event in mine if event.name == DATA)
    on_device = [event for event in events if event.device_type != DeviceType.CPU]
    kernels = [event for event in on_device if not event.is_user_annotation]
    if kernels:
        is_collective = [event.name.startswith("nccl") for event in kernels]
        busy = union(_span(event) for event, its in zip(kernels, is_collective, strict=True) if not its)
        travelling = union(_span(event) for event, its in zip(kernels, is_collective, strict=True) if its)
        # the profiler draws a range a second time on the GPU, around the kernels that were started in it and in none
        # within it, such as the optimizer's own
        marked = [event for event in on_device if event.is_user_annotation]
        updating = union(_span(event) for event in marked if event.name.startswith((OPTIMIZER, _STEP_OF_OPTIMIZER)))
        data = without(data, busy)
    else:
        travelling = union(_span(event) for event in on_cpu if event.name.startswith(_COLLECTIVES))
        waits = union(_span(event) for event in mine if event.name.startswith(_COLLECTIVES))
        busy = without(without(union(_span(event) for event in mine if _computes(event)), waits), data)
        updating = union(_span(event) for event in mine if event.name == OPTIMIZER)
    total = length(whole)
    busy, exposed = common(busy, whole), common(without(without(travelling, busy), data), whole)
    seconds = {
        "compute": length(without(busy, updating)),
        "communication": length(exposed),
        "data": length(common(data, whole)),
        "optimizer": length(common(busy, updating)),
    }
    shares = {name: value / total for name, value in seconds.items()}
    return Breakdown(
        steps=steps,
        seconds_per_step=total / 1e6 / steps,
        shares=shares | {"other": 1 - sum(shares.values())},
        hidden=length(common(travelling, busy)) / total,
        operators=_operators(all_cpu if kernels else mine, bool(kernels), steps, total),
    )


def _operators(events: Iterable[Any], has_kernels: bool, steps: int, total: float) -> list[Operator]:
    calls: dict[str, int] = defaultdict(int)
    took: dict[str, float] = defaultdict(float)
    for event in events:
        if not event.is_user_annotation or event.name.startswith(_COMPILED):
            name = "compiled code" if event.name.startswith(_COMPILED) else event.name
            calls[name] += 1
            took[name] += event.self_device_time_total if has_kernels else event.self_cpu_time_total
    return [
        Operator(name, calls[name] / steps, took[name] / 1e6 / steps, took[name] / total)
        for name in sorted(took, key=lambda name: -took[name])
        if took[name] > 0
    ]


def _computes(event: Any) -> bool:
    if event.name.startswith(_COMPILED):
        return True
    return not event.is_user_annotation and "::" in event.name and not event.name.startswith(_NO_COMPUTE)


def _span(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def union(spans: Iterable[tuple[float, float]]) -> Intervals:
    """Return the moments that any of the spans covers."""
    merged: Intervals = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > begin:
            merged.append((begin, end))
    return merged


def common(one: Intervals, other: Intervals) -> Intervals:
    """Return the moments that both cover."""
    found: Intervals = []
    at = place = 0
    while at < len(one) and place < len(other):
        begin, end = max(one[at][0], other[place][0]), min(one[at][1], other[place][1])
        if begin < end:
            found.append((begin, end))
        if one[at][1] < other[place][1]:
            at += 1
        else:
            place += 1
    return found


def without(one: Intervals, other: Intervals) -> Intervals:
    """Return the moments that the first covers and the second does not."""
    gaps: Intervals = []
    at = float("-inf")
    for begin, end in other:
        gaps.append((at, begin))
        at = end
    return common(one, [*gaps, (at, float("inf"))])


def length(intervals: Intervals) -> float:
    """Return how long they are together, in microseconds."""
    return sum(end - begin for begin, end in intervals)
