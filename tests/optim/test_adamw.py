"""Moments in bfloat16 and a compiled update, against AdamW written out."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from titan.config.schema import Dtype, OptimizerConfig
from titan.optim.adamw import takes_bfloat16_moments
from titan.optim.build import build_optimizer
from titan.optim.schedule import set_learning_rate
from titan.parallel.compile import count_graphs

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own: it looks at what is deprecated, too

CPU = torch.device("cpu")
STEPS = 8
SHAPES = {"a.weight": (7, 5), "b.weight": (3, 40), "norm.weight": (5,), "eight.weight": (8,)}
"""One of them has as many numbers as an update is told, see `titan.optim.adamw`."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Forget what other tests have compiled."""
    torch._dynamo.reset()


def train(
    config: OptimizerConfig, backend: str | None = None, device: torch.device = CPU
) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer, int]:
    """Take some steps at changing rates; returns what they moved, and the graphs compiled after the first one."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(device)) for name, shape in SHAPES.items()
    }
    optimizer = build_optimizer(parameters.items(), config, device, backend)
    after_first = 0
    for step in range(STEPS):
        set_learning_rate(optimizer, config.lr * (step + 1) / STEPS)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        optimizer.step()
        after_first = count_graphs() if step == 0 else after_first
    return parameters, optimizer, count_graphs() - after_first


def written_out(config: OptimizerConfig) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return what the same steps make of weights and moments, in float64 but for the rounding of the moments."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if config.state_dtype is Dtype.bfloat16 else torch.float64
    weights = {name: torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}
    first = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    second = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    for step in range(1, STEPS + 1):
        rate = config.lr * step / STEPS
        for name, shape in SHAPES.items():
            gradient = torch.randn(shape, generator=generator).double()
            mean = first[name].double() * config.beta1 + (1 - config.beta1) * gradient
            square = second[name].double() * config.beta2 + (1 - config.beta2) * gradient**2
            decay = config.weight_decay if len(shape) > 1 else 0.0
            direction = mean / (1 - config.beta1**step) / ((square / (1 - config.beta2**step)).sqrt() + config.eps)
            weights[name] = weights[name] * (1 - rate * decay) - rate * direction
            first[name], second[name] = mean.to(dtype), square.to(dtype)
    return {name: (weights[name], first[name], second[name]) for name in SHAPES}


@pytest.mark.parametrize("state_dtype", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_steps_are_those_of_the_paper(state_dtype: Dtype, backend: str | None) -> None:
    """Weights within 1e-6 of AdamW written out, whatever takes the step; moments rounded once a step and no oftener."""
    config = OptimizerConfig(lr=0.01, weight_decay=0.1, state_dtype=state_dtype)
    parameters, optimizer, _ = train(config, backend)
    for name, (weight, first, second) in written_out(config).items():
        state = optimizer.state[parameters[name]]
        torch.testing.assert_close(parameters[name].detach().double(), weight, rtol=1e-6, atol=1e-6)
        for key, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            assert state[key].dtype == getattr(torch, state_dtype.name)
            # a number between two of bfloat16 may round to either
            rounding = 2.0**-7 if state_dtype is Dtype.bfloat16 else 1e-6
            torch.testing.assert_close(state[key].double(), moment.double(), rtol=rounding, atol=1e-7)
        assert state["step"].item() == STEPS
        assert state["step"].dtype == torch.float32


def test_rounding_moments_is_not_for_nothing() -> None:
    """Moments in bfloat16 give other weights than moments in float32, so the format is in force; and near ones."""
    exact, _, _ = train(OptimizerConfig(lr=0.01))
    rounded, _, _ = train(OptimizerConfig(lr=0.01, state_dtype=Dtype.bfloat16))
    for name in SHAPES:
        apart = (exact[name] - rounded[name]).abs().max().item()
        assert 1e-6 < apart < 1e-3, name


@pytest.mark.parametrize("state_dtype", [Dtype.float32, Dtype.bfloat16])
def test_one_graph_takes_every_shape_and_every_rate(state_dtype: Dtype) -> None:
    """Nothing is compiled after the first step, though the rate is another at each; and one graph serves all shapes."""
    before = count_graphs()
    _, _, after_first = train(OptimizerConfig(lr=0.01, state_dtype=state_dtype), "aot_eager")
    assert after_first == 0
    assert count_graphs() - before == 1


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_parameters_may_have_taken_different_numbers_of_steps(backend: str | None) -> None:
    """A parameter whose state was not loaded begins anew: its moments are corrected by its own count of steps."""
    config = OptimizerConfig(lr=0.1, weight_decay=0.0, state_dtype=Dtype.bfloat16)
    parameters = {name: nn.Parameter(torch.ones(4, 4)) for name in ("old.weight", "new.weight")}
    optimizer = build_optimizer(parameters.items(), config, CPU, backend)
    for parameter in parameters.values():
        parameter.grad = torch.ones(4, 4)
    optimizer.step()
    for value in optimizer.state[parameters["new.weight"]].values():
        value.zero_()
    optimizer.step()
    # of gradients that never change, every step has the length of the rate
    torch.testing.assert_close(parameters["old.weight"].detach(), torch.full((4, 4), 0.8), rtol=1e-2, atol=0)
    torch.testing.assert_close(parameters["new.weight"].detach(), torch.full((4, 4), 0.8), rtol=1e-2, atol=0)


def test_pytorchs_kernel_on_a_cpu_does_not_take_them() -> None:
    """Why titan widens and rounds by itself on a CPU. Where this fails, PyTorch has learned it, and titan uses it."""
    assert not takes_bfloat16_moments("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_a_gpu_takes_the_same_steps(backend: str | None) -> None:
    """On CUDA too, by PyTorch's kernel or by titan's way around it, or compiled."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = OptimizerConfig(lr=0.01, weight_decay=0.1, state_dtype=Dtype.bfloat16)
    parameters, optimizer, after_first = train(config, backend, torch.device("cuda"))
    for name, (weight, first, _) in written_out(config).items():
        torch.testing.assert_close(parameters[name].detach().cpu().double(), weight, rtol=1e-5, atol=1e-5)
        moment = optimizer.state[parameters[name]]["exp_avg"].cpu().double()
        torch.testing.assert_close(moment, first.double(), rtol=2.0**-7, atol=1e-7)
    assert after_first == 0
