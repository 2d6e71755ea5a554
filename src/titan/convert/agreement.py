"""Whether two models compute the same, block by block, so that memory never holds more than one block of each.

titan's own single-device blocks run with titan's weights; the other side is `titan.convert.reference`, or titan again
with other weights. Both start from the same few tokens, and each goes on from its own result. A wrong name, order of
rows or rotary position shows as a difference of the size of the numbers themselves, where rounding gives 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titan.checkpoint.weights import Weights
from titan.config.schema import ModelConfig
from titan.convert.reference import multiply
from titan.models.rope import build_rope_cache

ALLOWED_PER_BLOCK = 1e-5
"""What rounding may add in one block, as a share of a position's hidden state. In float32 it adds about 1e-7."""
MOST_TOKENS = 12


@dataclass(frozen=True)
class Agreement:
    """What a comparison has found."""

    difference: float
    """The largest difference of a position's logits, as a share of them; infinite where one is no number."""
    departs: str = ""
    """Where the difference was above what is allowed, which ended the comparison there; empty where nowhere."""


class Forward(Protocol):
    """A model that runs in parts."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Return hidden states."""
        ...

    def block(self, index: int, x: Tensor) -> Tensor:
        """Return hidden states after a block."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """Return logits of the last hidden states."""
        ...


class TitanForward:
    """titan's model with one block in memory, in float32.

    Args:
        weights: Its weights.
        config: Its shape.
        family: Its `titan.models.family.ModelFamily`.
        positions: Of the tokens in their row.
        rounded: A format that every weight is rounded to first; None takes them as they are.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        family: Any,
        positions: Tensor,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.weights, self.config, self.rounded = weights, config, rounded
        with torch.device("meta"):
            model = family.build(replace(config, n_layers=1), 1)
        self.one_block: nn.Module = model.layers["0"].to_empty(device="cpu")
        self.norm: nn.Module = model.norm.to_empty(device="cpu")
        self.rope = build_rope_cache(config, int(positions.max()) + 1)[positions]

    def embed(self, tokens: Tensor) -> Tensor:
        """Return hidden states."""
        return self._read("tok_embeddings.weight")[tokens].float()

    def block(self, index: int, x: Tensor) -> Tensor:
        """Return hidden states after a block."""
        self._fill(self.one_block, f"layers.{index}.")
        return self.one_block(x, self.rope)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits."""
        self._fill(self.norm, "norm.")
        output = "tok_embeddings.weight" if self.config.tie_embeddings else "output.weight"
        return multiply(self.norm(x), self._read(output))

    def _fill(self, module: nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self._read(prefix + name))

    def _read(self, name: str) -> Tensor:
        tensor = self.weights.read(name)
        return tensor if self.rounded is None else tensor.to(self.rounded)


def sample_positions(config: ModelConfig) -> Tensor:
    """Return the positions of the tokens that models are compared on: near ones and far ones, where scaling shows."""
    return torch.tensor([0] + [2**i for i in range(MOST_TOKENS - 1) if 2**i < config.max_seq_len])


@torch.no_grad()
def compare(ours: Forward, theirs: Forward, config: ModelConfig, allowed: float = ALLOWED_PER_BLOCK) -> Agreement:
    """Run two models on the same tokens, up to where they depart.

    Args:
        ours: One of them.
        theirs: The other, which says how large numbers are.
        config: The shape of both.
        allowed: What each block may add to the difference.
    """
    tokens = (torch.arange(len(sample_positions(config))) * 7919 + 13).remainder(config.vocab_size).unsqueeze(0)
    x, y = ours.embed(tokens), theirs.embed(tokens)
    limit = allowed
    if (difference := _difference(x, y)) > limit:
        return Agreement(difference, "the embedding")
    for index in range(config.n_layers):
        x, y = ours.block(index, x), theirs.block(index, y)
        limit += allowed
        if (difference := _difference(x, y)) > limit:
            return Agreement(difference, f"layers.{index}")
    difference = _difference(ours.logits(x), theirs.logits(y))
    return Agreement(difference, "the last norm or the output" if difference > limit + allowed else "")


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Return how far apart the worst position is, as a share of its size."""
    sizes = theirs.double().norm(dim=-1).clamp(min=1e-30)
    worst = ((ours.double() - theirs.double()).norm(dim=-1) / sizes).max()
    return float(worst) if bool(worst.isfinite()) else float("inf")
