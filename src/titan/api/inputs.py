"""What a user may hand over for a config: the config itself, a run's handle, a run directory, a config.yaml."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from titan.api.finding import describe_no_run
from titan.config.check import check_config
from titan.config.load import load_config, retyped
from titan.config.schema import TitanConfig
from titan.errors import CommandError, ConfigError
from titan.launch.environment import current_machine
from titan.run_directory import RunDirectory

_TIME = r"\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2}"


@runtime_checkable
class HasDirectory(Protocol):
    """A run's handle, as far as this module has to know it."""

    @property
    def directory(self) -> Path:
        """The run's."""
        ...


def read_config(given: TitanConfig | HasDirectory | str | Path) -> tuple[TitanConfig, bool]:
    """Return a config, and whether it is the frozen one of a run.

    Raises:
        CommandError: If there is none.
        ConfigError: If a file is not this version's.
    """
    if isinstance(given, TitanConfig):
        return given, False
    path = path_of(given)
    if path.is_dir():
        path = RunDirectory(path).config
    if not path.is_file():
        raise CommandError(f"{path} does not exist\n  Try  a run directory, or the path of its config.yaml")
    return load_config(path), True


def run_directory_of(given: HasDirectory | str | Path) -> RunDirectory:
    """Return a run's directory, which has to be there.

    Raises:
        CommandError: If it is not.
    """
    path = path_of(given).expanduser().absolute()
    if path.name == "config.yaml":
        path = path.parent
    if not path.is_dir():
        raise CommandError(describe_no_run(path))
    return RunDirectory(path)


def path_of(given: Any) -> Path:
    """Return the path that was given, or the one of a run.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(given, (str, Path)):
        return Path(given).expanduser()
    if isinstance(given, HasDirectory):
        return given.directory
    raise TypeError(f"a config, a run or a path is wanted, not {type(given).__name__}: {given!r}")


def without_time(config: TitanConfig) -> TitanConfig:
    """Return a config whose run.dir, where nobody chose it, has no time of day: it differs whenever one composes."""
    default = rf"(.*/)?runs/{re.escape(config.run.name)}/{_TIME}"
    if re.fullmatch(default, config.run.dir) is None:
        return config
    return replace(config, run=replace(config.run, dir="runs/NAME/TIME"))


def filled_in(config: TitanConfig) -> TitanConfig:
    """Return a config as launching it here would freeze it; or as it is, where it cannot run here."""
    try:
        return check_config(retyped(config), current_machine())
    except ConfigError:
        return config
