"""The learning rate as a plain function of the step: up, level, down.

No scheduler object, so there is no state to save and nothing that can fall out of step with the optimizer.
"""

from __future__ import annotations

import math

import torch

from titan.config.schema import DecayType, LrSchedulerConfig


def lr_factor(step: int, total_steps: int, config: LrSchedulerConfig) -> float:
    """Return the learning rate of a step as a share of its peak.

    The warm-up rises to the peak in `warmup_steps` equal steps, the first of which is already above zero. The decay
    takes the last `decay_ratio` of all steps, or all that follows the warm-up, and would reach `min_lr_factor` in the
    step after the last. Where warm-up and decay overlap, the warm-up wins.

    Args:
        step: Counted from 0.
        total_steps: Steps of the whole run.
        config: The shape.

    Source:
        Warm-up, stable, decay: MiniCPM, https://arxiv.org/abs/2404.06395; the square root:
        https://arxiv.org/abs/2405.18392.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    left = total_steps - config.warmup_steps
    decay_steps = left if config.decay_ratio is None else min(left, round(total_steps * config.decay_ratio))
    into_decay = step - (total_steps - decay_steps)
    if into_decay < 0 or decay_steps <= 0:
        return 1.0
    progress = min(1.0, into_decay / decay_steps)
    shape = {
        DecayType.linear: 1 - progress,
        DecayType.cosine: 0.5 * (1 + math.cos(math.pi * progress)),
        DecayType.sqrt: 1 - math.sqrt(progress),
    }[config.decay_type]
    return config.min_lr_factor + (1 - config.min_lr_factor) * shape


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
