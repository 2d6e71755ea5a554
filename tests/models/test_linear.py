"""The fast linear layer is nn.Linear: the same numbers, gradients, shapes and errors on every path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan.models import linear as module
from titan.models.linear import Linear, linear


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return normal numbers, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["oneDNN", "MKL"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies, whichever is the faster one on this machine."""
    monkeypatch.setattr(module, "_PREFERS_ONEDNN", module._HAS_ONEDNN and request.param == "oneDNN")
    return request.param


INPUTS = {
    "2D": lambda: random(6, 24),
    "3D": lambda: random(3, 5, 24),
    "4D": lambda: random(2, 3, 5, 24),
    "1D": lambda: random(24),
    "many rows": lambda: random(2, 48, 24),
    "one row": lambda: random(1, 24),
    "no rows": lambda: random(0, 24),
    "no rows, 3D": lambda: random(4, 0, 24),
    "transposed": lambda: random(24, 6).t(),
    "transposed, 3D": lambda: random(5, 3, 24).transpose(0, 1),
    "every other column": lambda: random(6, 48)[:, ::2],
    "expanded": lambda: random(1, 1, 24).expand(3, 5, 24),
    "a slice": lambda: random(10, 5, 30)[2:7, :, 3:27],
}


def gradients(function, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the product, and the gradients of a nonlinear function of it."""
    x, weight = x.detach().requires_grad_(x.requires_grad), weight.detach().requires_grad_(weight.requires_grad)
    out = function(x, weight)
    if out.requires_grad:
        (out.sin() * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum().backward()
    return out, x.grad, weight.grad


def assert_same_as_torch(x: Tensor, weight: Tensor, tolerance: float = 1e-5) -> None:
    """Compare product and gradients with F.linear's."""
    for ours, theirs in zip(gradients(linear, x, weight), gradients(F.linear, x, weight), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("outputs", [2, 10, 40])
def test_every_shape_and_layout_gives_what_torch_gives(name: str, outputs: int) -> None:
    """Product and both gradients equal F.linear's for contiguous, strided, expanded and empty inputs."""
    assert_same_as_torch(INPUTS[name]().requires_grad_(), random(outputs, 24, seed=1).requires_grad_())


def test_a_transposed_weight_gives_what_torch_gives() -> None:
    """The weight need not be contiguous either."""
    assert_same_as_torch(random(3, 5, 24).requires_grad_(), random(24, 10, seed=1).t().requires_grad_())


@pytest.mark.parametrize(("x_trains", "weight_trains"), [(True, False), (False, True), (False, False)])
def test_only_what_trains_gets_a_gradient(x_trains: bool, weight_trains: bool) -> None:
    """A frozen weight, or an input that is data, gets none, and the other's is right."""
    assert_same_as_torch(
        random(3, 5, 24).requires_grad_(x_trains), random(10, 24, seed=1).requires_grad_(weight_trains)
    )


def test_bfloat16_gives_what_torch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN multiplies it, reduced precision takes PyTorch's own path, to the bit."""
    monkeypatch.setattr(module, "_WIDENS_BFLOAT16", False)
    x, weight = random(3, 5, 24, dtype=torch.bfloat16), random(10, 24, dtype=torch.bfloat16, seed=1)
    assert_same_as_torch(x.requires_grad_(), weight.requires_grad_(), tolerance=0)


@pytest.mark.skipif(not module._HAS_ONEDNN, reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("name", ["2D", "3D", "1D", "no rows", "transposed, 3D", "expanded"])
def test_bfloat16_is_rounded_once_where_it_is_widened(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Product and gradients are those of float64, rounded to the nearest: a sum in float32 moves few of them by one."""
    monkeypatch.setattr(module, "_WIDENS_BFLOAT16", True)
    x, weight = INPUTS[name]().bfloat16(), random(10, 24, dtype=torch.bfloat16, seed=1)
    out = linear(x.requires_grad_(), weight.requires_grad_())
    assert ("FastLinear" in type(out.grad_fn).__name__) == (out.ndim > 1 and out.numel() > 0)
    grad = random(*out.shape, dtype=torch.bfloat16, seed=2)
    out.backward(grad)
    rows, its = x.detach().double().reshape(-1, 24), grad.double().reshape(-1, 10)
    exact = rows @ weight.detach().double().t(), its @ weight.detach().double(), its.t() @ rows
    for found, true in zip((out, x.grad, weight.grad), exact, strict=True):
        assert found is not None
        assert found.dtype == torch.bfloat16
        once = true.bfloat16().reshape(found.shape)
        torch.testing.assert_close(found, once, rtol=2**-7, atol=1e-6)
        assert (found != once).double().sum() <= 0.02 * found.numel()


def test_autocast_casts_as_for_any_linear() -> None:
    """Inside autocast the product is in bfloat16, as nn.Linear's is."""
    x, weight = random(3, 24), random(10, 24, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert linear(x, weight).dtype == torch.bfloat16


def test_gradients_are_derivatives() -> None:
    """In float64, numeric differentiation agrees."""
    x, weight = random(2, 3, 5, dtype=torch.float64), random(4, 5, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(linear, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.skipif(not module._HAS_ONEDNN, reason="PyTorch was built without oneDNN")
def test_the_fast_path_is_taken_for_float32(library: str) -> None:
    """Plain float32 on a CPU goes to oneDNN where that is faster; otherwise the layer would only look fast."""
    out = linear(random(6, 24), random(10, 24, seed=1).requires_grad_())
    assert ("FastLinear" in type(out.grad_fn).__name__) == (library == "oneDNN")


@pytest.mark.skipif(not module._HAS_ONEDNN, reason="PyTorch was built without oneDNN")
def test_second_derivatives_are_refused_and_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path has no second derivative; asking for it is an error, never a silent zero."""
    monkeypatch.setattr(module, "_PREFERS_ONEDNN", True)
    x, weight = random(6, 24).requires_grad_(), random(10, 24, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Pair(nn.Module):
    """Two layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(24, 32), Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what was compiled before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Both are torch.compile's own doing (2.13): how it traces an autograd.Function, and what Inductor imports.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiling_in_one_graph_changes_nothing(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile takes the layer without a graph break, and output and gradients stay what they were."""
    monkeypatch.setattr(module, "_WIDENS_BFLOAT16", module._HAS_ONEDNN)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.manual_seed(0)
    pair = Pair().to(dtype)
    compiled = torch.compile(pair, backend=backend, fullgraph=True)
    results = []
    for function in (pair, compiled):
        pair.zero_grad()
        x = random(3, 5, 24, dtype=dtype).requires_grad_()
        out = function(x)
        out.square().sum().backward()
        results.append([out, x.grad, *[parameter.grad for parameter in pair.parameters()]])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)


def test_the_layer_has_the_state_of_an_nn_linear() -> None:
    """Weights go from one to the other and back."""
    ours, theirs = Linear(24, 10), nn.Linear(24, 10, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = random(3, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert isinstance(ours, nn.Linear), "float8 and activation checkpointing look for it"


def test_a_shape_that_does_not_fit_is_an_error() -> None:
    """A wrong width raises, as for any linear, and gives no numbers."""
    with pytest.raises(RuntimeError):
        linear(random(6, 23), random(10, 24, seed=1))
