"""What a run may change when it goes on: where its tokenizer lies, but not which one it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.vocabulary import MERGES, write_json_tokenizer, write_tokenizer
from titan.config.check import check_config
from titan.config.continuation import changed_keys, refused_keys
from titan.config.degrees import Machine
from titan.config.load import compose, config_text, parse_config
from titan.config.schema import TitanConfig
from titan.config.vocabulary import compute_fingerprint
from titan.errors import ConfigError


def resolved(*overrides: str) -> TitanConfig:
    """Return what would be frozen."""
    return check_config(compose(["run.dir=run", *overrides]), Machine())


def refused(before: TitanConfig, now: TitanConfig) -> list[str]:
    """Return the keys that keep `now` from going on with `before`."""
    return refused_keys(changed_keys(before, now))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small tokenizer.model."""
    return write_tokenizer(tmp_path / "tokenizer.model")


def test_the_frozen_config_says_which_tokenizer_it_is(path: Path) -> None:
    """The fingerprint is filled in for every kind, and survives the file."""
    for overrides in ((), ("tokenizer=tiktoken", f"tokenizer.path={path}")):
        config = resolved(*overrides)
        assert config.tokenizer.fingerprint == compute_fingerprint(config.tokenizer)
        assert parse_config(config_text(config), "frozen").tokenizer == config.tokenizer
        assert resolved(*overrides, f"tokenizer.fingerprint={config.tokenizer.fingerprint}") == config


def test_a_tokenizer_may_move_but_not_change(path: Path, tmp_path: Path) -> None:
    """Another place for the same file is nothing; another file in the same place is refused by its fingerprint."""
    typed = ("tokenizer=tiktoken", f"tokenizer.path={path}")
    before = resolved(*typed)
    moved = shutil.copy(path, tmp_path / "moved.model")
    assert refused(before, resolved("tokenizer=tiktoken", f"tokenizer.path={moved}")) == []
    write_tokenizer(path, MERGES[:-1])
    assert refused(before, resolved(*typed)) == ["tokenizer.fingerprint"]
    assert refused(before, resolved()) == ["tokenizer.kind", "tokenizer.fingerprint"]


def test_a_run_of_before_fingerprints_is_held_by_the_path(path: Path, tmp_path: Path) -> None:
    """An old frozen config has none: it goes on, with the same path alone."""
    before = resolved("tokenizer=tiktoken", f"tokenizer.path={path}")
    old = replace(before, tokenizer=replace(before.tokenizer, fingerprint=None))
    moved = shutil.copy(path, tmp_path / "moved.model")
    assert refused(old, before) == []
    assert refused(old, resolved("tokenizer=tiktoken", f"tokenizer.path={moved}")) == ["tokenizer.path"]
    assert "tokenizer.kind" in refused(old, resolved())


def test_a_fingerprint_that_was_given_is_held_against_the_file(path: Path) -> None:
    """What the user says it is, and it is not, is an error that shows both."""
    with pytest.raises(ConfigError) as error:
        resolved("tokenizer=tiktoken", f"tokenizer.path={path}", "tokenizer.fingerprint=abc")
    assert "is not the tokenizer with tokenizer.fingerprint = abc" in str(error.value)
    with pytest.raises(ConfigError, match="tokenizer=bytes is not the tokenizer with"):
        resolved("tokenizer.fingerprint=abc")


def test_conversations_need_a_template(tmp_path: Path) -> None:
    """Whichever source holds them, a folder without a chat template is refused before anything is started."""
    (tmp_path / "chat.jsonl").write_text("{}\n")
    bare = write_json_tokenizer(tmp_path / "bare", chat_template=None)
    data = ("data=chat", f"data.path={tmp_path}", "tokenizer=huggingface")
    with pytest.raises(ConfigError, match=r"data\.format = chat, but tokenizer\.path = .* has no chat template"):
        resolved(*data, f"tokenizer.path={bare}")
    held_out = ("validation=jsonl", f"validation.data.path={tmp_path}", "validation.data.format=chat")
    with pytest.raises(ConfigError, match=r"validation\.data\.format = chat, but"):
        resolved("tokenizer=huggingface", f"tokenizer.path={bare}", *held_out)
    assert resolved(*data, f"tokenizer.path={write_json_tokenizer(tmp_path / 'chat')}").data.packing.name == "best_fit"
