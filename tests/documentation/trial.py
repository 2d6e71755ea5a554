"""Trying a command of the documentation without starting what it starts.

Overrides are composed and held against every rule, on a machine of eight GPUs that has none of the files that they
name. Any other command of titan is called as a shell would, and stopped once it has understood its arguments. What
other programs are told is looked at as far as titan knows it: a target of the Makefile, a script, a module.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from unittest import mock

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tests.support.command import REPOSITORY
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.keys import schema_keys
from titan.config.load import compose, compose_untyped, to_typed
from titan.config.schema import DataKind, SourceConfig, TitanConfig, TokenizerConfig, TokenizerKind
from titan.errors import CommandError, ConfigError
from titan.generate.options import read_options

FLAGS = ("--multirun", "--resolve", "--help")
WITH_VALUE = ("--cfg", "--info", "--package", "--config-dir")


class Wrong(Exception):
    """A command that would not start."""


class Untried(Exception):
    """A command that this cannot try."""


def try_command(words: list[str]) -> None:
    """Go as far with a command as possible without starting anything.

    Raises:
        Wrong: If it would end with a mistake of whoever typed it.
        Untried: If it is not for titan to say.
    """
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)] or words
    program, rest = words[0], words[1:]
    if program == "make":
        _try_make(rest)
    elif program == "python" and rest[:1] == ["-m"]:
        _try_module(rest[1], rest[2:])
    elif program == "python":
        if not (REPOSITORY / rest[0]).is_file():
            raise Wrong(f"{rest[0]} is no file of the repository")
    elif program == "torchrun" and "titan.train" in rest:
        after = rest.index("titan.train")
        ranks = int(rest[rest.index("--nproc-per-node") + 1])
        try_overrides(tuple(rest[after + 1 :]), ranks)
    elif program.startswith(("launchers/", "tests/")):
        if not (REPOSITORY / program).is_file():
            raise Wrong(f"{program} is no file of the repository")
        try_overrides(tuple(word for word in rest if "=" in word))
    else:
        raise Untried(program)


def _try_make(targets: list[str]) -> None:
    done = subprocess.run(["make", "--dry-run", *targets], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise Wrong(done.stderr.strip())


def _try_module(module: str, arguments: list[str]) -> None:
    if importlib.util.find_spec(module) is None:
        raise Wrong(f"there is no module {module}")
    arguments = [word.strip("[]") if word.startswith("[") else word for word in arguments]
    if any(word in ("...", "") or word.startswith("<") for word in arguments):
        return  # a pattern, not a command
    if module == "titan.train":
        try_overrides(tuple(_without_flags(arguments)))
    elif module.startswith("titan.") and arguments and module != "titan.worker":
        _try_arguments(module, arguments)


def _without_flags(arguments: list[str]) -> Iterator[str]:
    remaining = iter(arguments)
    for word in remaining:
        if word == "--config-dir":
            raise Untried("with groups of one's own")
        if word in WITH_VALUE:
            next(remaining)
        elif word not in FLAGS:
            yield word


class _Understood(Exception):
    """The arguments were read."""


@contextmanager
def _reading_only() -> Iterator[None]:
    """Let every command stop once it has read its arguments."""

    def stop(read: str) -> object:
        original = getattr(argparse.ArgumentParser, read)

        def wrapped(self: argparse.ArgumentParser, *arguments: object, **more: object) -> None:
            raise _Understood(original(self, *arguments, **more))

        return mock.patch.object(argparse.ArgumentParser, read, wrapped)

    with stop("parse_args"), stop("parse_intermixed_args"):  # type: ignore[attr-defined]
        yield


def _try_arguments(module: str, arguments: list[str]) -> None:
    """Call a command of titan with its arguments until it has read them, and compose its overrides."""
    is_package = importlib.util.find_spec(module).submodule_search_locations is not None  # type: ignore[union-attr]
    found = importlib.import_module(f"{module}.__main__" if is_package else module)
    said = StringIO()
    try:
        with (
            mock.patch.object(sys, "argv", [module, *arguments]),
            redirect_stdout(said),
            redirect_stderr(said),
            _reading_only(),
        ):
            code = found.main()
    except _Understood as understood:
        given = understood.args[0]
        overrides = [text for text in getattr(given, "overrides", []) if not text.endswith("=...")]
        if module == "titan.generate":  # whose keys are its own
            try_options(overrides)
        elif getattr(given, "config_dir", None) is None:
            try_composing(tuple(overrides))
    except SystemExit as exit:
        raise Wrong(said.getvalue().strip() or str(exit.code)) from None
    else:
        raise Wrong(f"it ended with {code} before it had read its arguments\n{said.getvalue()}")


def try_options(words: list[str]) -> None:
    """Read the keys of titan.generate."""
    try:
        read_options(words)
    except CommandError as error:
        raise Wrong(str(error)) from None


def try_composing(overrides: tuple[str, ...]) -> None:
    """Compose."""
    try:
        _composed(overrides)
    except ConfigError as error:
        raise Wrong(str(error)) from None


def try_overrides(overrides: tuple[str, ...], started_ranks: int | None = None) -> None:
    """Compose what a command says, one point of it if it sweeps, and apply every rule."""
    is_open = re.compile(r"=(\.\.\.|N)$|^hydra|\bgroup[.=]")
    texts = tuple(_one_point(text) for text in overrides if not is_open.search(text))
    machine = Machine(
        gpus=8,
        has_bfloat16=True,
        slurm_gpus=lambda partition: 8,
        started_ranks=started_ranks,
        started_ranks_per_node=started_ranks,
    )
    try:
        config = _elsewhere(_composed(texts))
        here = mock.patch.dict(os.environ, WANDB_API_KEY="a key")
        with here, mock.patch("shutil.which", return_value="/usr/bin/sbatch"):
            check_config(config, machine)
    except ConfigError as error:
        raise Wrong(str(error)) from None


@functools.cache
def _composed(overrides: tuple[str, ...]) -> TitanConfig:
    """Compose; commands that choose the same options share the composition, to which their values are then applied."""
    parser = OverridesParser.create()
    try:
        values = {text: parser.parse_override(text) for text in overrides}
        plain = {text for text, override in values.items() if _sets_a_value(override)}
        composed = copy.deepcopy(_chosen(tuple(text for text in overrides if text not in plain)))
        for text in plain:
            OmegaConf.update(composed, values[text].key_or_group, values[text].value(), merge=True)
        return to_typed(composed)
    except (HydraException, OmegaConfBaseException, ConfigError):
        return compose(overrides)  # which says what is wrong


@functools.cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    return compose_untyped(choices)


def _sets_a_value(override: Override) -> bool:
    key = schema_keys().get(override.key_or_group)
    return key is not None and not key.is_node and override.type is OverrideType.CHANGE


def _one_point(text: str) -> str:
    override: Override = OverridesParser.create().parse_override(text)
    if not override.is_sweep_override():
        return text
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.key_or_group}={value.start}"
    assert override.type is OverrideType.CHANGE
    return f"{override.key_or_group}={next(override.sweep_string_iterator())}"


def _elsewhere(config: TitanConfig) -> TitanConfig:
    """Put something in place of the files that a config names."""
    if config.tokenizer.path is not None:
        config = replace(config, tokenizer=TokenizerConfig(kind=TokenizerKind.bytes))
    if config.data.path is not None or config.data.components:
        data = replace(config.data, kind=DataKind.huggingface, path=None, dataset="unseen/words", components={})
        config = replace(config, data=data)
    if config.validation.data is not None and config.validation.data.path is not None:
        held_out = SourceConfig(kind=DataKind.huggingface, dataset="unseen/held_out")
        config = replace(config, validation=replace(config.validation, data=held_out))
    if config.checkpoint.initial_load is not None:
        config = replace(config, checkpoint=replace(config.checkpoint, initial_load=None))
    return config
