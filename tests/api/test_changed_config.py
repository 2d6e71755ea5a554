"""A config that a program changes after composing it: mistakes are told as on the command line."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import titan
from titan.config.schema import DataKind, ModelConfig, TitanConfig, TrainingConfig
from titan.errors import ConfigError


@pytest.fixture
def config(here: Path) -> TitanConfig:
    """One with every kind of node: optional ones, and a table of them."""
    return titan.compose("model=llama3_8b", "data=mixture", "+data.components.code={kind:text,path:a}")


@pytest.mark.parametrize(
    ("node", "name", "words"),
    [
        ("training", "stpes", "TrainingConfig has no key stpes. Nearest: steps"),
        ("", "trainingg", "TitanConfig has no key trainingg. Nearest: training"),
        ("run", "colour", "RunConfig has no key colour. Its keys: name, dir"),
    ],
)
def test_a_misspelt_key_cannot_be_set(config: TitanConfig, node: str, name: str, words: str) -> None:
    """What nothing would read is refused where it is written, with the nearest key, and changes nothing."""
    before = copy.deepcopy(config)
    with pytest.raises(AttributeError, match=words):
        setattr(getattr(config, node) if node else config, name, 7)
    with pytest.raises(AttributeError, match="facter"):
        config.model.rope_scaling.facter = 8  # type: ignore[union-attr]
    assert config == before
    assert vars(config) == vars(before)


def test_a_config_is_still_a_dataclass_like_any_other(config: TitanConfig) -> None:
    """It is copied, replaced, pickled, taken apart, and taken for a structured config."""
    assert copy.copy(config) == copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config.training, steps=7).steps == 7
    assert dataclasses.asdict(config)["training"]["steps"] == config.training.steps
    assert OmegaConf.to_object(OmegaConf.structured(config)) == config


def test_what_is_derived_from_a_node_may_have_more() -> None:
    """A class of the user's keeps fields and attributes of its own."""

    @dataclass
    class Wider(ModelConfig):
        experts: int = 8

    class Noted(TrainingConfig):
        def __init__(self, note: str) -> None:
            super().__init__(steps=1)
            self.note = note

    wider = Wider(dim=32)
    wider.experts = 4
    assert (wider.experts, wider.dim) == (4, 32)
    assert Noted("mine").note == "mine"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("training.steps", "abc", "training.steps = abc is not a whole number"),
        ("training.steps", None, "training.steps = null, but it cannot be left open"),
        ("training.steps", "???", "training.steps is not set"),
        ("training.deterministic", 2, "training.deterministic = 2 is not true or false"),
        ("data.kind", "texts", "data.kind = texts is none of its values"),
        ("model.rope_scaling", {"factor": 8}, "model.rope_scaling holds keys, not a value"),
        ("training", 5, "training holds keys, not a value"),
    ],
)
def test_a_value_of_another_type_is_told_before_anything_is_compared(
    config: TitanConfig, here: Path, key: str, value: Any, words: str
) -> None:
    """launch, plan and diff hold what a program has set against the key's type, and say which key it is."""
    group, _, name = key.partition(".")
    setattr(getattr(config, group) if name else config, name or group, value)
    for use in (titan.launch, titan.plan):
        with pytest.raises(ConfigError, match=words):
            use(config)
    assert not list(here.iterdir())


def test_a_value_that_the_command_line_would_take_is_taken(here: Path) -> None:
    """An option by its name, and a path for a text, mean what they mean in a shell."""
    config = titan.compose("tokenizer=bytes", "cluster=simulated")
    config.data.kind = "python_stdlib"  # type: ignore[assignment]
    config.run.dir = Path("runs/mine")  # type: ignore[assignment]
    planned = titan.plan(config).config
    assert (planned.data.kind, planned.run.dir) == (DataKind.python_stdlib, str(here / "runs/mine"))


def test_compose_takes_texts() -> None:
    """A list in the place of several texts is refused with what to write."""
    with pytest.raises(TypeError, match=r"not list: titan\.compose\(\*overrides\)"):
        titan.compose(["model=llama3_8b"])  # type: ignore[arg-type]


def test_several_values_are_no_flag_in_python() -> None:
    """Where there is no command line, no flag of it is proposed."""
    with pytest.raises(ConfigError, match="several values") as caught:
        titan.compose("training.steps=1,2")
    assert "--multirun" not in str(caught.value)
    assert "titan.launch(titan.compose(" in str(caught.value)
