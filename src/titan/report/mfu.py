"""The two conventions for MFU, which differ in how much of attention counts.

Full counts every product of a query with a key, also those that the causal mask throws away: PaLM, Megatron,
TorchTitan, and `mfu` in metrics.jsonl. Causal counts the half that is needed. Both over the same peak, so the second
is a fixed share of the first; nothing here is measured anew.
"""

from __future__ import annotations

from typing import Any

FULL_FORMULA = "6 x N + 12 x L x H x D x S"
CAUSAL_FORMULA = "6 x N + 6 x L x H x D x S"
LETTERS = (
    "FLOPs a token, forward and backward: N parameters in matrix products (the embedding does not count, the output "
    "projection does), L layers, H heads of size D, S tokens a row. MFU is that times tokens a second on one device, "
    "divided by the dense bfloat16 peak of its data sheet. Recomputed activations do not count."
)

_KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")


def flops_per_token(config: dict[str, Any]) -> tuple[int, int] | None:
    """Return a Llama's FLOPs a token by the full and by the causal convention; None for another family.

    Args:
        config: By dotted keys.
    """
    sizes = [config.get(f"model.{key}") for key in _KEYS] + [config.get("training.seq_len")]
    if config.get("model.family") != "llama" or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    from titan.config.schema import ModelConfig
    from titan.models import flops

    dim, layers, heads, kv_heads, ffn_dim, words, seq_len = (int(size) for size in sizes if isinstance(size, int))
    model = ModelConfig("", dim, layers, heads, kv_heads, ffn_dim, words, seq_len)
    full = flops.flops_per_token(model, seq_len)
    return full, full - 6 * layers * heads * (dim // heads) * seq_len


def causal_share(config: dict[str, Any]) -> float | None:
    """Return what the causal convention's MFU is of the full one's; None where it is not known."""
    flops = flops_per_token(config)
    return None if flops is None else flops[1] / flops[0]
