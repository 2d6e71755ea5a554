"""Llama once more, as short as it gets: the conventions of others, to hold titan's own model against.

Everything is computed from the files as the others store them, and from their configs as they write them: names, the
order of rows, rotary positions. It shares no code with `titan.models`. A matrix is read when it is needed and let go.

Shape letters: B batch, S sequence, D model, H heads, E head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Read = Callable[[str], Tensor]
ROWS_AT_ONCE = 8192
"""Rows of the output matrix that are in float32 at one time."""
_HUGGING_FACE = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
}
_META = {
    "embedding": "tok_embeddings.weight",
    "attention_norm": "layers.{}.attention_norm.weight",
    **{letter: f"layers.{{}}.attention.w{letter}.weight" for letter in "qkvo"},
    "ffn_norm": "layers.{}.ffn_norm.weight",
    "gate": "layers.{}.feed_forward.w1.weight",
    "up": "layers.{}.feed_forward.w3.weight",
    "down": "layers.{}.feed_forward.w2.weight",
    "norm": "norm.weight",
    "output": "output.weight",
}


@dataclass(frozen=True)
class Reference:
    """A Llama in another convention."""

    read: Read
    """Returns a tensor by the other's name, as it is stored."""
    names: Mapping[str, str]
    heads: int
    kv_heads: int
    eps: float
    angles: Tensor
    """What each pair of a head is turned by, in radians: (S, E/2), float64."""
    turn: Callable[[Tensor, Tensor], Tensor]
    """Turns (B, H, S, E) by the angles."""

    def weight(self, part: str, index: int | str = "") -> Tensor:
        """Return a tensor in float32."""
        return self.read(self.names[part].format(index)).float()

    def embed(self, tokens: Tensor) -> Tensor:
        """Shape: (B, S) -> (B, S, D)."""
        return self.read(self.names["embedding"])[tokens].float()

    def block(self, index: int, x: Tensor) -> Tensor:
        """Shape: (B, S, D) both."""
        x = x + self._attention(index, self._normed(x, "attention_norm", index))
        h = self._normed(x, "ffn_norm", index)
        gate = h @ self.weight("gate", index).T
        return x + (gate * gate.sigmoid() * (h @ self.weight("up", index).T)) @ self.weight("down", index).T

    def logits(self, x: Tensor) -> Tensor:
        """Shape: (B, S, D) -> (B, S, V)."""
        return multiply(self._normed(x, "norm"), self.read(self.names["output"]))

    def _attention(self, index: int, h: Tensor) -> Tensor:
        counts = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        q, k, v = (
            (h @ self.weight(part, index).T).unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in counts.items()
        )
        q, k = self.turn(q, self.angles), self.turn(k, self.angles)
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(-2) @ self.weight("o", index).T

    def _normed(self, x: Tensor, part: str, index: int | str = "") -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight(part, index)


def hugging_face_reference(content: dict[str, Any], read: Read, positions: Tensor) -> Reference:
    """Return the model that a config.json and its tensors describe, at some positions.

    Source:
        transformers, models/llama/modeling_llama.py and modeling_rope_utils.py.
    """
    heads = content["num_attention_heads"]
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    size = content["hidden_size"] // heads
    theta = rope.get("rope_theta") or content.get("rope_theta", 10000.0)
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    if rope.get("rope_type", rope.get("type")) == "llama3":
        limits = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        frequencies = _slowed(frequencies, rope["factor"], *limits)
    names = dict(_HUGGING_FACE)
    if content.get("tie_word_embeddings"):
        names["output"] = names["embedding"]
    return Reference(
        read,
        names,
        heads,
        content.get("num_key_value_heads") or heads,
        content.get("rms_norm_eps", 1e-6),
        torch.outer(positions.double(), frequencies),
        turn_halves,
    )


def meta_reference(params: dict[str, Any], read: Read, positions: Tensor, factor: float, is_tied: bool) -> Reference:
    """Return the model that a params.json and its tensors describe, at some positions.

    Args:
        params: As they are in the file.
        read: Returns a tensor whole, by Meta's name.
        positions: Of the tokens.
        factor: By which low frequencies are slowed, with use_scaled_rope.
        is_tied: Whether the output is the embedding.

    Source:
        Meta's llama-models, models/llama3/model.py.
    """
    heads = params["n_heads"]
    size = params["dim"] // heads
    theta = params.get("rope_theta", 10000.0)
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    if params.get("use_scaled_rope"):
        frequencies = _slowed(frequencies, factor, 1.0, 4.0, 8192)
    names = _META | ({"output": _META["embedding"]} if is_tied else {})
    angles = torch.outer(positions.double(), frequencies)
    return Reference(
        read, names, heads, params.get("n_kv_heads") or heads, params.get("norm_eps", 1e-5), angles, turn_neighbours
    )


def turn_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (0, E/2), (1, E/2 + 1), ...: transformers' convention."""
    cos, sin = (torch.cat((each, each), -1).float() for each in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def turn_neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (0, 1), (2, 3), ... as complex numbers: Meta's convention."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    return torch.view_as_real(turned).flatten(-2)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by a large matrix's transpose, some of its rows at a time in float32. Shape: (..., D), (V, D)."""
    return torch.cat([x @ rows.float().T for rows in weight.split(ROWS_AT_ONCE)], -1)


def _slowed(frequencies: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    turns = original * frequencies / (2 * math.pi)  # in the context that was trained first
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return share * frequencies + (1 - share) * frequencies / factor
