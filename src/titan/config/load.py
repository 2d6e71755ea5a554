"""The one door to Hydra and OmegaConf: compose, convert to dataclasses, freeze.

Conversion merges the *plain container* of what Hydra composed into a fresh schema. Merging the DictConfig itself
would let a key that was added with `+` through, as a stray attribute that nothing reads (measured with
omegaconf 2.3.1); the container is held against the schema key by key.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import threading
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import version
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException, SearchPathException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.explain import COMPOSITION_ERRORS, Groups, check_switches, explain_mistakes, gist
from titan.config.keys import find_key, flatten, is_known, is_no_switch, schema_keys, takes, unknown_key, wrong_value
from titan.config.schema import ModelConfig, TitanConfig, TokenizerConfig
from titan.errors import ConfigError, Problem, TitanError
from titan.run_directory import write_atomically

CONFIG_NAME = "train"
HYDRA_VERSION = "1.3"
"""The version of Hydra whose behaviour is asked for."""

T = typing.TypeVar("T")

_lock = threading.RLock()  # Hydra's composition uses process-wide state


def conf_dir() -> Path:
    """Return the folder of the shipped config groups: beside the code in a wheel, else the checkout's."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parents[1] / "conf"):
        if (candidate / f"{CONFIG_NAME}.yaml").is_file():
            return candidate
    raise TitanError(f"titan's config groups are missing: no conf/{CONFIG_NAME}.yaml near {package}")


def register_schema() -> None:
    """Make the schema known to Hydra, so that it holds every group file and every override against it."""
    ConfigStore.instance().store(name="titan_schema", node=_open_schema())


@functools.cache
def _schema() -> DictConfig:
    return OmegaConf.structured(TitanConfig)


@functools.cache
def _open_schema() -> DictConfig:
    """Return the schema with an open table for a mixture's components; `to_typed` holds them against it afterwards.

    omegaconf 2.3 refuses a plain table where an entry of a typed one is added, as in
    +data.components.code={kind:text}.
    """
    node = copy.deepcopy(_schema())
    node.data.components._metadata.element_type = Any
    return node


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Keep Python's collector from looking through all that is alive, again and again, while many objects are made.

    Nearly all of a config's stay, so there is little to find.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def compose(
    overrides: Sequence[str] = (), config_dir: str | None = None, config_name: str = CONFIG_NAME
) -> TitanConfig:
    """Compose a config as the command line would, without checking or starting anything.

    Args:
        overrides: What would be typed behind the command.
        config_dir: A folder of one's own groups, beside titan's; where both have a file, titan's is taken.
        config_name: The file to start from.

    Raises:
        ConfigError: If an override names an unknown group, option or key, or a value of the wrong type.
    """
    try:
        config = to_typed(compose_untyped(overrides, config_dir, config_name))
        check_switches(overrides)
        return config
    except TitanError:
        raise
    except Exception as error:
        raise ConfigError(explain_composition(error, overrides, config_dir, config_name)) from error


def compose_untyped(
    overrides: Sequence[str] = (), config_dir: str | None = None, config_name: str = CONFIG_NAME
) -> DictConfig:
    """Compose to Hydra's own type; leaves Hydra's process-wide state as it was."""
    with without_collections(), _hydra(config_dir):
        return hydra_compose(config_name, overrides=list(overrides))


class Composer:
    """Composes many configs in the time of a few, each as `compose_untyped` would.

    Those that choose the same options share one composition, to which their values are then applied, as Hydra does. For
    as long as no file of a group changes.
    """

    def __init__(self, config_dir: str | None = None, config_name: str = CONFIG_NAME) -> None:
        self.config_dir, self.config_name = config_dir, config_name
        self._made: dict[tuple[str, ...], DictConfig] = {}
        self._parser = OverridesParser.create()

    @without_collections()
    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """Compose to Hydra's own type, or raise what it raises."""
        try:
            values = [_value_of(text, self._parser) for text in overrides]
            choices = tuple(text for text, value in zip(overrides, values, strict=True) if value is None)
            if choices not in self._made:
                self._made[choices] = compose_untyped(choices, self.config_dir, self.config_name)
            composed = copy.deepcopy(self._made[choices])
            for key, value in filter(None, values):  # of a key that is set twice the last one counts
                OmegaConf.update(composed, key, value, merge=True)
        except COMPOSITION_ERRORS:
            return compose_untyped(overrides, self.config_dir, self.config_name)  # which says it in Hydra's words
        return composed


