"""The plan of a run: what its fullest rank holds and how long a step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from titan.config.degrees import accumulation_steps, describe_degrees, pipeline_microbatches, world_size
from titan.config.schema import TitanConfig
from titan.errors import ConfigError, Problem
from titan.models.flops import count_parameters, flops_per_token
from titan.plan.assumptions import TITAN, Assumptions, System
from titan.plan.devices import Accelerator
from titan.plan.memory import Memory, rank_memory
from titan.plan.rank import Shapes, stages_of
from titan.plan.speed import Timing, time_step

if TYPE_CHECKING:
    pass

GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What a run would take."""

    config: TitanConfig
    device: Accelerator
    assumptions: Assumptions
    memory: Memory
    fullest_rank: int
    timing: Timing | None

    @property
    def memory_gib(self) -> float:
        return self.memory.total / GIB

    @property
    def tokens_per_second_per_device(self) -> float | None:
        if self.timing is None:
            return None
        t = self.config.training
        return t.global_batch_size * t.seq_len / self.timing.step / world_size(self.config.cluster)


def build_plan(config, device, assumptions, system=TITAN, shapes=None):
    shapes = shapes or Shapes(config)
    ranks = range(config.parallelism.pp)
    memories = [rank_memory(config, rank, assumptions, system, shapes) for rank in ranks]
    fullest = max(ranks, key=lambda rank: memories[rank].total)
    return Plan(config, device, assumptions, memories[fullest], fullest, time_step(config, device, assumptions, system, shapes))
