"""The optimizer's options on a mesh: moments in bfloat16 and a compiled update work on a rank's shards."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from titan.trainer.record import Record, compare_records
from titan.verify.parity import BFLOAT16, FLOAT32

from .matrix import mesh, options
from .test_composition import assert_same

COMPILED = ("compile=inductor", "compile.backend=aot_eager", "compile.optimizer=true")
NARROW = ("optimizer.state_dtype=bfloat16",)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, mesh(tp=2)),
        (2, (*mesh(dp_shard=2), *COMPILED)),
        (2, (*mesh(dp_shard=2), *options("cpu_offload=true"))),
        pytest.param(2, (*mesh(tp=2), *COMPILED), marks=pytest.mark.slow),
        pytest.param(4, (*mesh(pp=2, dp_shard=2), *COMPILED), marks=pytest.mark.slow),
    ],
)
def test_moments_in_bfloat16_are_those_of_one_process(
    record: Callable[..., Record], world_size: int, layout: tuple[str, ...]
) -> None:
    """A layout gives what one process gives, to within the format's rounding; and that is not what float32 gives."""
    found, reference = record(world_size, *layout, *NARROW), record(1, *mesh(), *NARROW)
    assert_same(compare_records(found, reference), BFLOAT16)
    assert compare_records(reference, record(1, *mesh())).weight > 1e-6


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_compiled_update_is_the_one_that_is_not(record: Callable[..., Record], world_size: int) -> None:
    """With moments in float32, losses, norms, gradients and weights are the same to within float32's rounding."""
    found = record(world_size, *mesh(dp_shard=world_size), *COMPILED)
    assert_same(compare_records(found, record(1, *mesh())), FLOAT32)
