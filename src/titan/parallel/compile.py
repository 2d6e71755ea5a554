"""torch.compile, one transformer block at a time: the blocks are alike, so one compilation serves them all.

The last norm and the loss are compiled too, each by itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist

from titan.config.schema import CompileConfig, CompileMode
from titan.errors import ConfigError, Problem
from titan.models.decoder import Decoder
from titan.parallel.loss import compile_loss
from titan.parallel.tensor import unwrap_weights_before


def apply_compile(
    model: Decoder, config: CompileConfig, memory_budget: float = 1.0, async_group: dist.ProcessGroup | None = None
) -> None:
    """Compile every block, the last norm and the loss, in place. After activation checkpointing, which graphs contain.

    What is compiled is `forward` and not the call, so that the hooks of FSDP and of tensor parallelism stay outside.

    Args:
        model: Its blocks not yet wrapped by FSDP.
        config: How.
        memory_budget: What the compiler may keep for the backward pass, as a share of what it would keep.
        async_group: Ranks whose exchanges are to overlap with matrix products, on CUDA; None overlaps nothing.
    """
    # Both are settings of the process and are read when a block is compiled, at its first call.
    torch._functorch.config.activation_memory_budget = memory_budget
    torch._inductor.config._micro_pipeline_tp = async_group is not None
    if async_group is not None:
        _enable_symmetric_memory(async_group)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        mode = None if config.mode is CompileMode.default else config.mode.value
        return torch.compile(function, backend=config.backend, mode=mode, dynamic=config.dynamic, fullgraph=True)

    last = () if model.norm is None else (model.norm,)  # which takes several passes on a CPU if it is not compiled
    for module in (*model.layers.values(), *last):
        unwrap_weights_before(module)
        module.forward = compiled(module.forward)  # type: ignore[method-assign]
    if config.loss:
        compile_loss(model, compiled)


def check_backend(config: CompileConfig) -> None:
    """See that PyTorch has the compiler's backend, its own or one that a package has registered.

    Raises:
        ConfigError: If it has none of this name.
    """
    if not config.enable or config.backend == "inductor":
        return
    names = torch._dynamo.list_backends(exclude_tags=None)
    if config.backend not in names:
        near = difflib.get_close_matches(config.backend, names, n=1, cutoff=0.6) or ["inductor"]
        raise ConfigError(
            [
                Problem(
                    f"compile.backend = {config.backend} is no backend of PyTorch's compiler",
                    f"There are: {', '.join(each for each in names if 'TESTING' not in each)}",
                    f"compile.backend={near[0]}",
                )
            ]
        )


def count_graphs() -> int:
    """Return how many graphs this process has compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def mark_cuda_graphs() -> None:
    """Tell CUDA graphs that what the micro-batch before has computed is not needed any more.

    By itself PyTorch takes every block for a new beginning where no backward pass follows, as in a validation, and what
    one block hands to the next would be overwritten.
    """
    torch.compiler.cudagraph_mark_step_begin()


def _enable_symmetric_memory(group: dist.ProcessGroup) -> None:
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
