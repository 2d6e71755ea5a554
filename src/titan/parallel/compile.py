"""torch.compile, one transformer block at a time: the blocks are alike, so one compilation serves them all."""

from __future__ import annotations

import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist

from titan.models.decoder import Decoder
from titan.parallel.tensor import unwrap_weights_before


def apply_compile(
    model: Decoder, backend: str, memory_budget: float = 1.0, async_group: dist.ProcessGroup | None = None
) -> None:
    """Compile every block in place. After activation checkpointing, so that it lies inside the graph.

    What is compiled is `forward` and not the call, so that the hooks of FSDP and of tensor parallelism stay outside.

    Args:
        model: Its blocks not yet wrapped by FSDP.
        backend: By PyTorch's name.
        memory_budget: What the compiler may keep for the backward pass, as a share of what it would keep.
        async_group: Ranks whose exchanges are to overlap with matrix products, on CUDA; None overlaps nothing.
    """
    # Both are settings of the process and are read when a block is compiled, at its first call.
    torch._functorch.config.activation_memory_budget = memory_budget
    torch._inductor.config._micro_pipeline_tp = async_group is not None
    if async_group is not None:
        _enable_symmetric_memory(async_group)
    for block in model.layers.values():
        unwrap_weights_before(block)
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)  # type: ignore[method-assign]


def _enable_symmetric_memory(group: dist.ProcessGroup) -> None:
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
