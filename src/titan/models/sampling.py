"""Which token comes next: from logits to one token of each row.

The order is that of the transformers library: divide by the temperature, keep the likeliest `top_k`, of those keep the
fewest that have `top_p` of the probability together, draw. What is drawn with is a number between 0 and 1 from a
generator of the row's own, on the CPU, and the token is the one at which the probabilities add up to it. So a row's
text follows from its seed, whatever other rows there are and whatever the device, and no generator of a training run's
is touched.

Shape letters: B batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this share of the probability together."""

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Return one token of each row.

        Args:
            logits: Of the next token; -inf for what must not come.
            draws: What each row draws with, from 0 to 1; see `draw`.

        Shape:
            logits: (B, V). draws: (B,), float64. Returns (B,), int64.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        sums = self.probabilities(logits).cumsum(-1)
        whole = sums[:, -1]  # which is 1 but for rounding
        # below the whole, or the last token would be taken, of whatever probability
        drawn = (draws.to(whole.device) * whole).minimum(whole.nextafter(torch.zeros_like(whole)))
        return torch.searchsorted(sums, drawn.unsqueeze(-1), right=True).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what tokens are drawn with, for a temperature above 0. Shape: (B, V), float64."""
        scores = logits.double() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            shares = ordered.softmax(-1)
            better = shares.cumsum(-1) - shares
            is_out = better >= self.top_p
            is_out[:, 0] = False
            scores = scores.masked_fill(is_out.scatter(-1, order, is_out), -torch.inf)
        return scores.softmax(-1)


def row_generators(seed: int, rows: Sequence[object]) -> list[torch.Generator]:
    """Return a generator for each row, seeded with the seed and what names the row."""
    return [
        torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "little") >> 1
        )
        for row in rows
    ]


def draw(generators: Sequence[torch.Generator]) -> Tensor:
    """Return the next number of each generator, from 0 to 1. Shape: (B,), float64, on the CPU."""
    return torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators])


def only_words(logits: Tensor, n_tokens: int) -> Tensor:
    """Return logits in which rows of the embedding that are no token of the tokenizer's never come. Shape: (B, V)."""
    if n_tokens >= logits.shape[-1]:
        return logits
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= n_tokens, -torch.inf)
