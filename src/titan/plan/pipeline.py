"""How much a pipeline has in hand at once, and how long it stands idle.

    schedule                microbatches of a stage in hand      idle, in times of a rank's whole forward and backward
    GPipe                   all                                  p - 1
    1F1B                    p - rank                             p - 1
    Interleaved1F1B         (v-1) p + 2 (p-1-rank) + 1, of v     (p - 1) / v
    LoopedBFS               all, of v                            (p - 1) / v
    InterleavedZeroBubble   p v, of v                            (p - 1) / 3 v
    ZBVZeroBubble           2 p, of 2                            (p - 1) / 6 from 2 p microbatches on, else (p - 1) / 3
    DualPipeV               2 p + 1, of 2                        (p - 1) / 6
    one of your own         counted in its file                  counted in its file

p ranks, v stages of each; what is in hand is never more than there is. Idle time takes forward, backward for inputs and
backward for weights to last the same. Tests hold all of it against the orders that PyTorch's schedules make.

Source:
    GPipe, https://arxiv.org/abs/1811.06965; 1F1B and interleaving, https://arxiv.org/abs/2104.04473, section 2.2; zero
    bubble, https://arxiv.org/abs/2401.10241; V, https://arxiv.org/abs/2405.15362; DualPipeV,
    https://arxiv.org/abs/2412.19437.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from titan.config.degrees import stages_of_ranks
from titan.config.schema import ParallelismConfig

LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
_ACTIVE_STAGES = 3
"""Stages of a rank that PyTorch's looped schedules keep gathered at once (2.13)."""


@dataclass(frozen=True)
class Flow:
    """What a schedule does, for one rank."""

    in_hand: int
    """Microbatches, each in one of the rank's stages, whose activations are kept at once, at most."""
    idle: float
    """Time that the whole pipeline stands idle in one run, in times of a microbatch's forward and backward on a rank's
    stages together."""
    stages_with_gradients: int
    """Stages whose gradients are there whole at once: not yet summed over ranks."""
    gathered_stages: int
    """Stages whose weights are there whole at once."""


def flow_of(settings: ParallelismConfig, microbatches: int, rank: int) -> Flow:
    """Return what a schedule does.

    Args:
        settings: Resolved.
        microbatches: That one run of the schedule has.
        rank: Along `pp`.
    """
    ranks, schedule = settings.pp, settings.pp_schedule.name
    if ranks == 1:
        return Flow(1, 0.0, 1, 1)
    own = len(stages_of_ranks(settings)[rank])
    everything = microbatches * own
    if settings.pp_schedule_csv is not None:
        most, idle = _read(settings.pp_schedule_csv, rank)
        return Flow(most, idle, own, min(own, _ACTIVE_STAGES))
    if schedule == "GPipe":
        return Flow(everything, ranks - 1, own, own)
    if schedule == "1F1B":
        return Flow(min(everything, ranks - rank), ranks - 1, own, own)
    if schedule == "ZBVZeroBubble":
        idle = (ranks - 1) / (6 if microbatches >= 2 * ranks else 3)
        return Flow(min(2 * ranks, microbatches + rank + 1), idle, own, own)
    if schedule == "DualPipeV":
        return Flow(min(everything, 2 * ranks + 1), (ranks - 1) / 6, own, own)
    # With one group of microbatches a stage is done before the next one begins with its backward passes.
    with_gradients = own if microbatches > ranks and schedule != "LoopedBFS" else 1
    gathered = min(own, _ACTIVE_STAGES)
    if schedule == "LoopedBFS":
        return Flow(everything, (ranks - 1) / own, with_gradients, gathered)
    if schedule == "InterleavedZeroBubble":
        return Flow(min(everything, ranks * own), (ranks - 1) / own / 3, with_gradients, gathered)
    in_hand = min(everything, (own - 1) * ranks + 2 * (ranks - 1 - rank) + 1)
    return Flow(in_hand, (ranks - 1) / own, with_gradients, gathered)


@functools.cache
def _read(path: str, rank: int) -> tuple[int, float]:
    """Return what a rank of a schedule's file has in hand at most, and its idle time."""
    with Path(path).open(newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    most = held = 0
    for cell in rows[rank]:
        held += ("F" in cell) - ("B" in cell or "W" in cell)
        most = max(most, held)
    length = max(map(len, rows))
    busy = sum(map(bool, rows[rank]))
    stages = len({cell.partition("F")[0] for cell in rows[rank] if "F" in cell})
    return most, (length - busy) / (2 * max(1, stages))
