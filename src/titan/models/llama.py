"""Llama 2 and 3 as plain single-device PyTorch.

Weights have Meta's names. They are empty until `titan.models.init` draws them. Heads are counted from the size of the
tensor, because tensor parallelism leaves a rank only some of them.

Shape letters: B batch, S sequence, D model, H query heads, K kv heads, E head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from titan.config.schema import ModelConfig
from titan.models.attention import CausalAttention, Visible
from titan.models.decoder import Decoder
from titan.models.family import Cut, ModelFamily
from titan.models.flops import count_parameters, flops_per_token
from titan.models.init import parameter_draw
from titan.models.linear import Linear


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

    def forward(self, x: Tensor, rope: Tensor, visible: Visible | None = None) -> Tensor:
        """Mix positions.

        Shape:
            x: (B, S, D) -> (B, S, D). rope, visible: as `inner.rotary` takes them.
        """
        # -1 and not n_heads: a tensor-parallel rank has only some of the heads.
        q = self.wq(x).unflatten(-1, (-1, self.head_size))
        k = self.wk(x).unflatten(-1, (-1, self.head_size))
        v = self.wv(x).unflatten(-1, (-1, self.head_size))
        return self.wo(self.inner.rotary(q, k, v, rope, visible).flatten(-2))


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

    def forward(self, x: Tensor, rope: Tensor, visible: Visible | None = None) -> Tensor:
        """Transform. Shape: x (B, S, D) -> (B, S, D); the others as `Attention` takes them."""
        x = x + self.attention(self.attention_norm(x), rope, visible)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(Decoder):
    """Tokens in, logits out.

    Args:
        config: The shape.
        seq_len: Positions to prepare rotary angles for; the longest sequence that `forward` will see.
    """

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__(config, seq_len, TransformerBlock)


HUGGING_FACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers.*.attention.wq": "model.layers.*.self_attn.q_proj",
    "layers.*.attention.wk": "model.layers.*.self_attn.k_proj",
    "layers.*.attention.wv": "model.layers.*.self_attn.v_proj",
    "layers.*.attention.wo": "model.layers.*.self_attn.o_proj",
    "layers.*.feed_forward.w1": "model.layers.*.mlp.gate_proj",
    "layers.*.feed_forward.w2": "model.layers.*.mlp.down_proj",
    "layers.*.feed_forward.w3": "model.layers.*.mlp.up_proj",
    "layers.*.attention_norm": "model.layers.*.input_layernorm",
    "layers.*.ffn_norm": "model.layers.*.post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}

LLAMA = ModelFamily(
    build=Llama,
    draw=parameter_draw,
    tensor_plan={
        "tok_embeddings": Cut.words,
        "layers.*.attention_norm": Cut.whole,
        "layers.*.attention": Cut.enter,
        "layers.*.attention.w[qkv]": Cut.rows,
        "layers.*.attention.wo": Cut.columns,
        "layers.*.ffn_norm": Cut.whole,
        "layers.*.feed_forward": Cut.enter,
        "layers.*.feed_forward.w[13]": Cut.rows,
        "layers.*.feed_forward.w2": Cut.columns,
        "norm": Cut.whole,
        "output": Cut.output,
    },
    hugging_face_names=HUGGING_FACE_NAMES,
    count_parameters=count_parameters,
    flops_per_token=flops_per_token,
    rotary=("layers.*.attention.w[qk]",),
)