def _value_of(text: str, parser: OverridesParser) -> tuple[str, Any] | None:
    """Return the key and the value that an override sets; None if it is more than that."""
    override = parser.parse_override(text)
    key = schema_keys().get(override.key_or_group)
    if key is None or key.is_node or override.is_add() or override.is_force_add() or override.is_delete():
        return None
    return override.key_or_group, override.value()


def explain_composition(
    error: Exception,
    overrides: Sequence[str],
    config_dir: str | None = None,
    config_name: str = CONFIG_NAME,
    machine: Machine | None = None,
    is_sweep: bool = False,
) -> list[Problem]:
    """Return what is wrong with a command line that does not compose: every mistake in it, not only the first.

    What composes once the mistakes are left out is checked too, where `machine` is given.

    Raises:
        Exception: `error` itself, where it is no user's mistake but a defect.
    """

    def recompose(remaining: list[str]) -> None:
        config = to_typed(compose_untyped(remaining, config_dir, config_name))
        if machine is not None:
            check_config(config, machine)

    if config_dir is not None and not Path(config_dir).is_dir():
        return [Problem(f"--config-dir {config_dir} is not a folder", suggestion="--config-dir /path/to/a/folder")]
    groups = option_groups(overrides, config_dir)
    problems = explain_mistakes(error, overrides, groups, recompose, is_sweep)
    if config_dir is not None:
        problems += _explain_depth(config_dir, groups)
    return problems


def _explain_depth(config_dir: str, groups: Groups) -> Iterator[Problem]:
    """Say that a folder is itself a group, where it looks like one: the groups are the folders in --config-dir."""
    folder = Path(config_dir).resolve()
    if folder.name in groups and not any(each.is_dir() for each in folder.iterdir()):
        yield Problem(
            f"--config-dir {config_dir} is a folder of options for {folder.name}, and not one of groups",
            f"It is the folder that has {folder.name}/ in it.",
            f"--config-dir {os.path.normpath(os.path.join(config_dir, '..'))}",
        )


def option_groups(overrides: Sequence[str] = (), config_dir: str | None = None) -> Groups:
    """Return the options of every group: titan's, Hydra's, and the user's from `config_dir` and hydra.searchpath."""
    with _hydra(config_dir, _search_path_of(overrides)) as loader:
        # not through the loader itself, which copies everything it knows at every question
        repository = ConfigRepository(loader.get_search_path())
        return {group: repository.get_group_options(group) for group in _groups_below(repository, "")}


def points_of_sweep(overrides: Sequence[str], config_dir: str | None = None) -> list[list[str]]:
    """Return the overrides of every point that Hydra's own sweeper would run.

    Raises:
        HydraException: If the sweep cannot be counted out beforehand, an interval for instance.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    with _hydra(config_dir, _search_path_of(overrides)) as loader:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
        return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


@without_collections()
def to_typed(composed: DictConfig) -> TitanConfig:
    """Convert to dataclasses, strictly: no unknown key, no missing value, no value of another type.

    Raises:
        ConfigError: With all unknown keys, or all missing values.
        OmegaConfBaseException: If a value cannot be converted or an interpolation leads nowhere.
    """
    container = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(container, dict)
    container.pop("hydra", None)
    unknown = [unknown_key(key, str(value)) for key, value in _leaves(container) if not is_known(key)]
    if unknown:
        raise ConfigError(unknown)
    return _to_object(typing.cast(DictConfig, OmegaConf.merge(_schema(), container)))


@without_collections()
def retyped(config: TitanConfig) -> TitanConfig:
    """Return a config that a program has changed, each value of its key's type as on the command line.

    Raises:
        ConfigError: With all values of another type, or all missing ones.
    """
    values = flatten(config)
    if any(key.type is bool and is_no_switch(values.get(name)) for name, key in schema_keys().items()):
        raise ConfigError(_wrong_values(config))
    try:
        return _to_object(OmegaConf.structured(config))
    except OmegaConfBaseException as error:
        raise ConfigError(list(_wrong_values(config)) or gist(error)) from error


def _to_object(strict: DictConfig) -> TitanConfig:
    missing = sorted(OmegaConf.missing_keys(strict))
    if missing:
        raise ConfigError([Problem(f"{key} is not set", suggestion=f"{key}=...") for key in missing])
    return typing.cast(TitanConfig, OmegaConf.to_object(strict))


def _wrong_values(config: TitanConfig) -> Iterator[Problem]:
    for name, value in flatten(config).items():
        key = find_key(name)
        if key is not None and ((key.is_node and value is not None) or not takes(key, value)):
            yield wrong_value(key, value)


def save_config(config: TitanConfig, path: Path) -> None:
    """Freeze a resolved config: nothing in the file refers to anything outside of it."""
    write_atomically(path, config_text(config))


@without_collections()
def config_text(config: TitanConfig) -> str:
    """Return a resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def plain_config(config: TitanConfig) -> dict[str, Any]:
    """Return a resolved config as plain containers, for another program; enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    return typing.cast("dict[str, Any]", container)


def load_config(path: Path) -> TitanConfig:
    """Read a frozen config.

    Raises:
        ConfigError: If the file is missing or was not written by this version's schema.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_config(text, str(path))


