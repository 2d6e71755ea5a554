"""In what two sets of weights differ, of whichever formats: by titan's names, one tensor of each at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from titan.checkpoint.weights import Weights
from titan.config.keys import flatten
from titan.config.schema import ModelConfig
from titan.convert.describe import format_name
from titan.convert.sources import Source

WORST = 10
"""Tensors that are listed."""
_OPTIMIZER = "optimizer."
_AT_ONCE = 1 << 15
"""Numbers that are compared at one time, in float64: what a cache holds, and too few for threads to be worth it."""
_FOR_PEOPLE = ("name",)
"""Keys of a model's config that change nothing."""


@dataclass(frozen=True)
class Distance:
    """How far two tensors are apart."""

    name: str
    absolute: float
    """The largest difference of two numbers; infinite where one of them is no number."""
    relative: float
    """The same as a share of the largest number of both."""
    numbers: int
    """How many differ."""
    of: int


@dataclass
class Differences:
    """What a comparison has found. `tolerance` is a share, as `Distance.relative`."""

    tolerance: float
    compared: int = 0
    """Tensors of one shape in both."""
    only: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    """Tensors that only the first has, only the second."""
    shapes: list[str] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    """How many tensors have which two formats. Under a tolerance only numbers count."""
    apart: list[Distance] = field(default_factory=list)
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def above(self) -> list[Distance]:
        """Tensors whose numbers differ by more than the tolerance, the worst first."""
        return sorted((each for each in self.apart if not each.relative <= self.tolerance), key=lambda d: -d.relative)

    @property
    def is_same(self) -> bool:
        """Whether there is nothing that counts."""
        formats = self.formats if self.tolerance == 0 else {}
        config = [key for key in self.config if key not in _FOR_PEOPLE]
        return not (self.only[0] or self.only[1] or self.shapes or formats or self.above or config)


def find_differences(a: Source, b: Source, tolerance: float = 0.0) -> Differences:
    """Compare two sets of weights, and the optimizer's state where both have one."""
    found = Differences(tolerance)
    _compare(a.weights, b.weights, "", found)
    if a.optimizer is not None and b.optimizer is not None:
        _compare(a.optimizer, b.optimizer, _OPTIMIZER, found)
    elif a.optimizer is not None or b.optimizer is not None:
        found.notes.append(f"only the {'first' if a.optimizer is not None else 'second'} has an optimizer's state")
    if a.config is None or b.config is None:
        found.notes.append("not both say of which shape the model is")
    else:
        found.config = _different_keys(a.config, b.config)
    if a.step != b.step:
        found.notes.append(f"step {a.step:,} and step {b.step:,}")
    return found


def format_differences(found: Differences) -> Iterator[str]:
    """Return them as lines."""
    yield from (f"note        {note}" for note in found.notes)
    for key, (first, second) in found.config.items():
        yield f"config      model.{key} = {first} and {second}{' (changes nothing)' * (key in _FOR_PEOPLE)}"
    for title, names in zip(("only first", "only second"), found.only, strict=True):
        yield from _listed(title, names)
    yield from _listed("shape", found.shapes)
    for formats, count in found.formats.items():
        yield f"format      {formats}: {count} tensor{'s' * (count != 1)}"
    above = found.above
    # Apart from each other: of the optimizer all is always further apart than the weights.
    yield from _worst([each for each in above if not each.name.startswith(_OPTIMIZER)])
    yield from _worst([each for each in above if each.name.startswith(_OPTIMIZER)])
    within = len(found.apart) - len(above)
    same = found.compared - len(found.apart)
    yield f"tensors     {found.compared} in both: {same} equal, {within} within {found.tolerance:g}, {len(above)} apart"
    yield f"verdict     {'the same' if found.is_same else 'different'}"


def distance(name: str, a: Tensor, b: Tensor) -> Distance | None:
    """Return how far two tensors of one shape are apart; None if each number is the same, or neither is one."""
    absolute = largest = 0.0
    numbers = 0
    for first, second in zip(a.reshape(-1).split(_AT_ONCE), b.reshape(-1).split(_AT_ONCE), strict=True):
        if first.dtype == second.dtype and torch.equal(first, second):
            largest = max(largest, _largest(first))
            continue
        x, y = first.double(), second.double()
        same = (x == y) | (x.isnan() & y.isnan())
        apart = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        absolute = max(absolute, float(apart.max()))
        largest = max(largest, _largest(x), _largest(y))
        numbers += int((~same).sum())
    if not numbers:
        return None
    relative = absolute / largest if absolute != torch.inf and largest else torch.inf
    return Distance(name, absolute, relative, numbers, a.numel())


def _largest(numbers: Tensor) -> float:
    finite = numbers.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return float(finite.max()) if len(finite) else 0.0


def _compare(a: Weights, b: Weights, prefix: str, found: Differences) -> None:
    first, second = a.infos(), b.infos()
    found.only[0].extend(prefix + name for name in first if name not in second)
    found.only[1].extend(prefix + name for name in second if name not in first)
    for name in first:
        if name not in second:
            continue
        shapes, dtypes = (first[name].shape, second[name].shape), (first[name].dtype, second[name].dtype)
        if shapes[0] != shapes[1]:
            found.shapes.append(f"{prefix}{name}: {list(shapes[0])} and {list(shapes[1])}")
            continue
        if dtypes[0] != dtypes[1]:
            found.formats[f"{format_name(dtypes[0])} and {format_name(dtypes[1])}"] += 1
        found.compared += 1
        far = distance(prefix + name, a.read(name), b.read(name))
        if far is not None:
            found.apart.append(far)


def _different_keys(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[Any, Any]]:
    first, second = flatten(a), flatten(b)
    keys = dict.fromkeys([*first, *second])
    return {
        key: (first.get(key, "not set"), second.get(key, "not set"))
        for key in keys
        if first.get(key, "not set") != second.get(key, "not set")
    }


def _worst(apart: list[Distance]) -> Iterator[str]:
    shown = apart[:WORST]
    width = max((len(each.name) for each in shown), default=0)
    for each in shown:
        yield (
            f"apart       {each.name:<{width}}  {each.absolute:.1e} at most, {each.relative:.1e} of the largest "
            f"number, in {each.numbers:,} of {each.of:,}"
        )
    if len(apart) > WORST:
        yield f"            ... and {len(apart) - WORST} more"


def _listed(title: str, lines: list[str]) -> Iterator[str]:
    yield from (f"{title:<11} {line}" for line in lines[:WORST])
    if len(lines) > WORST:
        yield f"            ... and {len(lines) - WORST} more"
