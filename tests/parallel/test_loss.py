"""The loss in chunks is the loss of all logits at once: the same sum, the same gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
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


@pytest.mark.parametrize("chunk_size", [5, 37])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_a_product_from_outside_gives_the_plain_loss(chunk_size: int, dtype: torch.dtype, tolerance: float) -> None:
    """An output that multiplies in its own way is asked for its derivatives, of what needs one and no more."""
    products: list[tuple[bool, bool]] = []

    def project(hidden: Tensor, weight: Tensor) -> Tensor:
        products.append((hidden.requires_grad, weight.requires_grad))
        return F.linear(hidden, weight)

    for needs in ((True, True), (True, False), (False, True), (False, False)):
        found, expected = problem(dtype), problem(dtype)
        for leaf, its in zip((*found[:2], *expected[:2]), needs * 2, strict=True):
            leaf.requires_grad_(its)
        products.clear()
        loss = chunked_cross_entropy(*found, chunk_size, project=project)
        assert products == [needs] * -(-POSITIONS // chunk_size)
        reference = plain(*expected)
        assert_close(loss.detach(), reference.detach(), tolerance)
        if any(needs):
            (loss / 7).backward()
            (reference / 7).backward()
        for ours, theirs, its in zip(found[:2], expected[:2], needs, strict=True):
            assert (ours.grad is not None) == its
            if ours.grad is not None and theirs.grad is not None:
                assert ours.grad.dtype == dtype
                assert_close(ours.grad, theirs.grad, tolerance)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_what_is_compiled_writes_over_the_logits(dtype: torch.dtype, tolerance: float) -> None:
    """The gradient is the memory of the logits, and is that of the plain way."""
    torch._dynamo.reset()
    hidden, weight, labels = problem(dtype)
    logits = product(hidden.detach(), weight.detach())
    loss, gradient = module._differentiate(logits.clone(), labels, None)
    found, over = torch.compile(module._differentiate, fullgraph=True)(logits, labels, None)
    assert over.data_ptr() == logits.data_ptr()
    assert_close(found, loss, tolerance)
    assert_close(over, gradient, tolerance)


def test_gradients_do_not_outlive_the_backward_pass() -> None:
    """Who keeps a loss keeps no gradient of the weights; where the graph is retained, it can be asked again."""
    hidden, weight, labels = problem()
    loss = chunked_cross_entropy(hidden, weight, labels, 8)
    kept = [weakref.ref(gradient) for gradient in loss.grad_fn.gradients]  # type: ignore[union-attr]
    again = [torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *again))
    assert all(reference() is not None for reference in kept)
    del again
    loss.backward()
    hidden.grad = weight.grad = None
    assert all(reference() is None for reference in kept)


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
