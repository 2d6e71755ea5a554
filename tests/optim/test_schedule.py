"""The learning rate against PyTorch's own schedulers, and against closed forms written apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from tests.support.configs import compose
from titan.config.schema import DecayType, LrSchedulerConfig
from titan.optim.schedule import lr_factor, set_learning_rate


def factors(steps: int, **config) -> list[float]:
    """Return the factor of every step."""
    return [lr_factor(step, steps, LrSchedulerConfig(**config)) for step in range(steps)]


def by_pytorch(steps: int, *parts: tuple[int, Callable[[torch.optim.Optimizer], LRScheduler]]) -> list[float]:
    """Return what PyTorch's schedulers one after the other make of a learning rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    milestones = [sum(length for length, _ in parts[: index + 1]) for index in range(len(parts) - 1)]
    scheduler = SequentialLR(optimizer, [build(optimizer) for _, build in parts], milestones)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def warmup(steps: int):
    """Rise to the peak in equal steps, the first above zero."""
    return steps, lambda optimizer: LinearLR(optimizer, start_factor=1 / steps, total_iters=steps - 1)


def level(steps: int):
    """Stay at the peak."""
    return steps, lambda optimizer: ConstantLR(optimizer, factor=1.0, total_iters=steps)


def decay(kind: DecayType, steps: int, least: float):
    """Fall to `least`."""
    if kind is DecayType.linear:
        return steps, lambda optimizer: LinearLR(optimizer, start_factor=1.0, end_factor=least, total_iters=steps)
    if kind is DecayType.cosine:
        return steps, lambda optimizer: CosineAnnealingLR(optimizer, T_max=steps, eta_min=least)
    return steps, lambda optimizer: LambdaLR(optimizer, lambda i: least + (1 - least) * (1 - math.sqrt(i / steps)))


@pytest.mark.parametrize("least", [0.0, 0.1])
@pytest.mark.parametrize("kind", DecayType)
@pytest.mark.parametrize(("steps", "up", "ratio"), [(100, 10, 0.2), (100, 20, None), (57, 5, 0.33), (40, 2, 0.95)])
def test_every_shape_is_what_pytorchs_schedulers_make(
    steps: int, up: int, ratio: float | None, kind: DecayType, least: float
) -> None:
    """Warm-up, level and decay, joined by PyTorch, give the same learning rate at every step."""
    down = steps - up if ratio is None else round(steps * ratio)
    parts = [warmup(up), level(steps - up - down), decay(kind, down, least)]
    expected = by_pytorch(steps, *[part for part in parts if part[0]])
    ours = factors(steps, warmup_steps=up, decay_ratio=ratio, decay_type=kind, min_lr_factor=least)
    assert ours == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", DecayType)
def test_the_first_step_learns_and_the_step_after_the_last_would_be_at_the_end(kind: DecayType) -> None:
    """No step is wasted at zero: the first is above it, and the minimum belongs to the step after the last."""
    config = LrSchedulerConfig(warmup_steps=4, decay_ratio=0.5, decay_type=kind, min_lr_factor=0.1)
    assert lr_factor(0, 20, config) == 0.25
    assert lr_factor(3, 20, config) == lr_factor(4, 20, config) == lr_factor(10, 20, config) == 1.0
    assert lr_factor(19, 20, config) > 0.1
    assert lr_factor(20, 20, config) == pytest.approx(0.1)
    assert lr_factor(1000, 20, config) == pytest.approx(0.1), "beyond the end it stays there"


@pytest.mark.parametrize("kind", DecayType)
def test_rates_rise_stay_and_fall(kind: DecayType) -> None:
    """Nowhere above the peak or below the minimum; never down in the warm-up, never up after it."""
    ours = factors(200, warmup_steps=30, decay_ratio=0.4, decay_type=kind, min_lr_factor=0.05)
    assert all(0.05 <= factor <= 1 for factor in ours[2:])
    assert all(a < b for a, b in itertools.pairwise(ours[:30]))
    assert ours[30:121] == [1.0] * 91
    assert all(a > b for a, b in itertools.pairwise(ours[120:]))


def test_shapes_differ_where_they_should() -> None:
    """Halfway down: one half, one half along the cosine, and one minus the root of a half."""
    middle = {
        kind: lr_factor(75, 100, LrSchedulerConfig(warmup_steps=0, decay_ratio=0.5, decay_type=kind))
        for kind in DecayType
    }
    assert middle[DecayType.linear] == pytest.approx(0.5)
    assert middle[DecayType.cosine] == pytest.approx(0.5)
    assert middle[DecayType.sqrt] == pytest.approx(1 - math.sqrt(0.5))
    quarter = LrSchedulerConfig(warmup_steps=0, decay_ratio=0.5, decay_type=DecayType.cosine)
    assert lr_factor(62, 100, quarter) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.24)))


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0, None])
def test_a_run_shorter_than_its_warm_up_only_rises(ratio: float | None) -> None:
    """A trial of 5 steps with a warm-up of 20 stays on the way up, whatever the decay."""
    assert factors(5, warmup_steps=20, decay_ratio=ratio) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
    assert factors(20, warmup_steps=20, decay_ratio=ratio)[-1] == 1.0


def test_no_decay_stays_at_the_peak() -> None:
    """decay_ratio=0 means none, not even in the last step."""
    assert factors(10, warmup_steps=2, decay_ratio=0.0) == pytest.approx([0.5] + [1.0] * 9)


@pytest.mark.parametrize("kind", DecayType)
def test_decaying_all_the_way_begins_after_the_warm_up(kind: DecayType) -> None:
    """decay_ratio=1 and null are the same: the warm-up wins where the two overlap."""
    everything = factors(50, warmup_steps=10, decay_ratio=1.0, decay_type=kind)
    assert everything == factors(50, warmup_steps=10, decay_ratio=None, decay_type=kind)
    assert everything[10] == 1.0
    assert everything[11] < 1.0


def test_no_warm_up_starts_at_the_peak() -> None:
    """warmup_steps=0 divides by nothing."""
    assert factors(4, warmup_steps=0, decay_ratio=None) == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("name", ["warmup_stable_decay", "linear", "cosine"])
def test_the_shipped_schedules_are_what_their_comments_say(name: str) -> None:
    """Each option of the group rises over its warm-up, and ends near its minimum."""
    config = compose([f"lr_scheduler={name}"]).lr_scheduler
    ours = [lr_factor(step, 1000, config) for step in range(1000)]
    assert ours[config.warmup_steps - 1] == 1.0
    assert ours[799] == 1.0 or name != "warmup_stable_decay"
    assert ours[-1] == pytest.approx(config.min_lr_factor, abs=0.01)


def test_every_group_gets_the_rate() -> None:
    """Parameters with and without decay learn at the same rate."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.2)]
    optimizer = torch.optim.SGD(groups)
    set_learning_rate(optimizer, 0.05)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
