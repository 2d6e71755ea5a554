"""A family of models from outside runs under every parallelism through one description."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.toy_family import TOY
from titan.errors import ConfigError
from titan.models.family import load_family
from titan.trainer.record import Record, compare_records
from titan.verify.parity import FLOAT32, is_same

from .layouts import layout_config, record_layout
from .matrix import mesh
from .pool import RankPool

FAMILY = "model.family=tests.support.toy_family:TOY"


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, mesh(dp_shard=2)),
        (2, mesh(dp_replicate=2)),
        (2, mesh(tp=2)),
        (2, (*mesh(tp=2), "parallelism.sequence_parallel=false", "parallelism.loss_parallel=false")),
        (2, (*mesh(cp=2), "parallelism.cp_method=ring")),
        (2, mesh(pp=2)),
        (2, (*mesh(cp=2), "data.mask_documents=true")),
        (2, (*mesh(dp_shard=2), "activation_checkpoint=selective")),
        pytest.param(4, mesh(pp=2, tp=2), marks=pytest.mark.slow),
        pytest.param(16, mesh(pp=2, dp_shard=2, cp=2, tp=2), marks=pytest.mark.slow),
    ],
)
def test_it_equals_one_process(record: Callable[..., Record], world_size: int, overrides: tuple[str, ...]) -> None:
    """Every axis alone and all four together give what one process gives."""
    data = tuple(text for text in overrides if text.startswith("data."))
    reference = record(1, FAMILY, *data)
    assert any("head_norm" in name for name in reference.gradients)
    difference = compare_records(record(world_size, FAMILY, *overrides), reference)
    assert is_same(difference, FLOAT32), difference


def test_its_parameters_are_counted(record: Callable[..., Record]) -> None:
    """The description's count is the model's."""
    weights = record(1, FAMILY).weights
    config = layout_config(1, (FAMILY,)).model
    assert sum(tensor.numel() for tensor in weights.values()) == TOY.count_parameters(config)


def test_a_plan_that_forgets_a_module_is_refused(pools: Callable[[int], RankPool], packed_file: Path) -> None:
    """A parameter that tensor parallelism knows nothing of would be wrong in silence."""
    overrides = ("model.family=tests.support.toy_family:FORGETFUL", *mesh(tp=2))
    with pytest.raises(AssertionError, match=r"tensor_plan says nothing of layers\.0\.attention\.head_norm"):
        pools(2).run(record_layout, 2, overrides, packed_file)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt", "one of your own as package.module:NAME"),
        ("no_such_package:FAMILY", "No module named"),
        ("titan.models.llama:NOPE", "has no attribute"),
        ("titan.models.llama:Llama", "not a titan.models.family.ModelFamily"),
    ],
)
def test_what_is_no_family_is_refused(name: str, reason: str) -> None:
    """The error says why, and what to type instead."""
    with pytest.raises(ConfigError, match=reason) as caught:
        load_family(name)
    assert "model.family=llama" in str(caught.value)


def test_the_families_of_the_module_are_named() -> None:
    """Where the module is there and has families, they are what to type."""
    with pytest.raises(ConfigError, match=r"Try  model\.family=titan\.models\.llama:LLAMA   or  model\.family=llama"):
        load_family("titan.models.llama:NOPE")
