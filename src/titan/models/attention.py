"""Attention on one device: causal, inside documents where they are told apart.

PyTorch has several kernels for it, none of which does everything: flash attention and cuDNN's want 16-bit numbers on
CUDA, and flash no mask but the causal one. What a document may see is therefore told in one of three forms, made once
for all blocks: as a mask with an entry for every query and key, which grows with the square of the sequence, for
FlexAttention as the list of those tiles of it in which there is anything to see, or for titan's own kernel on a CPU as
the first and the last key of each query.

Shape letters: B batch, S sequence, Q queries, H query heads, K kv heads, E head size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from titan.models.cpu_attention import Span, attend_on_cpu
from titan.models.rope import apply_rope

Visible = Tensor | BlockMask | Span
"""Which keys each query sees: (B, 1, Q, S) bool, in tiles, or from which to which."""

_SMALL_HEAD = 32
"""Heads of up to so many numbers are computed in float32 on a CPU, whose kernel is no faster for them in 16 bits."""
_TILE = 128
"""Queries, and keys, of a tile: FlexAttention's own default."""


@dataclass(frozen=True)
class Kernel:
    """What computes attention."""

    backends: tuple[SDPBackend, ...] = ()
    """Of PyTorch's SDPA, the first that can; none leaves the choice to PyTorch."""
    is_flex: bool = False
    """Whether documents are kept apart by FlexAttention."""
    is_own: bool = False
    """Whether it is titan's own, on a CPU."""

    @property
    def takes_groups(self) -> bool:
        """Whether fewer heads of keys than of queries can be left to the first of them."""
        return self.backends[:1] != (SDPBackend.EFFICIENT_ATTENTION,)


ANY = Kernel()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible | None = None,
    kernel: Kernel = ANY,
    rope: Tensor | None = None,
) -> Tensor:
    """Return attention of queries that stand at the end of the keys: causal, unless `visible` says more.

    With `rope`, which titan's own kernel alone takes, queries and keys are rotated before.

    Shape:
        q: (B, H, Q, E). k, v: (B, K, S, E), Q <= S and K divides H. visible: for Q and S. rope: as `attend_on_cpu`
        takes it. Returns (B, H, Q, E).
    """
    if kernel.is_own:
        assert visible is None or isinstance(visible, Span), "`mask` makes what its kernel takes"
        return attend_on_cpu(q, k, v, visible, rope)
    assert not isinstance(visible, Span)
    assert rope is None
    if q.device.type == "cpu" and q.dtype is not torch.float32 and q.shape[-1] <= _SMALL_HEAD:
        return attend(q.float(), k.float(), v.float(), visible, kernel).to(q.dtype)
    queries, keys, heads, kv_heads = q.shape[2], k.shape[2], q.shape[1], k.shape[1]
    if isinstance(visible, BlockMask):
        return _flex(q)(q, k, v, block_mask=visible, enable_gqa=heads != kv_heads)
    if visible is None and queries < keys:
        if takes_flash(q, kernel):
            # What SDPA calls causal begins at the first key, and it then refuses flash; the kernel's own ends at the
            # last.
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    takes_groups = q.is_cuda and q.dtype is not torch.float32 and visible is None and kernel.takes_groups
    if heads != kv_heads and not takes_groups:
        # The kernels that are left take no grouped heads; PyTorch would fall back to materialising the scores.
        k, v = k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
    # Around the call and not around the model, so that a block that is compiled or computed again takes the same.
    with sdpa_kernel(list(kernel.backends), set_priority=True) if kernel.backends else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=k.shape[1] != heads
        )


def takes_flash(q: Tensor, kernel: Kernel) -> bool:
    """Return whether queries that do not begin where the keys do can be left to flash attention. Shape: (..., E)."""
    is_fit = q.is_cuda and q.dtype is not torch.float32 and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    return is_fit and SDPBackend.FLASH_ATTENTION in kernel.backends


def _flex(q: Tensor) -> Callable[..., Tensor]:
    """Return FlexAttention: fused, or on a CPU as it is, which has no fused one that could be trained with."""
    # A block that is being compiled takes it in.
    return flex_attention if torch.compiler.is_compiling() or q.device.type == "cpu" else _compiled_flex()


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    import torch._inductor.config as inductor

    # Makes of what is compiled one operator, which selective activation checkpointing can tell and keep.
    option = "wrap_inductor_compiled_regions"
    return torch.compile(flex_attention, options={option: True} if hasattr(inductor, option) else None)


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


def visible_tiles(starts: Tensor, queries: Tensor, keys: int) -> BlockMask:
    """Return the same in tiles, for the first `keys` positions of a row, without ever making the mask itself.

    A tile is left out if none of its queries sees any of its keys, as far as the first and the last of them tell; it
    goes without a look at single positions if each sees all.

    Shape:
        starts: (B, Q). queries: (Q,) or (B, Q).
    """
    queries = queries.expand(starts.shape)
    missing = -starts.shape[1] % _TILE  # in the last tile, which is filled up with its last query
    by_tile = [torch.cat((x, x[:, -1:].expand(-1, missing)), 1).unflatten(1, (-1, _TILE)) for x in (starts, queries)]
    (first_start, last_start), (first, last) = ((x.amin(-1, True), x.amax(-1, True)) for x in by_tile)
    low = torch.arange(0, keys, _TILE, device=starts.device)
    high = low + (_TILE - 1)
    seen = (low <= last) & (high >= first_start)
    whole = (high <= first) & (low >= last_start)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= queries[row, query]) & (key >= starts[row, query])

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=_TILE, mask_mod=sees, seq_lengths=(starts.shape[1], keys)
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of a row are set, and the columns, those first. Shape: (B, M, N) -> (B, 1, M), (B, 1, M, N)."""
    tiles = tiles.unsqueeze(1).int()
    return tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int()


class CausalAttention(nn.Module):
    """Attention in which a position sees itself and what came before. Context parallelism replaces this module."""

    kernel = ANY
    """Set when parallelism is applied."""

    def init_buffers(self, seq_len: int, device: torch.device | str) -> None:
        """Compute what depends on the length of sequences alone, where it is used; here there is nothing."""

    def visible(self, starts: Tensor, positions: Tensor) -> Visible:
        """Return what `forward` takes as `visible`: once for all blocks. Shape: (B, S), (S,) -> for S and S."""
        return self.mask(starts, positions, starts.shape[1])

    def mask(self, starts: Tensor, queries: Tensor, keys: int) -> Visible:
        """Return which of the first `keys` positions of a row each query sees, in the form that the kernel takes."""
        if self.kernel.is_flex:
            return visible_tiles(starts, queries, keys)
        if self.kernel.is_own:
            return Span(starts.int(), queries.expand(starts.shape).int())
        return visible_keys(starts, queries, torch.arange(keys, device=starts.device))

    def rotary(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor, visible: Visible | None = None) -> Tensor:
        """Attend with rotary positions: what projections give, to what the next one takes.

        Shape:
            q: (B, S, H, E). k, v: (B, S, K, E). rope: as `apply_rope` takes it. visible: as `forward` takes it. Returns
            (B, S, H, E).
        """
        if self.kernel.is_own and type(self) is CausalAttention:  # others may have something to do in between
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return attend(q, k, v, visible, self.kernel, rope).transpose(1, 2)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        return self(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible | None = None) -> Tensor:
        """Attend.

        Shape:
            q: (B, H, S, E). k, v: (B, K, S, E). visible: for S and S. Returns (B, H, S, E).
        """
        return attend(q, k, v, visible, self.kernel)
