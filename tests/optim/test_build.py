"""AdamW over the right groups, and its step against one written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.configs import compose
from titan.config.schema import ModelConfig, OptimizerConfig
from titan.models.llama import Llama
from titan.optim.build import build_optimizer, has_weight_decay
from titan.optim.schedule import set_learning_rate

SMALL = ["model.dim=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.ffn_dim=48"]
CPU = torch.device("cpu")


def small(name: str) -> ModelConfig:
    """Return a flavor at a small size."""
    return compose([f"model={name}", *SMALL, "model.vocab_size=300"]).model


def decaying(model: Llama, config: OptimizerConfig) -> tuple[set[str], set[str]]:
    """Return the names of the parameters that decay and of those that do not, as the built optimizer has them."""
    optimizer = build_optimizer(model.named_parameters(), config, CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: tuple[set[str], set[str]] = (set(), set())
    for group in optimizer.param_groups:
        assert group["weight_decay"] in (0.0, config.weight_decay)
        found[0 if group["weight_decay"] else 1].update(names[id(parameter)] for parameter in group["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names), "each exactly once"
    return found


def kinds(names: set[str]) -> set[str]:
    """Return the names without their block."""
    return {name.split(".", 2)[2] if name.startswith("layers.") else name for name in names}


MATRICES = {f"attention.w{x}.weight" for x in "qkvo"} | {f"feed_forward.w{i}.weight" for i in (1, 2, 3)}
NORMS = {"attention_norm.weight", "ffn_norm.weight", "norm.weight"}


def test_matrices_decay_and_norms_and_the_embedding_do_not() -> None:
    """By default weight decay acts on the matrices, the output projection among them, and on nothing else."""
    yes, no = decaying(Llama(small("llama3_debug"), 8), OptimizerConfig(lr=0.1))
    assert kinds(yes) == MATRICES | {"output.weight"}
    assert kinds(no) == NORMS | {"tok_embeddings.weight"}


def test_a_tied_output_is_an_embedding() -> None:
    """Weights that are embedding and output at once are one parameter, and do not decay unless asked."""
    model = Llama(small("llama3_2_1b"), 8)
    yes, no = decaying(model, OptimizerConfig(lr=0.1))
    assert kinds(yes) == MATRICES
    assert kinds(no) == NORMS | {"tok_embeddings.weight"}
    yes, _ = decaying(model, OptimizerConfig(lr=0.1, decay_embeddings=True))
    assert kinds(yes) == MATRICES | {"tok_embeddings.weight"}


def test_everything_decays_if_asked() -> None:
    """decay_embeddings and decay_norms each add theirs, and only theirs."""
    model = Llama(small("llama3_debug"), 8)
    yes, _ = decaying(model, OptimizerConfig(lr=0.1, decay_embeddings=True))
    assert kinds(yes) == MATRICES | {"output.weight", "tok_embeddings.weight"}
    yes, _ = decaying(model, OptimizerConfig(lr=0.1, decay_norms=True))
    assert kinds(yes) == MATRICES | {"output.weight"} | NORMS
    yes, no = decaying(model, OptimizerConfig(lr=0.1, decay_norms=True, decay_embeddings=True))
    assert not no
    assert len(yes) == len(list(model.named_parameters()))


def test_a_bias_does_not_decay() -> None:
    """Any vector counts with the norms."""
    config = OptimizerConfig(lr=0.1)
    assert not has_weight_decay("some.bias", nn.Parameter(torch.zeros(4)), config)
    assert has_weight_decay("some.bias", nn.Parameter(torch.zeros(4)), replace(config, decay_norms=True))


def test_no_group_is_empty() -> None:
    """A pipeline stage may have no norm, and PyTorch wants no group without parameters."""
    optimizer = build_optimizer([("w.weight", nn.Parameter(torch.ones(2, 2)))], OptimizerConfig(lr=0.1), CPU)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_the_paper(weight_decay: float) -> None:
    """Five steps with changing rates equal AdamW written out in float64: bias-corrected moments, decoupled decay."""
    config = OptimizerConfig(lr=0.01, weight_decay=weight_decay, beta1=0.9, beta2=0.95, eps=1e-8)
    generator = torch.Generator().manual_seed(0)
    start = {
        "layer.weight": torch.randn(7, 5, generator=generator, dtype=torch.float64),
        "layer.norm.weight": torch.randn(5, generator=generator, dtype=torch.float64),
    }
    parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = build_optimizer(parameters.items(), config, CPU)
    expected = {name: value.clone() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in start.items()}
    second = {name: torch.zeros_like(value) for name, value in start.items()}
    for step in range(1, 6):
        rate = config.lr * step / 5
        set_learning_rate(optimizer, rate)
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.clone()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            m, v = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
            decay = weight_decay if name == "layer.weight" else 0.0
            expected[name] = expected[name] * (1 - rate * decay) - rate * m / (v.sqrt() + 1e-8)
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-13)


def test_the_optimizer_is_fused_where_it_can_be() -> None:
    """One kernel for all parameters on CPU and CUDA; elsewhere PyTorch chooses."""
    parameters = [("w.weight", nn.Parameter(torch.ones(2, 2)))]
    assert build_optimizer(parameters, OptimizerConfig(lr=0.1), CPU).defaults["fused"] is True
    assert not build_optimizer(parameters, OptimizerConfig(lr=0.1), torch.device("meta")).defaults["fused"]
