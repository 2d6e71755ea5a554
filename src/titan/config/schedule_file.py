"""A pipeline schedule from a file: one line a rank, one cell a point in time, as PyTorch's pipelining writes them.

    0F0,0F1,,1F0, ...

`0F1` is the forward pass of stage 0 on microbatch 1; B is the backward pass, or I and W its two halves, for the inputs
and for the weights; an empty cell is idle time. Sending and receiving is not in the file: PyTorch adds it.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from titan.errors import ConfigError, Problem

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


@dataclass(frozen=True)
class Schedule:
    """What a schedule's file says."""

    stages: list[list[int]]
    """Of every rank, ascending."""
    microbatches: int


def read_schedule(path: str) -> Schedule:
    """Read and check a schedule.

    Raises:
        ConfigError: If the file cannot be read, or leaves something out, or does it twice.
    """
    try:
        with Path(path).open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _refuse(path, f"It cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    actions: Counter[tuple[int, str, int]] = Counter()
    rank_of: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for column, cell in enumerate(row):
            text = cell.strip()
            if not text:
                continue
            match = _ACTION.fullmatch(text)
            if match is None:
                raise _refuse(path, f"Line {rank + 1}, cell {column + 1}: {text!r} is no action such as 0F0 or 1B3.")
            stage, kind, microbatch = int(match[1]), match[2], int(match[3])
            if rank_of.setdefault(stage, rank) != rank:
                raise _refuse(path, f"Stage {stage} is in line {rank_of[stage] + 1} and in line {rank + 1}.")
            actions[stage, kind, microbatch] += 1
    if not actions:
        raise _refuse(path, "It is empty.")
    microbatches = 1 + max(microbatch for _, _, microbatch in actions)
    for stage in range(1 + max(rank_of)):
        for microbatch in range(microbatches):
            forward, whole, inputs, weights = (actions[stage, kind, microbatch] for kind in "FBIW")
            if forward != 1 or (whole, inputs, weights) not in ((1, 0, 0), (0, 1, 1)):
                raise _refuse(
                    path,
                    f"Stage {stage} and microbatch {microbatch} need one F and one B (or one I and one W), "
                    f"but have F {forward}, B {whole}, I {inputs}, W {weights}.",
                )
    stages = [sorted(stage for stage, owner in rank_of.items() if owner == rank) for rank in range(len(rows))]
    return Schedule(stages, microbatches)


def _refuse(path: str, why: str) -> ConfigError:
    return ConfigError(
        [
            Problem(
                f"parallelism.pp_schedule_csv = {path} is not a pipeline schedule",
                why,
                "parallelism.pp_schedule_csv=null   for a schedule by name",
            )
        ]
    )
