"""What travels between ranks in a step of several micro-batches: nothing that its first or its last does not need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titan.trainer.build import build_trainer
from titan.trainer.loop import build_meter, run_step, steps_of_batches
from titan.trainer.record import Record, compare_records

from .layouts import layout_config, open_packed
from .matrix import BLOCK_EACH, mesh, options
from .pool import RankPool
from .test_composition import assert_same

BLOCKS = 4
"""Of the small model."""


class Counting(TorchDispatchMode):
    """Counts collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(world_size: int, overrides: tuple[str, ...], packed: Path) -> tuple[int, int]:
    """Return how many all-gathers and reduce-scatters this rank takes part in, in the second step."""
    config = layout_config(world_size, overrides)
    trainer = build_trainer(config, torch.device("cpu"), open_packed(packed, config))
    batches = steps_of_batches(trainer, build_meter(trainer))
    run_step(trainer, next(batches))
    rows = next(batches)
    with Counting() as counting:
        run_step(trainer, rows)
    return counting.counts["_allgather_base_"], counting.counts["_reduce_scatter_base_"]


def of(micro_batches: int, *more: str) -> tuple[str, ...]:
    """Return overrides for a step of so many micro-batches on each of two data ranks."""
    return (f"training.local_batch_size={4 // micro_batches}", *more)


GROUPS = BLOCKS + 2
"""What FSDP gathers as one: each block, the embedding, and norm and output together."""


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("policy", ["default", "never", "always"])
def test_micro_batches_exchange_only_what_they_need(
    pools: Callable[[int], RankPool], packed_file: Path, policy: str, micro_batches: int
) -> None:
    """Gradients are summed once a step, and weights that are kept from forward to backward are gathered once a step.

    Those that are freed in between are gathered twice for each micro-batch.
    """
    layout = of(micro_batches, *mesh(dp_shard=2), *options(f"reshard_after_forward={policy}"))
    found = pools(2).run(count_collectives, 2, layout, packed_file)
    gathers = {
        "default": 2 * (BLOCKS + 1) * micro_batches + 1,
        "never": GROUPS,
        "always": 2 * GROUPS * micro_batches,
    }[policy]
    assert found == [(gathers, GROUPS)] * 2


@pytest.mark.parametrize(
    "schedule",
    ["1F1B", "GPipe", pytest.param("Interleaved1F1B", marks=pytest.mark.slow)],
)
def test_a_pipeline_sums_gradients_once_a_step(
    pools: Callable[[int], RankPool], packed_file: Path, schedule: str
) -> None:
    """However often its schedule runs in a step; and it gathers weights no oftener than in a single run."""
    layout = (*mesh(pp=2, dp_shard=2), *options(f"pp_schedule={schedule}"))
    if schedule == "Interleaved1F1B":
        layout += BLOCK_EACH
    once = pools(4).run(count_collectives, 4, (*layout, *of(1)), packed_file)
    twice = pools(4).run(count_collectives, 4, (*layout, *of(2)), packed_file)
    assert [sums for _, sums in twice] == [sums for _, sums in once]
    if schedule != "Interleaved1F1B":  # PyTorch frees a looped schedule's weights at its end
        assert twice == once
        assert {sums for _, sums in once} == {BLOCKS // 2 + 1}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, (*mesh(dp_shard=2), *options("reshard_after_forward=never"))),
        (2, (*mesh(dp_shard=2), "model.tie_embeddings=true")),
        (4, mesh(pp=2, dp_shard=2)),
    ],
)
def test_what_is_kept_between_micro_batches_is_not_stale(
    record: Callable[..., Record], world_size: int, layout: tuple[str, ...]
) -> None:
    """Several steps of several micro-batches equal one process: weights are gathered anew after every update."""
    tied = tuple(each for each in layout if each.startswith("model."))
    found = record(world_size, *layout, *of(4 // (world_size // 2)))
    assert_same(compare_records(found, record(1, *mesh(), *tied)))
