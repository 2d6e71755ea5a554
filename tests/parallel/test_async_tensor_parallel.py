"""Asynchronous tensor parallelism: the compiler finds every exchange of a block and the product beside it.

The fused kernels need CUDA; that they are put where they belong does not. The graphs are taken after PyTorch's own
decompositions, as its pass for this takes them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan.config.schema import ActivationCheckpointMode
from titan.models import linear
from titan.models.llama import LLAMA
from titan.parallel.activation_checkpoint import apply_activation_checkpoint
from titan.parallel.mesh import build_mesh
from titan.parallel.tensor import apply_tensor_parallel, unwrap_weights_before

from .layouts import layout_config

RANKS, SEQ_LEN = 4, 64


def fused_graphs(mode: ActivationCheckpointMode) -> list[Counter[str]]:
    """Return the fused and the left-over exchanges of a block's forward and backward graph."""
    # imported here, where the test ignores what torch's own modules warn of
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import view_to_reshape
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import micro_pipeline_tp

    config = layout_config(RANKS, (f"parallelism.tp={RANKS}", f"training.seq_len={SEQ_LEN}"))
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        mesh = build_mesh(config.parallelism, "cpu")
        with torch.device("meta"):
            model = LLAMA.build(config.model, SEQ_LEN)
        apply_tensor_parallel(model, LLAMA.cut_of, mesh.tp, sequence_parallel=True, loss_parallel=True)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.init_buffers("cpu")
        apply_activation_checkpoint(model, mode, 2)
        block = model.layers["0"]
        unwrap_weights_before(block)
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)  # type: ignore[method-assign]
        x = torch.randn(2, SEQ_LEN // RANKS, config.model.dim, dtype=torch.bfloat16, requires_grad=True)
        block(x, model.rope[:SEQ_LEN]).sum().backward()
        found = []
        for graph in graphs:
            view_to_reshape(graph)
            with (
                mock.patch.object(torch.distributed, "is_nccl_available", return_value=True),
                mock.patch.object(symmetric_memory, "is_symm_mem_enabled_for_group", return_value=True),
            ):
                micro_pipeline_tp.micro_pipeline_tp_pass(graph.graph)
            names = [str(node.target).split(".")[1] for node in graph.graph.nodes if "." in str(node.target)]
            found.append(
                Counter(name for name in names if "fused" in name or "gather_into" in name or "scatter_" in name)
            )
    finally:
        dist.destroy_process_group()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_every_exchange_of_the_forward_pass_is_fused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gathers and two reduce-scatters a block, each with its product; in the backward pass, the gathers."""
    monkeypatch.setattr(linear, "_WIDENS_BFLOAT16", False)  # products as on a GPU, whatever this CPU has
    forward, backward = fused_graphs(ActivationCheckpointMode[mode])
    assert forward == {"fused_all_gather_matmul": 2, "fused_matmul_reduce_scatter": 2}
    assert backward["fused_all_gather_matmul"] >= 2
    assert backward["all_gather_into_tensor"] == 0
