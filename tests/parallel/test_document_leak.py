"""Documents that share a row know nothing of each other, on every path that attention takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .documents import ENDS, effects, effects_on_flex
from .matrix import BLOCK_EACH, mesh, options
from .pool import RankPool

ALONE = [[changed == looked_at for looked_at in range(len(ENDS))] for changed in range(len(ENDS))]
"""A change of a document changes itself, and nothing else."""

LAYOUTS = {
    "one process": (1, mesh()),
    "one process, recomputed": (1, (*mesh(), "activation_checkpoint=full")),
    "fsdp": (2, mesh(dp_shard=2)),
    "tensor parallel": (2, mesh(tp=2)),
    "pipeline": (2, mesh(pp=2)),
    "pipeline, looped": (2, (*mesh(pp=2), *options("pp_schedule=Interleaved1F1B"), *BLOCK_EACH)),
    **{
        f"{method}, {'head-tail' if balanced == 'true' else 'in order'}": (
            2,
            (*mesh(cp=2), *options(f"cp_method={method}", f"cp_head_tail={balanced}")),
        )
        for method in ("allgather", "ring", "all_to_all")
        for balanced in ("true", "false")
    },
    "context and tensor parallel": (4, mesh(cp=2, tp=2)),
    "context parallel in a pipeline": (4, (*mesh(cp=2, pp=2), *options("cp_method=all_to_all"))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_document_changes_nothing_of_another(pools: Callable[[int], RankPool], layout: str) -> None:
    """Not one bit of another's logits, of its loss, or of the gradients that come from it; and all of its own."""
    world_size, overrides = LAYOUTS[layout]
    for found in pools(world_size).run(effects, world_size, overrides):
        assert found == dict.fromkeys(found, ALONE)
        assert "loss" in found


FLEX_LAYOUTS = ("one process", "tensor parallel", "allgather, head-tail", "all_to_all, head-tail")
"""One of each that attends to other keys, or cuts them otherwise."""


@pytest.mark.parametrize("layout", FLEX_LAYOUTS)
def test_a_document_changes_nothing_of_another_in_tiles(pools: Callable[[int], RankPool], layout: str) -> None:
    """Not one bit either where FlexAttention leaves out what documents do not see of each other."""
    world_size, overrides = LAYOUTS[layout]
    for found in pools(world_size).run(effects_on_flex, world_size, overrides):
        assert found == dict.fromkeys(found, ALONE)
        assert "loss" in found


@pytest.mark.parametrize("kernel", ["flash", "math", "cpu"])
def test_a_document_changes_nothing_of_another_by_any_kernel(pools: Callable[[int], RankPool], kernel: str) -> None:
    """The kernels that a CPU has keep them apart alike: PyTorch's by a mask, titan's own by what each query sees."""
    (found,) = pools(1).run(effects, 1, (*mesh(), f"training.attention={kernel}"))
    assert found == dict.fromkeys(("loss", "gradients", "logits"), ALONE)


def test_without_the_mask_the_test_sees_a_leak(pools: Callable[[int], RankPool]) -> None:
    """Documents that are not told apart do change what comes after them: the check can fail."""
    (found,) = pools(1).run(effects, 1, mesh(), False)
    assert found["logits"] == found["loss"] == [[True, True, True], [False, True, True], [False, False, True]]
