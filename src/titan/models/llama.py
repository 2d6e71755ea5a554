"""Llama 2 and 3 as plain single-device PyTorch.

Nothing here knows of ranks: parallelism is applied from outside (`titan.parallel.apply`). Three habits keep that
possible. Blocks live in a ModuleDict keyed by their index, so that a pipeline stage that owns blocks 8 to 15 keeps
their names; the embedding, the last norm and the output may be None, in a stage that does not own them; and heads
are counted from the size of the tensor, because tensor parallelism leaves a rank only some of them.

Weights have Meta's names. They are empty until `titan.models.init` draws them.

Shape letters: B batch, S sequence, D model, H query heads, K kv heads, E head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from titan.config.schema import ModelConfig
from titan.models.linear import Linear
from titan.models.rope import apply_rope, build_rope_cache


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of queries that stand at the end of the keys.

    Shape:
        q: (B, H, Q, E). k, v: (B, K, S, E), Q <= S and K divides H. Returns (B, H, Q, E).
    """
    queries, keys, heads, kv_heads = q.shape[2], k.shape[2], q.shape[1], k.shape[1]
    if q.device.type == "cpu" and kv_heads != heads:
        # The CPU's fused kernel takes no grouped heads; PyTorch would fall back to materialising the scores.
        k, v = k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
    grouped = k.shape[1] != heads
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        mask = causal_lower_right(queries, keys)  # lets SDPA take its flash kernel; torch.compile cannot trace it
    else:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


class CausalAttention(nn.Module):
    """Attention in which a position sees itself and what came before. Context parallelism replaces this module."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Shape:
            q: (B, H, S, E). k, v: (B, K, S, E). Returns (B, H, S, E).
        """
        return attend(q, k, v)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.dim // config.n_heads
        self.wq = Linear(config.dim, config.n_heads * self.head_size)
        self.wk = Linear(config.dim, config.n_kv_heads * self.head_size)
        self.wv = Linear(config.dim, config.n_kv_heads * self.head_size)
        self.wo = Linear(config.n_heads * self.head_size, config.dim)
        self.inner = CausalAttention()

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Mix positions.

        Shape:
            x: (B, S, D) -> (B, S, D). rope: as `apply_rope` takes it.
        """
        # -1 and not n_heads: a tensor-parallel rank has only some of the heads.
        q = self.wq(x).unflatten(-1, (-1, self.head_size))
        k = self.wk(x).unflatten(-1, (-1, self.head_size))
        v = self.wv(x).unflatten(-1, (-1, self.head_size))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        mixed = self.inner(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.wo(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.w3 = Linear(config.dim, config.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position on its own. Shape: (B, S, D) -> (B, S, D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Transform. Shape: x (B, S, D) -> (B, S, D); rope as `apply_rope` takes it."""
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Tokens in, logits out.

    Args:
        config: The shape.
        seq_len: Positions to prepare rotary angles for; the longest sequence that `forward` will see.
    """

    rope: Tensor

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        self.config = config
        self.seq_len = seq_len
        self.tok_embeddings: nn.Module | None = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(config) for i in range(config.n_layers)})
        self.norm: nn.Module | None = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output: nn.Module | None = Linear(config.dim, config.vocab_size)
        self.register_buffer("rope", torch.empty(seq_len, 0, 2), persistent=False)
        self.positions: Tensor | None = None
        """Where the tokens that `forward` gets stand in their row, if not at 0, 1, 2, ...: (S,) int64."""
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output projection share the embedding's weights, where the config says so.

        NOTE: to be repeated after anything that replaces parameters one by one, such as `to_empty`.
        """
        if self.config.tie_embeddings and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    def init_buffers(self, device: torch.device | str) -> None:
        """Compute the rotary angles; a model built on meta has none."""
        self.rope = build_rope_cache(self.config, self.seq_len, device)
        if self.positions is not None:
            self.positions = self.positions.to(device)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Predict the next token at every position.

        Args:
            tokens: Token ids; in a pipeline stage without the embedding, the hidden states of the stage before.
            positions: Where each token stands in its document; None takes `self.positions`, or counts from 0.

        Shape:
            tokens: (B, S) int64, or (B, S, D). positions: (S,) or (B, S). Returns (B, S, V), or (B, S, D) from a
            stage without the output.
        """
        x = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        positions = self.positions if positions is None else positions
        if positions is not None:
            rope = self.rope[positions]
        else:  # hidden states may be cut along the sequence, tokens never are
            rope = self.rope[: tokens.shape[1]] if self.tok_embeddings is not None else self.rope
        for block in self.layers.values():
            x = block(x, rope)
        x = self.norm(x) if self.norm is not None else x
        return self.output(x) if self.output is not None else x
