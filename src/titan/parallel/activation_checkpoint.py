"""Recompute a block's activations in the backward pass instead of keeping them.

full        keep a block's input only
selective   keep what is expensive to compute again, recompute the rest: see `is_kept`
every_nth   full, for the blocks whose index is a multiple of n
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from titan.config.schema import ActivationCheckpointMode
from titan.models.decoder import Decoder

_MATRIX_PRODUCTS = {"aten.mm", "aten.linear", "aten.addmm", "titan.multiply", "aten._scaled_mm"}
_ALWAYS_KEPT = (
    # Every attention kernel: of SDPA, its inner ones, FlexAttention and what is compiled of it by itself, and the ones
    # for rows of unequal length, which a family of one's own may call.
    "aten._scaled_dot_product",
    "aten._flash_attention_forward",
    "aten._efficient_attention_forward",
    "aten._cudnn_attention_forward",
    "flex_attention",
    "inductor_compiled_code",
    "torch_attn._varlen_attn",
    "titan.attention",
    # What other ranks had to send, but for gathering: its result is larger than its input by the number of ranks.
    "_c10d_functional.reduce_scatter",
    "_c10d_functional.all_reduce",
    "_c10d_functional.all_to_all",
)


def apply_activation_checkpoint(model: Decoder, mode: ActivationCheckpointMode, every: int) -> int:
    """Wrap blocks in place.

    Args:
        model: The model.
        mode: none, full, selective, or every_nth.
        every: With every_nth, wrap the blocks whose index is a multiple of this.

    Returns:
        The number of blocks wrapped.

    Source:
        Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174; selective:
        https://arxiv.org/abs/2205.05198.
    """
    if mode is ActivationCheckpointMode.none:
        return 0
    step = every if mode is ActivationCheckpointMode.every_nth else 1
    chosen = [name for name in model.layers if int(name) % step == 0]
    # The model draws no random numbers, so their state need not be kept for the second forward.
    options: dict[str, Any] = {"preserve_rng_state": False}
    if mode is ActivationCheckpointMode.selective:
        options["context_fn"] = _selective_contexts
    for name in chosen:
        model.layers[name] = checkpoint_wrapper(model.layers[name], **options)
    return len(chosen)


def is_kept(operator: Any, counts: dict[str, int], phase: str) -> bool:
    """Return whether an operator's result is kept under selective checkpointing.

    Kept are attention, what came from other ranks, and every second matrix product; a norm, an activation or a
    rotation costs little to do again and much to keep.

    Args:
        operator: The operator about to run.
        counts: Matrix products so far in this block, by phase; changed by the call.
        phase: forward or recompute.
    """
    name = f"{operator.namespace}.{operator._opname}" if hasattr(operator, "_opname") else str(operator)
    if name.startswith(_ALWAYS_KEPT):
        return True
    if name not in _MATRIX_PRODUCTS:
        return False
    counts[phase] = counts.get(phase, 0) + 1
    return counts[phase] % 2 == 1


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, {}))


def _policy(counts: dict[str, int], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = is_kept(operator, counts, "recompute" if context.is_recompute else "forward")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
