"""An update that is called off or clipped on the device: every bit stays, or it is the plain update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from titan.config.schema import Dtype, OptimizerConfig
from titan.optim.build import build_optimizer
from titan.optim.guard import is_skipped_on_device, step_unless
from titan.parallel.compile import count_graphs

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def two_alike(
    device: str, state_dtype: Dtype = Dtype.float32, backend: str | None = None
) -> list[tuple[list[nn.Parameter], torch.optim.Optimizer]]:
    """Return parameters with their optimizer, twice the same."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        named = [(name, nn.Parameter(torch.randn(5, 7, device=device))) for name in ("a", "tok_embeddings")]
        named.append(("norm", nn.Parameter(torch.randn(7, device=device))))
        config = OptimizerConfig(lr=0.1, state_dtype=state_dtype)
        made.append(([p for _, p in named], build_optimizer(named, config, torch.device(device), backend)))
    return made


def bits(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return copies of all that an update changes."""
    states = [value for p in parameters for value in optimizer.state.get(p, {}).values()]
    return [tensor.detach().clone() for tensor in (*parameters, *states)]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("state_dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_steps_left_out_leave_no_trace(device: str, state_dtype: Dtype, backend: str | None) -> None:
    """Steps done as PyTorch does them, and the same with bad ones of no number between: the same bits after each."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    (plain, its), (guarded, other) = two_alike(device, state_dtype, backend)
    assert is_skipped_on_device(other)
    for turn, is_bad in enumerate([False, True, True, False, True, False]):
        for mine, theirs in zip(guarded, plain, strict=True):
            mine.grad = torch.full_like(mine, math.nan) if is_bad else torch.full_like(mine, turn + 1.0)
            theirs.grad = torch.full_like(mine, turn + 1.0)
        before = bits(guarded, other)
        step_unless(other, torch.tensor(float(is_bad), device=device))
        after = bits(guarded, other)
        if is_bad:
            assert all(map(torch.equal, before, after))
        else:
            its.step()
            assert all(map(torch.equal, bits(plain, its), after))
    assert not hasattr(other, "found_inf")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("state_dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_gradients_are_divided_on_the_way(device: str, state_dtype: Dtype, backend: str | None) -> None:
    """An update that divides its gradients is, to the bit, the update of gradients that were divided before.

    The divisor moves from step to step, and compiles nothing anew.
    """
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    (plain, its), (guarded, other) = two_alike(device, state_dtype, backend)
    graphs = []
    for turn in range(4):
        divisor = torch.tensor(1.0 + 0.37 * turn, device=device)
        for mine, theirs in zip(guarded, plain, strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad / divisor
        step_unless(other, torch.tensor(0.0, device=device), divisor)
        step_unless(its, torch.tensor(0.0, device=device))
        assert all(map(torch.equal, bits(plain, its), bits(guarded, other)))
        graphs.append(count_graphs())
    assert graphs[0] == graphs[-1]
    assert not hasattr(other, "grad_scale")


def test_an_optimizer_that_cannot_tell_is_told_by_the_host() -> None:
    """Of another class than the fused ones: the same outcome."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9, foreach=True)
    assert not is_skipped_on_device(optimizer)
    parameter.grad = torch.ones(3)
    step_unless(optimizer, torch.tensor(1.0))
    assert torch.equal(parameter, torch.ones(3))
    assert not optimizer.state[parameter]
    step_unless(optimizer, torch.tensor(0.0), torch.tensor(2.0))
    assert torch.equal(parameter, torch.full((3,), 0.5))
