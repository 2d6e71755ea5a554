"""cluster=simulated: one rank of a cluster that is not here is the rank that would be there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.parallel.layouts import SMALL
from tests.parallel.pool import RankPool
from tests.support.configs import compose
from titan.checkpoint.state import create_optimizer_state
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.schema import TitanConfig
from titan.models.family import load_family
from titan.models.flops import count_parameters
from titan.optim.build import build_optimizer
from titan.parallel.mesh import build_mesh
from titan.simulate import describe, simulate
from titan.trainer.model import build_model


def simulated(*overrides: str) -> TitanConfig:
    """Return a resolved config of a simulated cluster."""
    return check_config(compose(["cluster=simulated", *overrides]), Machine())


def count_real(overrides: Sequence[str]) -> tuple[int, list[str]]:
    """Return the numbers that this real rank has of the parameters, and their names."""
    config = check_config(compose(overrides), Machine())
    mesh = build_mesh(config.parallelism, "cpu")
    model = build_model(config, load_family("llama"), mesh, torch.device("cpu"))
    return sum(p.to_local().numel() for _, p in model.parameters), [name for name, _ in model.parameters]


LAYOUT = (*SMALL, "parallelism.pp=2", "parallelism.tp=2", "training.local_batch_size=4")


@pytest.mark.parametrize("layout", [LAYOUT, (*SMALL, "parallelism.tp=2")])
def test_it_is_the_rank_that_would_be_there(pools: Callable[[int], RankPool], layout: tuple[str, ...]) -> None:
    """The parameters of every simulated rank are as many as the real rank's."""
    real = pools(4).run(count_real, (*layout, "cluster.devices_per_node=4"))
    for rank, (numbers, _) in enumerate(real):
        found = simulate(simulated(*layout, "cluster.devices_per_node=4", f"cluster.simulated_rank={rank}"))
        assert found.parameters == numbers
        assert found.optimizer_bytes == 2 * found.weights_bytes == 8 * numbers


@pytest.mark.parametrize(("state_dtype", "bytes_a_number"), [("float32", 8), ("bfloat16", 4)])
def test_it_says_what_the_moments_take(state_dtype: str, bytes_a_number: int) -> None:
    """Two numbers beside every parameter, in their format; and as many bytes as the optimizer then has."""
    config = simulated(*LAYOUT, "cluster.devices_per_node=4", f"optimizer.state_dtype={state_dtype}")
    found = simulate(config)
    assert found.optimizer_bytes == bytes_a_number * found.parameters
    weight = torch.nn.Parameter(torch.ones(3, 5))
    optimizer = build_optimizer([("w.weight", weight)], config.optimizer, torch.device("cpu"))
    create_optimizer_state(optimizer)
    moments = [optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.nbytes for moment in moments) == bytes_a_number * weight.numel()


def test_gathered_weights_have_the_format_of_the_computing() -> None:
    """Twice the bytes in float32."""
    single, double = (
        simulate(simulated(*SMALL, "cluster.devices_per_node=4", f"training.param_dtype={dtype}"))
        for dtype in ("bfloat16", "float32")
    )
    assert 2 * single.largest_gathered_bytes == double.largest_gathered_bytes


def test_all_ranks_together_have_the_model_once() -> None:
    """Without replicas, and with norms that tensor parallelism does not cut, the shards add up."""
    config = (*SMALL, "parallelism.pp=2", "cluster.devices_per_node=2", "cluster.nodes=4", "parallelism.cp=2")
    found = [simulate(simulated(*config, f"cluster.simulated_rank={rank}")) for rank in range(8)]
    assert sum(each.parameters for each in found) == count_parameters(simulated(*config).model)
    assert {each.coordinates["pp"] for each in found[:4]} == {0}
    assert found[0].modules != found[7].modules


RECIPES = {
    "llama3_8b_8gpu": (8, 8_030_261_248, 0.2),
    "llama3_70b_256gpu": (256, 70_553_706_496, 0.2),
    "llama3_405b_512gpu": (512, 405_853_388_800, 0.2),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_build(recipe: str) -> None:
    """A rank of each published set-up builds within a minute and has about its share of the model."""
    ranks, parameters, spread = RECIPES[recipe]
    config = simulated(f"experiment={recipe}")
    found = simulate(config)
    assert (found.ranks, found.whole_parameters) == (ranks, parameters)
    assert found.parameters == pytest.approx(parameters / ranks, rel=spread)
    assert found.build_seconds < 60
    assert math.prod((config.parallelism.pp, config.parallelism.tp)) <= ranks
    assert found.step_seconds == []


@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("parallelism.tp=2", "parallelism.cp=2", "parallelism.cp_method=ring"),
        ("parallelism.pp=2", "data.mask_documents=true"),
        ("parallelism.pp=2", "parallelism.tp=2", "parallelism.pp_schedule=ZBVZeroBubble", "parallelism.pp_less_first=0",
         "parallelism.pp_less_last=0", "training.local_batch_size=4"),
    ],
)  # fmt: skip
def test_it_executes(layout: tuple[str, ...]) -> None:
    """With steps to execute, the rank does its own work, and says how long that took."""
    config = simulated(*SMALL, "cluster.devices_per_node=4", "cluster.simulated_steps=2", *layout)
    found = simulate(config)
    assert len(found.step_seconds) == 2
    assert min(found.step_seconds) > 0
    assert found.peak_memory_gib is not None
    text = "\n".join(describe(config, found))
    assert "2 steps after a warm-up" in text


def test_it_starts_and_writes_nothing(titan_process: Callable[..., object], here: Path) -> None:
    """The command reports and leaves no file."""
    before = sorted(here.rglob("*"))
    finished = titan_process("cluster=simulated", "cluster.nodes=64", "parallelism=fsdp_tp", "model=llama3_8b")
    assert finished.code == 0, finished.text  # type: ignore[attr-defined]
    assert "rank 0 of 512" in finished.out  # type: ignore[attr-defined]
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("cluster.simulated_rank=8",), "cluster.simulated_rank=7"),
        (("cluster=local", "cluster.simulated_steps=1"), "cluster=simulated"),
        (("cluster.simulated_steps=1", "cluster.device=cuda"), "cluster.device=cpu"),
    ],
)
def test_what_cannot_be_simulated_is_refused(overrides: tuple[str, ...], words: str) -> None:
    """The error says what to type instead."""
    with pytest.raises(Exception, match=words):
        simulated(*overrides)
