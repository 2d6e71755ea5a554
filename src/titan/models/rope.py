"""Rotary position embeddings: each pair of numbers of a head is turned by an angle that grows with the position.

Llama's own convention, in which neighbours (0, 1), (2, 3), ... form the pairs. Hugging Face stores the same weights
with each head's rows reordered so that the pairs are (0, E/2), (1, E/2 + 1), ...; the two agree after that
reordering. The arithmetic is real, not complex, so that torch.compile can fuse it.

Shape letters: B batch, S sequence, H heads, E head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titan.config.schema import ModelConfig, RopeScalingConfig


def build_rope_cache(config: ModelConfig, seq_len: int, device: torch.device | str | None = None) -> Tensor:
    """Return cosine and sine of every angle.

    Shape:
        (seq_len, E/2, 2), float32; the last dim holds cosine and sine.
    """
    # In float64, because an angle is a position of up to 10^5 times a frequency and float32 keeps 7 digits of it.
    frequencies = rope_frequencies(config).to(device)
    positions = torch.arange(seq_len, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Return the angle by which each pair turns at each position, in radians.

    Shape:
        (E/2,), float64.
    """
    head_size = config.dim // config.n_heads
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    frequencies = config.rope_theta**-exponents
    return frequencies if config.rope_scaling is None else scale_frequencies(frequencies, config.rope_scaling)


def scale_frequencies(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Slow the low frequencies down, so that a longer context turns them no further than training did.

    Source:
        Llama 3.1, https://arxiv.org/abs/2407.21783, section 3.2, and its reference implementation.
    """
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_seq_len / scaling.high_freq_factor
    shortest_slowed = scaling.original_seq_len / scaling.low_freq_factor
    blend = (scaling.original_seq_len / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slowed = torch.where(wavelengths > shortest_slowed, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < longest_kept, frequencies, slowed)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Turn every pair of `x` by its position's angle.

    Computed in float32 and returned in the dtype of `x`: bfloat16 cosines would lose far positions.

    Shape:
        x: (B, S, H, E). rope: (S, E/2, 2), or (B, S, E/2, 2) where rows have positions of their own.
    """
    cos, sin = rope.unsqueeze(-3).unbind(-1)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).type_as(x)
