"""Tensor, context and pipeline parallelism, alone and together, change nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from titan.verify import Record, compare_records

from .test_data_parallel import assert_same

TENSOR = [
    (2, ("parallelism.tp=2",)),
    (4, ("parallelism.tp=4",)),
    (2, ("parallelism.tp=2", "parallelism.sequence_parallel=false")),
    (2, ("parallelism.tp=2", "parallelism.loss_parallel=false")),
    (2, ("parallelism.tp=2", "parallelism.sequence_parallel=false", "parallelism.loss_parallel=false")),
    (4, ("parallelism.tp=2",)),
    (4, ("parallelism.tp=2", "parallelism.dp_replicate=2", "parallelism.dp_shard=1")),
    (2, ("parallelism.tp=2", "model.tie_embeddings=true")),
]
CONTEXT = [
    (2, ("parallelism.cp=2",)),
    (4, ("parallelism.cp=4",)),
    (2, ("parallelism.cp=2", "parallelism.cp_head_tail=false")),
    *[
        (ranks, (f"parallelism.cp={ranks}", f"parallelism.cp_method={method}", f"parallelism.cp_head_tail={balanced}"))
        for ranks in (2, 4)
        for method in ("ring", "all_to_all")
        for balanced in ("true", "false")
    ],
    (4, ("parallelism.cp=2",)),
    (4, ("parallelism.cp=2", "parallelism.tp=2")),
    (4, ("parallelism.cp=2", "parallelism.dp_replicate=2", "parallelism.dp_shard=1")),
]
PIPELINE = [
    (2, ("parallelism.pp=2",)),
    (4, ("parallelism.pp=4", "training.local_batch_size=4", "parallelism.pp_less_first=0",
         "parallelism.pp_less_last=0")),
    (2, ("parallelism.pp=2", "parallelism.pp_schedule=GPipe")),
    *[
        (2, ("parallelism.pp=2", f"parallelism.pp_schedule={schedule}", "parallelism.pp_less_first=0",
             "parallelism.pp_less_last=0", "training.local_batch_size=4"))
        for schedule in ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    ],
    (4, ("parallelism.pp=2",)),
    (4, ("parallelism.pp=2", "parallelism.tp=2")),
    (4, ("parallelism.pp=2", "parallelism.cp=2")),
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "overrides"), TENSOR + CONTEXT + PIPELINE)
def test_a_layout_equals_one_process(
    record: Callable[..., Record], world_size: int, overrides: tuple[str, ...]
) -> None:
    """Losses, gradient norms, every gradient and every weight equal those of one process."""
    model = tuple(override for override in overrides if override.startswith("model."))
    assert_same(compare_records(record(world_size, *overrides), record(1, *model)))


COMPILED = [
    pytest.param(2, ("compile=inductor",), id="fsdp"),
    *[
        pytest.param(2, ("compile=inductor", *overrides), id="-".join(overrides), marks=pytest.mark.slow)
        for overrides in (
            ("parallelism.tp=2",),
            ("parallelism.cp=2",),
            ("parallelism.cp=2", "parallelism.cp_method=all_to_all"),
            ("parallelism.pp=2",),
            ("activation_checkpoint=selective",),
            ("activation_checkpoint=full",),
        )
    ],
]


@pytest.mark.parametrize(("world_size", "overrides"), COMPILED)
def test_compiled_equals_eager(record: Callable[..., Record], world_size: int, overrides: tuple[str, ...]) -> None:
    """Compiled on a mesh, the model still equals one eager process."""
    assert_same(compare_records(record(world_size, *overrides), record(1, "parallelism=single")))


@pytest.mark.parametrize("overrides", [("float8=tensorwise",), ("float8=rowwise", "parallelism.tp=2")])
def test_emulated_float8_stays_near_float32(record: Callable[..., Record], overrides: tuple[str, ...]) -> None:
    """Float8 rounds, on one rank as on two: near float32, and not the same."""
    difference = compare_records(record(2, "float8.emulate=true", *overrides), record(1, "parallelism=single"))
    assert 1e-7 < difference.loss < 1e-2
    assert difference.gradient < 0.2


@pytest.mark.slow
def test_all_four_axes_together_equal_one_process(record: Callable[..., Record]) -> None:
    """Two of each of pp, dp_shard, cp and tp, on 16 processes."""
    axes = ("parallelism.pp=2", "parallelism.dp_shard=2", "parallelism.cp=2", "parallelism.tp=2")
    assert_same(compare_records(record(16, *axes), record(1, "parallelism=single")))
