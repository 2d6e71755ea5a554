"""A family of models from outside: `model.family=tests.support.toy_family:TOY`.

Unlike Llama where it can be: attention and feed-forward side by side, LayerNorm with biases, GELU, biases where a
matrix is cut by rows, and a norm on queries and keys that every rank applies to its own heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from titan.config.schema import ModelConfig
from titan.models.attention import CausalAttention
from titan.models.decoder import Decoder
from titan.models.family import Cut, ModelFamily
from titan.models.init import Draw
from titan.models.linear import Linear
from titan.models.rope import apply_rope


class ToyAttention(nn.Module):
    """Attention with normed queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.dim // config.n_heads
        self.q = Linear(config.dim, config.dim)
        self.kv = nn.ModuleList([Linear(config.dim, config.n_kv_heads * self.head_size) for _ in range(2)])
        self.head_norm = nn.LayerNorm(self.head_size)
        self.out = Linear(config.dim, config.dim)
        self.mix = CausalAttention()

    def forward(self, x: Tensor, rope: Tensor, visible: Tensor | None) -> Tensor:
        """Mix positions."""
        q, k, v = (matrix(x).unflatten(-1, (-1, self.head_size)) for matrix in (self.q, *self.kv))
        q, k = (apply_rope(self.head_norm(each), rope) for each in (q, k))
        mixed = self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class ToyMlp(nn.Module):
    """GELU between two matrices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position."""
        return self.down(F.gelu(self.up(x)))


class ToyBlock(nn.Module):
    """Attention and feed-forward behind one norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.attention = ToyAttention(config)
        self.mlp = ToyMlp(config)

    def forward(self, x: Tensor, rope: Tensor, visible: Tensor | None = None) -> Tensor:
        """Transform."""
        normed = self.norm(x)
        return x + self.attention(normed, rope, visible) + self.mlp(normed)


class Toy(Decoder):
    """The whole."""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__(config, seq_len, ToyBlock)


def draw(name: str, config: ModelConfig) -> Draw | None:
    """Weights of norms are ones, all others are small."""
    if "norm" in name and name.endswith("weight"):
        return None
    return lambda block, generator: block.normal_(std=0.05, generator=generator)


def count_parameters(config: ModelConfig) -> int:
    """Count."""
    head_size = config.dim // config.n_heads
    attention = 2 * config.dim * config.dim + 2 * config.dim * config.n_kv_heads * head_size + 2 * head_size
    mlp = 2 * config.dim * config.ffn_dim + config.ffn_dim
    return config.n_layers * (attention + mlp + 2 * config.dim) + 2 * config.vocab_size * config.dim + config.dim


TOY = ModelFamily(
    build=Toy,
    draw=draw,
    tensor_plan={
        "tok_embeddings": Cut.words,
        "layers.*.norm": Cut.whole,
        "layers.*.attention": Cut.enter,
        "layers.*.attention.q": Cut.rows,
        "layers.*.attention.kv.*": Cut.rows,
        "layers.*.attention.head_norm": Cut.shared,
        "layers.*.attention.out": Cut.columns,
        "layers.*.mlp": Cut.enter,
        "layers.*.mlp.up": Cut.rows,
        "layers.*.mlp.down": Cut.columns,
        "norm": Cut.whole,
        "output": Cut.output,
    },
    hugging_face_names={},
    count_parameters=count_parameters,
    flops_per_token=lambda config, seq_len: 6 * count_parameters(config),
)

FORGETFUL = ModelFamily(
    TOY.build,
    TOY.draw,
    {pattern: cut for pattern, cut in TOY.tensor_plan.items() if not pattern.endswith("head_norm")},
    TOY.hugging_face_names,
    TOY.count_parameters,
    TOY.flops_per_token,
)
"""A plan that forgets a module."""
