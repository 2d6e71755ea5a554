"""FSDP2: weights, gradients and optimizer states shared out over dp_shard x cp, replicated over dp_replicate.

Applied also at degree 1 wherever there are several ranks, so that they have one code path; what it gathers there is a
copy, which is kept from forward to backward. A single rank does without: `titan.parallel.precision`. Gradients are
*summed*, never averaged: the loss is already divided by the number of tokens of the whole global batch
(`titan.trainer.loss`).

Source:
    ZeRO, https://arxiv.org/abs/1910.02054; PyTorch FSDP, https://arxiv.org/abs/2304.11277.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from titan.config.degrees import frees_blocks
from titan.config.schema import ReshardAfterForward
from titan.models.decoder import Decoder


def apply_fsdp(
    model: Decoder,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: ReshardAfterForward = ReshardAfterForward.default,
    has_pipeline: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Shard every block, the two ends, and the model around them, in place.

    Args:
        model: On meta or on a device.
        mesh: (fsdp,), or (dp_replicate, fsdp).
        param_dtype: What weights are gathered in and activations computed in.
        reduce_dtype: What gradients are summed in.
        reshard_after_forward: Whether gathered weights are freed until the backward pass.
        has_pipeline: Whether forward runs once a microbatch; then "default" keeps weights gathered, because gathering
            them again for each microbatch would cost more than it saves. So it does where one rank has all weights.
        cpu_offload: Whether shards, gradients and with them the optimizer live in the CPU's memory.
    """
    # Inputs are not cast: the rotary angles have to stay in float32.
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    reshard = frees_blocks(reshard_after_forward, has_pipeline, mesh.size(-1))
    # Pinned memory is what a GPU fetches from by itself.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for block in model.layers.values():
        shard(block, reshard_after_forward=reshard)
    ends = _ends(model)
    if model.tok_embeddings is not None and model.tok_embeddings not in ends:
        shard(model.tok_embeddings, reshard_after_forward=reshard)
    if ends:
        # Last in forward and first in backward: freeing them in between would only mean to gather them again.
        shard(ends, reshard_after_forward=reshard_after_forward is ReshardAfterForward.always)
    shard(model)
    for module in model.modules():
        # A single rank sums by itself; told to divide by 1 it would make a copy more (2.11 to 2.13).
        if isinstance(module, FSDPModule) and mesh.size() > 1:
            module.set_gradient_divide_factor(1.0)
            # or gloo is asked for a fused multiply-and-sum, which it does not have
            module.set_force_sum_reduction_for_comms(True)


def begin_micro_batch(model: Decoder, reshard_after_forward: ReshardAfterForward, ranks: int, is_last: bool) -> None:
    """Tell FSDP which of a step's micro-batches comes next, so that nothing travels without need between them.

    Gradients are summed over the ranks once, in the last one's backward pass. And weights that stay gathered from
    forward to backward stay so up to the last one's: until the update they do not change. That takes no more memory
    than the last micro-batch does, which has the sum of the others' gradients beside them.

    Args:
        model: Whole, with FSDP applied.
        reshard_after_forward: As it was applied.
        ranks: How many share out the weights.
        is_last: Whether it is the last.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(is_last)
    if not frees_blocks(reshard_after_forward, has_pipeline=False, ranks=ranks):
        model.set_reshard_after_backward(is_last)
    elif reshard_after_forward is ReshardAfterForward.default:
        for module in _ends(model):
            assert isinstance(module, FSDPModule), "applied"
            module.set_reshard_after_backward(is_last, recurse=False)


def _ends(model: Decoder) -> list[nn.Module]:
    """Return what is gathered as one at the end of the model."""
    # A shared parameter can belong to one group only.
    embedding = model.tok_embeddings if model.config.tie_embeddings else None
    return [module for module in (embedding, model.norm, model.output) if module is not None]


def forget_forward(model: nn.Module) -> None:
    """Leave FSDP as a backward pass would have, after a forward pass that none follows.

    It keeps the last weights that it has gathered until the backward pass, and notes in which order that will want
    the others. What is kept would go stale, and what is noted would have the next backward pass gather weights that
    it does not want.
    """
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.reshard()
        state: Any = module._get_fsdp_state()
        # one group or None until torch 2.12, a list of groups since; there is no public way to it (2.13)
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None:
                group._post_forward_indices.clear()
        if hasattr(state._comm_ctx, "post_forward_order"):
            state._comm_ctx.post_forward_order.clear()
