"""Compiling block by block: one graph serves all blocks, on every mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from titan.config.schema import CompileConfig
from titan.errors import ConfigError
from titan.parallel.compile import check_backend

from .layouts import record_layout
from .matrix import mesh
from .pool import RankPool


def count_graphs(world_size: int, overrides: tuple[str, ...], packed: Path) -> int:
    """Return how many graphs a rank compiled while training some steps."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    record_layout(world_size, overrides, packed)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "layout",
    [
        mesh(dp_shard=2),
        pytest.param(mesh(cp=2), marks=pytest.mark.slow),
        (*mesh(tp=2), "activation_checkpoint=full"),
        (*mesh(dp_shard=2), "data.mask_documents=true"),
        (*mesh(pp=2), "training.local_batch_size=4"),
        (*mesh(dp_shard=2), "model.dim=64", "float8=tensorwise", "float8.emulate=true"),
        pytest.param((*mesh(tp=2), "model.dim=64", "float8=rowwise", "float8.emulate=true"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_all_blocks_share_one_graph(
    pools: Callable[[int], RankPool], packed_file: Path, layout: tuple[str, ...]
) -> None:
    """Four blocks and three steps are compiled once, and once more for validations, which need no backward pass.

    The rank that has the output compiles the last norm, as often, and the loss beside them, unless it is told not to.
    """
    overrides = (*layout, "compile=inductor", "compile.backend=aot_eager")
    first = 2 if "parallelism.pp=2" in layout else 5
    assert pools(2).run(count_graphs, 2, overrides, packed_file) == [first, 5]
    if layout == mesh(dp_shard=2):
        assert pools(2).run(count_graphs, 2, (*overrides, "compile.loss=false"), packed_file) == [4, 4]


def test_a_backend_that_is_none_is_told_by_name() -> None:
    """Any backend that PyTorch knows is taken, a package's own included; of others the error names those there are."""
    import torch._dynamo

    for name in ("inductor", "aot_eager", "eager"):
        check_backend(CompileConfig(enable=True, backend=name))
    mine = CompileConfig(enable=True, backend="eagre_of_mine")
    with pytest.raises(ConfigError, match=r"eagre_of_mine is no backend(.|\n)*aot_eager"):
        check_backend(mine)
    check_backend(CompileConfig(enable=False, backend="eagre_of_mine"))
    torch._dynamo.register_backend(lambda graph, inputs: graph.forward, name="eagre_of_mine")
    check_backend(mine)
