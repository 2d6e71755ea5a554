"""AdamW with weight decay on the matrices only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from titan.config.schema import Dtype, OptimizerConfig
from titan.optim.adamw import AdamW


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    device: torch.device,
    compile_with: str | None = None,
) -> AdamW:
    """Return AdamW over two groups: parameters that decay and parameters that do not.

    Norms, biases and embeddings do not decay unless the config asks: decay pulls towards zero, and zero means
    nothing for a scale or for a word that a batch did not hold.

    Args:
        named_parameters: This rank's.
        config: How.
        device: The one that computes.
        compile_with: The backend that compiles the update; None takes PyTorch's fused kernel.
    """
    decaying, others = [], []
    for name, parameter in named_parameters:
        (decaying if has_weight_decay(name, parameter, config) else others).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    options = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": device.type in ("cpu", "cuda"),
    }
    return AdamW([group for group in groups if group["params"]], state_dtype_of(config), compile_with, **options)


def state_dtype_of(config: OptimizerConfig) -> torch.dtype | None:
    """Return the format of the moments; None for that of the parameters, float32."""
    return torch.bfloat16 if config.state_dtype is Dtype.bfloat16 else None


def has_weight_decay(name: str, parameter: nn.Parameter, config: OptimizerConfig) -> bool:
    """Return whether the parameter of this name decays."""
    if "tok_embeddings" in name:
        return config.decay_embeddings
    return parameter.ndim >= 2 or config.decay_norms
