"""No page names a group, an option or a key that is not there, nor a value that a key does not take."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from titan.api.run import Run
from titan.config.keys import find_key, is_known, schema_keys, table_of
from titan.config.load import option_groups
from titan.config.schema import TitanConfig
from titan.convert.torchtitan_options import RENAMED, find_option

from .commands import PAGES, blocks, code
from .test_commands import MISTAKEN

GROUPS = option_groups()
NODES = {name for name, key in schema_keys().items() if key.is_node and "." not in name}
OWN = {"cluster=ours", "model=my_gpt", "model=my_llama", "experiment=mine", "group=option"}
"""Options of a reader's own, which a page tells how to make."""
FILES = ("json", "jsonl", "yaml", "safetensors", "model", "py", "toml", "md", "pt", "pth", "gz", "zst")
"""What stands behind the last dot of a file's name, which otherwise looks like a key."""
TENSORS = re.compile(r"(model|optimizer)\.(<name>|output|layers|tok_embeddings|norm|\*|name)|data\.cursors")
"""Names in a checkpoint begin with the words of groups."""


@dataclass(frozen=True)
class Word:
    """A word of a page that names something of the config."""

    place: str
    text: str

    @property
    def key(self) -> str:
        """What is before the equals sign, without Hydra's signs."""
        return self.text.partition("=")[0].lstrip("+~")

    @property
    def value(self) -> str | None:
        """What is behind it."""
        return self.text.partition("=")[2] if "=" in self.text else None


def words_of(path: Path) -> Iterator[Word]:
    """Return the words of a page's code that begin as a key or a group of titan's does."""
    wrong = {block.line for block in blocks(path) if any(text in block.text for text in MISTAKEN)}
    for line, text in code(path):
        if line in wrong:
            continue
        for word in _split(text):
            root = re.match(r"[+~]*([a-z_0-9/]+)(?=[.=])", word)
            if root is not None and root[1] in (GROUPS.keys() | NODES) - {"hydra"}:
                yield Word(f"{path.name}:{line}", word.rstrip(",;:" if "(" in word else ",;:)"))


def problem_of(word: Word) -> str:
    """Return what is wrong with what a word names; nothing if it is right."""
    key, value = word.key, word.value
    if word.text in OWN or TENSORS.match(key) or (value is None and key.rpartition(".")[2] in FILES):
        return ""
    if word.place.startswith("coming_from_torchtitan.md") and (find_option(key) or key in RENAMED):
        return ""
    if key in GROUPS and value is not None:
        options = [option for option in value.split(",") if re.fullmatch(r"[\w]+", option) and not option.isupper()]
        unknown = [option for option in options if option not in GROUPS[key]]
        return f"{key} has no option {', '.join(unknown)}" if unknown else ""
    if not re.fullmatch(r"[a-z_0-9.]+", key):
        return ""  # a pattern, such as training.{steps,seed}
    if key.startswith("run.") and hasattr(Run, key.removeprefix("run.")):  # a handle of titan.launch
        return ""
    if not is_known(key) and find_key(key) is None:
        return f"{key} is no key"
    return _problem_of_value(key, value) if value else ""


def _problem_of_value(key: str, value: str) -> str:
    found = find_key(key)
    is_placeholder = re.search(r"\.\.\.|<|\$\{|^[A-Z][A-Z_]*$", value) is not None
    if is_placeholder or found is None or found.is_node or found.is_table or table_of(key) is not None:
        return ""
    if key not in schema_keys() or key.startswith(("model.rope_scaling.", "validation.data.")):
        return ""
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
        if isinstance(override.value(), IntervalSweep):
            return ""
        for each in override.sweep_iterator() if override.is_sweep_override() else [override.value()]:
            OmegaConf.update(_schema(), key, each)
    except (HydraException, OmegaConfBaseException) as error:
        return f"{key} does not take {value}: {str(error).splitlines()[0]}"
    return ""


@functools.cache
def _schema() -> DictConfig:
    return OmegaConf.structured(TitanConfig)


def _split(text: str) -> list[str]:
    """Return the words of a text, those within quotes too."""
    words = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words += shlex.split(line, comments=True)
        except ValueError:  # a lone quote, in what a program prints
            words += line.split()
    return [part for word in words for part in ([word] if "{" in word or "[" in word else word.split())]


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_a_page_names_nothing_that_is_not_there(path: Path) -> None:
    """Every group=option, group.key=value and group.key in code is in conf/ and in the schema."""
    problems = [f"{word.place}: {word.text}: {said}" for word in words_of(path) if (said := problem_of(word))]
    assert problems == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model=llama4", "no option llama4"),
        ("parallelism=fsdp,fsdpp", "no option fsdpp"),
        ("training.stps=3", "training.stps is no key"),
        ("checkpoint.intervall", "checkpoint.intervall is no key"),
        ("training.steps=many", "does not take many"),
        ("training.seed=1,x", "does not take 1,x"),
        ("parallelism.cp_method=rings", "does not take rings"),
        ("+data.components.code.wieght=1", "no key"),
    ],
)
def test_a_wrong_name_would_be_found(text: str, said: str) -> None:
    """What looks for wrong names finds them."""
    assert said in problem_of(Word("page.md:1", text))


@pytest.mark.parametrize(
    "text",
    [
        "model=llama3_8b",
        "training.seed=1,2,3",
        "metrics.jsonl",
        "model.output.weight",
        "run.dir=DIR",
        "+cluster.environment.NCCL_DEBUG=INFO",
        "+data.components.code.weight=2",
        "optimizer.lr=interval(1e-4,1e-3)",
    ],
)
def test_a_right_name_passes(text: str) -> None:
    """What looks like a key and is a file, a tensor or a table's entry is no mistake."""
    assert problem_of(Word("page.md:1", text)) == ""


def test_pages_name_many_keys() -> None:
    """The search is not blind: the pages name a hundred keys and more."""
    assert len({word.key for path in PAGES for word in words_of(path)}) > 100
