"""Where metrics go is checked before a run starts: packages, and a key that is nowhere in the config."""

from __future__ import annotations

import importlib.util
import re

import pytest

from titan.config import check
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.load import compose, config_text
from titan.errors import ConfigError


def problems(*overrides: str) -> str:
    """Return what is wrong with a config, or nothing."""
    try:
        check_config(compose(["run.dir=x", *overrides]), Machine())
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("package", "overrides", "answer"),
    [
        ("tensorboard", ["metrics=tensorboard"], "pip install 'titan[tensorboard]'   or  metrics.tensorboard=false"),
        ("wandb", ["metrics=wandb", "metrics.wandb.mode=offline"], "pip install wandb   or  metrics.wandb.enable="),
    ],
)
def test_a_package_that_is_missing_is_named_with_what_installs_it(
    package: str, overrides: list[str], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused here before anything starts; not for another machine, whose packages may be others."""
    assert problems(*overrides) == ""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert f"but the package {package} is not installed" in problems(*overrides)
    assert answer in problems(*overrides)
    assert "is not installed" not in problems(*overrides, "cluster=slurm")


def test_a_run_without_a_key_is_refused_and_told_where_to_put_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Online needs a key in the environment or from a login; offline needs none."""
    monkeypatch.setattr(check, "has_wandb_key", lambda: False)
    answer = problems("metrics=wandb")
    assert "there is no key for Weights & Biases" in answer
    assert "export WANDB_API_KEY=...   or  wandb login   or  metrics.wandb.mode=offline" in answer
    assert problems("metrics=wandb", "metrics.wandb.mode=offline") == ""
    monkeypatch.setattr(check, "has_wandb_key", lambda: True)
    assert problems("metrics=wandb") == ""


def test_the_config_has_no_place_for_a_key() -> None:
    """No key of the config could hold a secret, and the frozen config has none."""
    text = config_text(check_config(compose(["run.dir=x", "metrics=wandb", "metrics.wandb.mode=offline"]), Machine()))
    (node,) = re.findall(r"  wandb:\n((?:    .*\n)+)", text)
    assert [line.split(":")[0].strip() for line in node.splitlines()] == [
        *("enable", "mode", "project", "entity", "name", "group", "tags")
    ]
