"""How many parameters, how many floating-point operations, and how fast a device could be.

The formula for training, for each token:

    6 x (parameters in matrix products)  +  12 x layers x heads x head size x sequence length

The first term counts 2 operations a weight in the forward pass and 4 in the backward pass; the embedding is a
look-up and does not count, the output projection does, tied or not. The second counts both products of attention over
the whole sequence, although a causal mask needs only half of it: that is the convention of PaLM, Megatron and
TorchTitan, so figures can be compared. Operations that activation checkpointing repeats do not count.

Source:
    PaLM, https://arxiv.org/abs/2204.02311, appendix B.
"""

from __future__ import annotations

import re

from titan.config.schema import Dtype, ModelConfig

PEAK_TFLOPS = {
    # dense bfloat16, from the vendors' data sheets; the longest name that fits decides
    "A100": 312.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "L40S": 362.0,
    "MI250X": 191.5,  # of one of its two dies, which is what PyTorch shows as a device
    "MI300X": 1300.0,
}
"""Peak of known devices in TFLOP/s."""


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters; a tied output projection is not counted twice."""
    return (
        count_matrix_parameters(config)
        + _count_norms(config)
        + (0 if config.tie_embeddings else config.vocab_size * config.dim)
    )


def count_matrix_parameters(config: ModelConfig) -> int:
    """Return the parameters that take part in matrix products, the output projection included."""
    head_size = config.dim // config.n_heads
    attention = config.dim * head_size * (2 * config.n_heads + 2 * config.n_kv_heads)
    feed_forward = 3 * config.dim * config.ffn_dim
    return config.n_layers * (attention + feed_forward) + config.vocab_size * config.dim


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the floating-point operations of forward and backward for each token."""
    head_size = config.dim // config.n_heads
    attention = 12 * config.n_layers * config.n_heads * head_size * seq_len
    return 6 * count_matrix_parameters(config) + attention


def peak_tflops(device_name: str, dtype: Dtype) -> float | None:
    """Return a device's peak in TFLOP/s, or None where it is not known, as on every CPU.

    Only for bfloat16: what PyTorch does for float32 depends on its TF32 setting.
    """
    if dtype is not Dtype.bfloat16:
        return None
    # As a word of its own, or an RTX A1000 would have the peak of an A100.
    fitting = [
        key for key in PEAK_TFLOPS if re.search(rf"(?<![A-Z0-9]){key}(?![0-9])", device_name, flags=re.IGNORECASE)
    ]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def _count_norms(config: ModelConfig) -> int:
    return (2 * config.n_layers + 1) * config.dim
