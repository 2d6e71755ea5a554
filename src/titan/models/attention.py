"""Attention on one device: causal, inside documents where they are told apart.

Shape letters: B batch, S sequence, Q queries, H query heads, K kv heads, E head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return attention of queries that stand at the end of the keys: causal, unless `visible` says more.

    Shape:
        q: (B, H, Q, E). k, v: (B, K, S, E), Q <= S and K divides H. visible: (B, 1, Q, S) bool. Returns (B, H, Q, E).
    """
    queries, keys, heads, kv_heads = q.shape[2], k.shape[2], q.shape[1], k.shape[1]
    if q.device.type == "cpu" and kv_heads != heads:
        # The CPU's fused kernel takes no grouped heads; PyTorch would fall back to materialising the scores.
        k, v = k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
    grouped = k.shape[1] != heads
    if visible is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        mask = causal_lower_right(queries, keys)  # lets SDPA take its flash kernel; torch.compile cannot trace it
    else:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def visible_keys(starts: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Return which keys each query sees: those of its own document up to itself.

    Args:
        starts: Where in its row the document of each query begins.
        queries: Where in the row the queries stand.
        keys: Where in the row the keys stand.

    Shape:
        starts: (B, Q). queries: (Q,) or (B, Q). keys: (S,). Returns (B, 1, Q, S), bool.
    """
    return ((keys <= queries.unsqueeze(-1)) & (keys >= starts.unsqueeze(-1))).unsqueeze(1)


class CausalAttention(nn.Module):
    """Attention in which a position sees itself and what came before. Context parallelism replaces this module."""

    def visible(self, starts: Tensor, positions: Tensor) -> Tensor:
        """Return what `forward` takes as `visible`: once for all blocks. Shape: (B, S), (S,) -> (B, 1, S, S)."""
        return visible_keys(starts, positions, positions)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend.

        Shape:
            q: (B, H, S, E). k, v: (B, K, S, E). visible: (B, 1, S, S). Returns (B, H, S, E).
        """
        return attend(q, k, v, visible)
