"""A model's shape goes into a file of its own and comes back, and nothing else in the file matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan.config.load import compose, config_text, load_model, model_text
from titan.errors import ConfigError


@pytest.mark.parametrize("option", ["llama3_1_8b", "llama3_2_1b", "llama2_7b"])
def test_a_shape_comes_back(tmp_path: Path, option: str) -> None:
    """From a file with the model alone, and from a whole frozen config."""
    config = compose([f"model={option}", "run.dir=somewhere"])
    for text in (model_text(config.model), config_text(config)):
        (tmp_path / "config.yaml").write_text(text)
        assert load_model(tmp_path / "config.yaml") == config.model


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no node model"),
        ("[1]", "has no node model"),
        ("model: 3", "has no node model"),
        ("model: [", "is not a titan config"),
        ("model: {dim: wide}", "could not be converted to Integer"),
        ("model: {name: a}", "missing mandatory value: dim"),
        ("model: {width: 3}", "Key 'width' not in 'ModelConfig'"),
        ("model: {name: '${oc.env:HOME}'}", "its model refers to other values"),
        ("\x00", "is not a titan config"),
    ],
)
def test_what_is_no_shape_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """With the file's name; and a checkpoint from elsewhere does not get to read the environment."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_model(tmp_path / "config.yaml")
    assert str(tmp_path / "config.yaml") in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    """As any other that cannot be read."""
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_model(tmp_path / "config.yaml")
