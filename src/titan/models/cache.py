"""A model that remembers: keys and values of what it has seen are kept, so that a token more costs one token's work.

There is no second model. Attention is the one place where a position looks at others, and `Decoder.positions` says
where the tokens stand; so it is enough to exchange the module between a block's matrices, as context parallelism does,
and to count positions on. Only the kv heads are kept: with grouped-query attention the query heads of a group are
taken as several queries of one head, and no key is ever copied.

Prompts of different lengths are filled up on the left, so that all go on at the same place. The trap is what stands
there: a filling that real tokens see changes the text, and one that sees nothing at all gives NaN, which a weight of
zero does not take away. So a row is two documents packed together, the filling and the prompt. Attention inside of
documents and positions that count from their beginning are what `Decoder.forward` does for packed rows anyway.

Shape letters: B batch, S sequence, H query heads, K kv heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from titan.models.attention import CausalAttention, Visible, attend, visible_keys
from titan.models.decoder import Decoder


class CachedModel:
    """A model that takes rows of tokens a piece at a time.

    Args:
        model: With weights and buffers, and with tensor parallelism applied or none; is changed for good. Its `seq_len`
            is the longest row.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        model.leaves_output = True
        self._kept = [
            _exchange(module, name)
            for module in list(model.modules())
            for name, child in list(module.named_children())
            if type(child) is CausalAttention
        ]
        self._starts: Tensor | None = None
        self._filled = 0

    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """Take new rows in the place of the old ones; returns the logits of what comes next.

        Args:
            prompts: Of any lengths, none of them empty.
            capacity: Tokens that the longest row will have in the end.

        Shape:
            Returns (B, V), float32.
        """
        device, longest = self.model.rope.device, max(map(len, prompts))
        self._filled, self._starts = 0, None
        for each in self._kept:
            each.begin(capacity)
        tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        missing = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
        if not missing.any():
            return self._advance(tokens, None)
        self._starts = missing
        places = torch.arange(longest, device=device)
        return self._advance(tokens, torch.where(places < missing, 0, missing))

    def go_on(self, tokens: Tensor) -> Tensor:
        """Take one more token of each row; returns the logits of what comes next. Shape: (B,) -> (B, V), float32."""
        return self._advance(tokens.unsqueeze(1), self._starts)

    @torch.no_grad()
    def _advance(self, tokens: Tensor, starts: Tensor | None) -> Tensor:
        model, count = self.model, tokens.shape[1]
        assert model.output is not None, "a whole model"
        model.positions = torch.arange(self._filled, self._filled + count, device=tokens.device)
        hidden = model(tokens, starts)
        self._filled += count
        # of the last position alone: the logits of all would be larger than anything else
        return model.output(hidden[:, -1:])[:, -1].float()


class CachedAttention(CausalAttention):
    """Attention that also sees the keys and values of earlier calls."""

    def __init__(self) -> None:
        super().__init__()
        self._keys = self._values = torch.empty(0)
        self._filled = self._capacity = 0

    def begin(self, capacity: int) -> None:
        """Forget all, and make room for rows of so many tokens."""
        self._filled, self._capacity = 0, capacity

    def visible(self, starts: Tensor, positions: Tensor) -> Visible:
        """Return which of all keys each new query sees. Shape: (B, S), (S,) -> for S and all keys."""
        keys = self._filled + starts.shape[1]
        return visible_keys(starts, positions, torch.arange(keys, device=starts.device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
        """Attend. Shape: q (B, H, S, E); k, v (B, K, S, E), kept -> (B, H, S, E)."""
        rows, kv_heads, count, head_size = k.shape
        if self._filled == 0 and self._keys.shape != (wanted := (rows, kv_heads, self._capacity, head_size)):
            self._keys, self._values = k.new_empty(wanted), v.new_empty(wanted)
        end = self._filled + count
        self._keys[:, :, self._filled : end], self._values[:, :, self._filled : end] = k, v
        self._filled = end
        k, v = self._keys[:, :, :end], self._values[:, :, :end]
        if count > 1:
            return attend(q, k, v, visible, self.kernel)
        assert visible is None or isinstance(visible, Tensor), "`visible` makes no tiles"
        # one query, which sees all that is kept: so a group's heads can be queries of their own
        return F.scaled_dot_product_attention(q.reshape(rows, kv_heads, -1, head_size), k, v, visible).view_as(q)


def _exchange(module: torch.nn.Module, name: str) -> CachedAttention:
    cached = CachedAttention()
    setattr(module, name, cached)
    return cached
