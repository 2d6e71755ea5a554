"""Attention and what it may see, held against the plain formula and against the mask written out."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from titan.models.attention import ANY, Kernel, attend, visible_keys, visible_tiles

KERNELS = {
    "any": ANY,
    "flash": Kernel((SDPBackend.FLASH_ATTENTION,)),
    "math": Kernel((SDPBackend.MATH,)),
    "flash before math": Kernel((SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)),
}


def reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Return attention by its formula, in double precision."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v


def random_inputs(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of four heads, keys and values of two, that need gradients."""
    generator = torch.Generator().manual_seed(queries)
    shapes = ((2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v


def random_starts(rows: int, length: int, documents: int, seed: int) -> Tensor:
    """Return where the document of each position begins, for rows with some documents each. Shape: (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.zeros(rows, length, dtype=torch.int64)
    for row in begins:
        at = torch.randperm(length - 1, generator=generator)[: documents - 1] + 1
        row[at] = at
    return begins.cummax(1).values


def written_out(starts: Tensor, queries: Tensor, keys: int) -> Tensor:
    """Return the mask that the tiles of `visible_tiles` stand for. Shape: (B, 1, Q, keys)."""
    tiles = visible_tiles(starts, queries, keys)
    rows, count = starts.shape
    mask = torch.zeros(rows, 1, count, keys, dtype=torch.bool)
    index = torch.arange
    single = torch.stack(
        [tiles.mask_mod(torch.tensor(row), torch.tensor(0), index(count)[:, None], index(keys)) for row in range(rows)]
    )
    for row in range(rows):
        for tile in range(tiles.kv_num_blocks.shape[-1]):
            own = slice(tile * 128, (tile + 1) * 128)
            for number, listed, is_whole in (
                (tiles.kv_num_blocks, tiles.kv_indices, False),
                (tiles.full_kv_num_blocks, tiles.full_kv_indices, True),
            ):
                for column in listed[row, 0, tile, : int(number[row, 0, tile])].tolist():
                    seen = slice(column * 128, (column + 1) * 128)
                    mask[row, 0, own, seen] = True if is_whole else single[row, own, seen]
    return mask


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (8, 24), (1, 24)])
def test_attention_is_the_formula(kernel: str, queries: int, keys: int) -> None:
    """Causal for queries at the end of the keys, with fewer kv heads, forward and backward, by every kernel here."""
    q, k, v = random_inputs(queries, keys)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    out = attend(q, k, v, None, KERNELS[kernel])
    expected = reference(q, k, v, visible)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(out.sin().sum(), (q, k, v))
    for gradient, wanted in zip(found, torch.autograd.grad(expected.sin().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [5, 128, 300, 512])
@pytest.mark.parametrize("documents", [1, 3])
def test_tiles_stand_for_the_mask(length: int, documents: int) -> None:
    """Whole, partial and left-out tiles together are the mask, entry by entry, at any length."""
    starts, positions = random_starts(3, length, documents, length), torch.arange(length)
    assert written_out(starts, positions, length).equal(visible_keys(starts, positions, positions))


@pytest.mark.parametrize(("ranks", "head_tail"), [(2, True), (2, False), (3, True), (4, True)])
def test_tiles_stand_for_the_mask_of_a_part_of_the_row(ranks: int, head_tail: bool) -> None:
    """Also for the queries of one context-parallel rank, whose chunks need not be whole tiles, and all keys."""
    from titan.parallel.context import positions_of_rank

    length = 600
    starts = random_starts(2, length, 4, ranks)
    for rank in range(ranks):
        positions = positions_of_rank(length, ranks, rank, head_tail)
        expected = visible_keys(starts[:, positions], positions, torch.arange(length))
        assert written_out(starts[:, positions], positions, length).equal(expected)


def test_tiles_without_anything_to_see_are_left_out() -> None:
    """Of 16 x 16 tiles, four documents of four tiles each leave forty, of which 24 need no look at single positions."""
    starts = (torch.arange(2048) // 512 * 512)[None]
    tiles = visible_tiles(starts, torch.arange(2048), 2048)
    assert tiles.kv_num_blocks.sum() == 4 * 4
    assert tiles.full_kv_num_blocks is not None
    assert tiles.full_kv_num_blocks.sum() == 4 * 6


def test_flex_attention_over_tiles_is_attention_under_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; unfused, as PyTorch computes it on a CPU, where it has to be talked into the second."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    starts, positions = random_starts(2, 300, 3, 0), torch.arange(300)
    q, k, v = random_inputs(300, 300)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        out = attend(q, k, v, visible_tiles(starts, positions, 300), Kernel(is_flex=True))
    expected = reference(q, k, v, visible_keys(starts, positions, positions))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(out.sin().sum(), (q, k, v))
    for gradient, wanted in zip(found, torch.autograd.grad(expected.sin().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
