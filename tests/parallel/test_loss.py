"""The loss in chunks is the loss of all logits at once: the same sum, the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titan.data.batch import IGNORED_LABEL
from titan.models.linear import product
from titan.parallel import loss as module
from titan.parallel.loss import chunked_cross_entropy

from .pool import RankPool

POSITIONS, WIDTH, WORDS = 37, 24, 90
FLOAT32, BFLOAT16 = 1e-6, 2e-2


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weights and labels, of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(WORDS, WIDTH, generator=generator).to(dtype)
    labels = torch.randint(WORDS, (POSITIONS,), generator=generator)
    labels[[3, 4, 20]] = IGNORED_LABEL
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute all logits at once, in float64 whatever comes in."""
    return F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="sum")


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Compare with the largest of the numbers as the measure."""
    assert (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.double().abs().max()


@pytest.mark.parametrize("chunk_size", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_any_chunks_give_the_plain_loss(chunk_size: int, dtype: torch.dtype, tolerance: float) -> None:
    """Loss and both gradients equal those of PyTorch's cross-entropy in float64, whatever divides the positions."""
    found, expected = problem(dtype), problem(dtype)
    loss = chunked_cross_entropy(*found, chunk_size)
    assert loss.dtype == torch.float32
    (loss / 7).backward()
    reference = plain(*expected)
    (reference / 7).backward()
    assert_close(loss, reference, tolerance)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == dtype
        assert_close(ours.grad, theirs.grad, tolerance)


def test_only_what_needs_a_gradient_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen output, frozen hidden states and evaluation give the same loss."""
    hidden, weight, labels = problem()
    losses = [chunked_cross_entropy(hidden.detach(), weight, labels, 8)]
    losses[0].backward()
    assert hidden.grad is None
    assert weight.grad is not None
    losses.append(chunked_cross_entropy(hidden, weight.detach(), labels, 8))
    losses[1].backward()
    assert hidden.grad is not None
    products: list[None] = []
    monkeypatch.setattr(module, "product", lambda a, b: products.append(None) or product(a, b))
    with torch.no_grad():
        losses.append(chunked_cross_entropy(hidden, weight, labels, 8))
    assert not losses[2].requires_grad
    assert len(products) == -(-POSITIONS // 8), "the projections, and no gradient's product"
    assert len({loss.item() for loss in losses}) == 1


def test_positions_that_do_not_count_give_nothing() -> None:
    """Where no position counts the loss and the gradients are zero, not NaN."""
    hidden, weight, labels = problem()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED_LABEL), 8)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.count_nonzero() == 0


def cut_by_words(chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run on every rank: the loss, the whole gradient of the hidden states, this rank's of the weights."""
    hidden, weight, labels = problem()
    group = dist.group.WORLD
    assert group is not None
    mine = weight.detach().chunk(group.size())[group.rank()].clone().requires_grad_()
    loss = chunked_cross_entropy(hidden, mine, labels, chunk_size, group)
    loss.backward()
    assert hidden.grad is not None
    assert mine.grad is not None
    dist.all_reduce(hidden.grad)
    return loss.detach(), hidden.grad, mine.grad


@pytest.mark.parametrize("ranks", [2, 3])
def test_words_on_several_ranks_give_the_plain_loss(pools: Callable[[int], RankPool], ranks: int) -> None:
    """Every rank has the same loss, and together they have the gradients of one process."""
    found = pools(ranks).run(cut_by_words, 10)
    hidden, weight, labels = problem()
    reference = plain(hidden, weight, labels)
    reference.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    for loss, grad_hidden, _ in found:
        assert_close(loss, reference, FLOAT32)
        assert_close(grad_hidden, hidden.grad, FLOAT32)
    assert_close(torch.cat([grad_weight for *_, grad_weight in found]), weight.grad, FLOAT32)