def parse_config(text: str, where: str) -> TitanConfig:
    """Read a frozen config from YAML.

    Args:
        text: What `config_text` gave.
        where: Where it is from, for the error.

    Raises:
        ConfigError: If it was not written by this version's schema.
    """
    try:
        return to_typed(typing.cast(DictConfig, OmegaConf.create(text)))
    except ConfigError as error:
        problems = [Problem(f"{where}: {problem.what}", problem.why) for problem in error.problems]
        raise ConfigError(problems) from None
    except (*COMPOSITION_ERRORS, AssertionError) as error:
        raise ConfigError(f"{where} is not a titan config: {gist(error)}") from error


def model_text(model: ModelConfig) -> str:
    """Return a model's shape as YAML: a config with the node `model` alone."""
    return OmegaConf.to_yaml({"model": OmegaConf.structured(model)})


def load_model(path: Path) -> ModelConfig:
    """Read a model's shape out of a frozen config, whatever else is in it.

    Raises:
        ConfigError: If the file is missing, or has no node `model` of this version's schema.
    """
    found = _load_node(path, "model", ModelConfig)
    if found is None:
        raise ConfigError(f"{path} has no node model")
    return found


def load_tokenizer(path: Path) -> TokenizerConfig | None:
    """Read which tokenizer a frozen config names; None if it has the model's shape alone, as one that was imported.

    Raises:
        ConfigError: If the file is missing, or its node `tokenizer` is not of this version's schema.
    """
    return _load_node(path, "tokenizer", TokenizerConfig)


def _load_node(path: Path, name: str, schema: type[T]) -> T | None:
    try:
        container = OmegaConf.to_container(OmegaConf.create(path.read_text()), resolve=False)
        found = container.get(name) if isinstance(container, dict) else None
        if not isinstance(found, dict):
            return None
        if "${" in str(found):  # a frozen config refers to nothing, and the environment is nobody's business
            raise ConfigError(f"{path} is not a frozen config: its {name} refers to other values")
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), found)))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (*COMPOSITION_ERRORS, AssertionError) as error:
        raise ConfigError(f"{path} is not a titan config: {gist(error)}") from error


@contextlib.contextmanager
def _hydra(config_dir: str | None = None, search_path: Sequence[str] = ()) -> Iterator[ConfigLoader]:
    """Set Hydra up as `hydra.main` does, and put back what was there."""
    with _lock:
        before, base, job = GlobalHydra.instance().hydra, version.getbase(), JobRuntime.instance().get("name")
        GlobalHydra.instance().clear()
        try:
            version.setbase(HYDRA_VERSION)
            register_schema()
            folders = create_config_search_path(str(conf_dir()))
            before_schema = SearchPathQuery(provider="schema")
            if config_dir is not None:
                folder = Path(config_dir).absolute()
                if not folder.is_dir():
                    raise SearchPathException(f"the folder of config groups {folder} does not exist")
                folders.prepend("command-line", f"file://{folder}", before_schema)
            for path in search_path:
                folders.prepend("hydra.searchpath", path, before_schema)
            yield Hydra.create_main_hydra2("titan", folders).config_loader
        finally:
            GlobalHydra.instance().clear()
            if before is not None:
                GlobalHydra.instance().initialize(before)
            VersionBase.instance().version_base = base  # of which `setbase` would not take "never set"
            JobRuntime.instance().set("name", job)


def _search_path_of(overrides: Sequence[str]) -> list[str]:
    for text in overrides:
        if text.startswith("hydra.searchpath="):
            with contextlib.suppress(HydraException):
                value = OverridesParser.create().parse_override(text).value()
                return [str(path) for path in value] if isinstance(value, list) else []
    return []


def _groups_below(repository: ConfigRepository, parent: str) -> Iterator[str]:
    for name in repository.get_group_options(parent, ObjectType.GROUP):
        group = f"{parent}/{name}" if parent else name
        yield group
        yield from _groups_below(repository, group)


def _leaves(container: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in container.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value
