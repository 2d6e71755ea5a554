"""The gradient norm and clipping by it against PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from titan.optim.clip import clip_gradients, global_grad_norm

CPU = torch.device("cpu")


def parameters_with_gradients(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return parameters of several shapes, always with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for shape in ((300, 40), (40,), (3, 4, 5), (1,)):
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = (scale * torch.randn(shape, generator=generator)).to(dtype)
        out.append(parameter)
    return out


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("max_norm", [0.5, 1.0, 50.0, 1e9])
def test_norm_and_clipping_are_pytorchs(scale: float, max_norm: float) -> None:
    """The norm, and every gradient after clipping, are those of torch.nn.utils.clip_grad_norm_."""
    ours, theirs = parameters_with_gradients(scale), parameters_with_gradients(scale)
    norm = global_grad_norm(ours, CPU)
    clip_gradients(ours, norm, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipped_gradients_have_the_norm_that_was_asked_for() -> None:
    """Too long a gradient is scaled to the limit and keeps its direction; a short one is left to the bit."""
    long = parameters_with_gradients(10)
    before = [parameter.grad.clone() for parameter in long]
    clip_gradients(long, global_grad_norm(long, CPU), 1.0)
    assert global_grad_norm(long, CPU).item() == pytest.approx(1.0, rel=1e-5)
    cosine = (
        sum((a * b.grad).sum() for a, b in zip(before, long, strict=True))
        / torch.cat([gradient.flatten() for gradient in before]).norm()
    )
    assert cosine.item() == pytest.approx(1.0, rel=1e-5)

    short = parameters_with_gradients(1e-6)
    before = [parameter.grad.clone() for parameter in short]
    clip_gradients(short, global_grad_norm(short, CPU), 1.0)
    assert all(torch.equal(a, b.grad) for a, b in zip(before, short, strict=True))


def test_no_limit_leaves_gradients_alone() -> None:
    """max_grad_norm=0 clips nothing, however long."""
    parameters = parameters_with_gradients(1e6)
    before = [parameter.grad.clone() for parameter in parameters]
    clip_gradients(parameters, global_grad_norm(parameters, CPU), 0.0)
    assert all(torch.equal(a, b.grad) for a, b in zip(before, parameters, strict=True))


def test_parameters_without_a_gradient_do_not_count() -> None:
    """A frozen parameter, or one that the batch did not reach, changes neither norm nor clipping."""
    parameters = parameters_with_gradients()
    norm = global_grad_norm(parameters, CPU)
    assert global_grad_norm([nn.Parameter(torch.ones(5)), *parameters], CPU) == norm
    clip_gradients([nn.Parameter(torch.ones(5)), *parameters], norm, 1.0)
    assert global_grad_norm(parameters, CPU).item() == pytest.approx(1.0, rel=1e-5)


def test_nothing_at_all_has_the_norm_zero() -> None:
    """A rank may hold no parameter, or empty shards, and still takes part."""
    assert global_grad_norm([], CPU) == 0
    clip_gradients([], torch.tensor(0.0), 1.0)
    empty = nn.Parameter(torch.zeros(0, 4))
    empty.grad = torch.zeros(0, 4)
    assert global_grad_norm([empty], CPU) == 0
    clip_gradients([empty], torch.tensor(0.0), 1.0)


def test_a_large_gradient_is_summed_exactly() -> None:
    """Four million equal numbers have the norm that mathematics says, to float32's last digits."""
    parameter = nn.Parameter(torch.zeros(2048, 2048))
    parameter.grad = torch.full_like(parameter, 1e-3)
    assert global_grad_norm([parameter], CPU).item() == pytest.approx(2048 * 1e-3, rel=2e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad: float) -> None:
    """One bad number anywhere makes the norm not finite, so the guard before the step sees it."""
    parameters = parameters_with_gradients()
    parameters[1].grad[3] = bad
    assert not global_grad_norm(parameters, CPU).isfinite()


def test_gradients_in_bfloat16_are_summed_in_more() -> None:
    """The squares of reduced-precision gradients do not lose themselves in the sum."""
    parameters = parameters_with_gradients(dtype=torch.bfloat16)
    expected = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in parameters))
    norm = global_grad_norm(parameters, CPU)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    clip_gradients(parameters, norm, 1.0)
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in parameters)
    assert global_grad_norm(parameters, CPU).item() == pytest.approx(1.0, rel=5e-3)
