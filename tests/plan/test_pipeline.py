"""What a schedule has in hand, and its idle time, against the orders that PyTorch's schedules make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.pipelining.stage import _PipelineStageBase

from titan.config.degrees import stages_of_ranks
from titan.config.schema import ParallelismConfig, PipelineSchedule
from titan.plan.pipeline import flow_of

KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
COST = {"F": 1, "B": 2, "I": 1, "W": 1}


class _Stage(_PipelineStageBase):
    """As much of a stage as a schedule asks for when it makes its order."""

    def __init__(self, index: int, stages: int, ranks: int) -> None:
        self.stage_index, self.num_stages = index, stages
        self.group_size, self.group_rank, self.group = ranks, 0, None
        self.has_backward, self.device = False, torch.device("cpu")
        self.submod: Any = None
        self.stage_index_to_group_rank: dict[int, int] = {}

    def _create_grad_recv_info(self, *arguments: Any, **options: Any) -> Any: ...

    def _prepare_forward_infra(self, *arguments: Any, **options: Any) -> Any: ...

    def _prepare_backward_infra(self, *arguments: Any, **options: Any) -> Any: ...


def orders_of(settings: ParallelismConfig, microbatches: int) -> list[list[tuple[str, int, int]]]:
    """Return what every rank does in PyTorch's schedule: kind, stage, microbatch."""
    ranks = stages_of_ranks(settings)
    stages = [_Stage(index, sum(map(len, ranks)), settings.pp) for index in ranks[0]]
    built: Any = get_schedule_class(settings.pp_schedule.name)(
        stages, n_microbatches=microbatches, loss_fn=lambda out, target: out
    )
    orders = []
    for rank in range(settings.pp):
        actions = [action for action in built.pipeline_order[rank] if action is not None]
        single = [one for action in actions for one in (getattr(action, "sub_actions", None) or [action])]
        orders.append([(KINDS[a.computation_type.name], a.stage_index, a.microbatch_index) for a in single])
    return orders


def most_in_hand(order: list[tuple[str, int, int]]) -> int:
    """Return the most forward passes without their backward pass at any time."""
    held = most = 0
    for kind, _, _ in order:
        held += (kind == "F") - (kind in ("B", "W"))
        most = max(most, held)
    return most


def idle_of(orders: list[list[tuple[str, int, int]]]) -> float:
    """Return the idle time of a run in times of a rank's forward and backward, by playing it through."""
    stages = 1 + max(stage for order in orders for _, stage, _ in order)
    done: dict[tuple[str, int, int], int] = {}
    clocks, positions = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while positions[rank] < len(order):
                kind, stage, piece = order[positions[rank]]
                needs = [("F", stage - 1, piece)] if kind == "F" and stage else []
                if kind in "BI":
                    needs = [("F", stage, piece)] + [("G", stage + 1, piece)] * (stage < stages - 1)
                if any(need not in done for need in needs):
                    break
                clocks[rank] = max([clocks[rank], *(done[need] for need in needs)]) + COST[kind]
                done[kind, stage, piece] = clocks[rank]
                if kind in "BI":
                    done["G", stage, piece] = clocks[rank]
                positions[rank] += 1
                moved = True
    assert [len(order) for order in orders] == positions
    own = len({stage for _, stage, _ in orders[0]})
    return (max(clocks) - sum(COST[kind] for kind, _, _ in orders[0])) / (3 * own)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        ("Interleaved1F1B", 2),
        ("Interleaved1F1B", 3),
        ("LoopedBFS", 2),
        ("InterleavedZeroBubble", 2),
        ("InterleavedZeroBubble", 4),
        ("ZBVZeroBubble", 2),
        ("DualPipeV", 2),
    ],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_what_pytorch_s_schedule_does(schedule: str, stages: int, ranks: int, groups: int) -> None:
    """On every rank as many microbatches in hand, and as much idle time, as in the order that PyTorch makes."""
    groups += schedule == "DualPipeV"  # which needs two microbatches for each rank
    settings = ParallelismConfig(
        pp=ranks, dp_shard=1, pp_schedule=PipelineSchedule[schedule], pp_stages_per_rank=stages
    )
    orders = orders_of(settings, groups * ranks)
    flows = [flow_of(settings, groups * ranks, rank) for rank in range(ranks)]
    assert [flow.in_hand for flow in flows] == [most_in_hand(order) for order in orders]
    assert flows[0].idle == pytest.approx(idle_of(orders))


@pytest.mark.parametrize(("schedule", "in_hand"), [("GPipe", [6, 6, 6, 6]), ("1F1B", [4, 3, 2, 1])])
def test_single_stage_schedules(schedule: str, in_hand: list[int]) -> None:
    """GPipe keeps all microbatches, 1F1B as many as there are stages to come; both wait for the others once."""
    settings = ParallelismConfig(pp=4, dp_shard=1, pp_schedule=PipelineSchedule[schedule])
    flows = [flow_of(settings, 6, rank) for rank in range(4)]
    assert [flow.in_hand for flow in flows] == in_hand
    assert {flow.idle for flow in flows} == {3}


def test_a_schedule_of_one_s_own_is_counted(tmp_path: Path) -> None:
    """A file's cells say what is in hand, and its empty cells how long a rank waits."""
    file = tmp_path / "schedule.csv"
    file.write_text("0F0,0F1,,0B0,0B1,\n,1F0,1B0,1F1,1B1,\n")
    settings = ParallelismConfig(pp=2, dp_shard=1, pp_schedule_csv=str(file))
    assert [flow_of(settings, 2, rank).in_hand for rank in (0, 1)] == [2, 1]
    assert flow_of(settings, 2, 0).idle > 0
