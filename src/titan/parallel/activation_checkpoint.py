"""Recompute a block's activations in the backward pass instead of keeping them."""

from __future__ import annotations

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from titan.config.schema import ActivationCheckpointMode
from titan.models.llama import Llama


def apply_activation_checkpoint(model: Llama, mode: ActivationCheckpointMode, every: int) -> int:
    """Wrap blocks in place.

    Args:
        model: The model.
        mode: none, full, or every_nth.
        every: With every_nth, wrap the blocks whose index is a multiple of this.

    Returns:
        The number of blocks wrapped.

    Source:
        Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174.
    """
    if mode is ActivationCheckpointMode.none:
        return 0
    step = 1 if mode is ActivationCheckpointMode.full else every
    chosen = [name for name in model.layers if int(name) % step == 0]
    for name in chosen:
        # The model draws no random numbers, so their state need not be kept for the second forward.
        model.layers[name] = checkpoint_wrapper(model.layers[name], preserve_rng_state=False)
    return len(chosen)
