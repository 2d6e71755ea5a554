"""The one door to Hydra and OmegaConf: compose, convert to dataclasses, freeze, and explain what went wrong.

Conversion merges the *plain container* of what Hydra composed into a fresh schema. Merging the DictConfig itself
would let a key that was added with `+` through, as a stray attribute that nothing reads (measured with
omegaconf 2.3.1); the container is held against the schema key by key.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import threading
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.schema import TitanConfig
from titan.errors import ConfigError, Problem, TitanError
from titan.run_directory import write_atomically

CONFIG_NAME = "train"
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)
"""What Hydra and OmegaConf raise for a user's mistake."""

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
    ConfigStore.instance().store(name="titan_schema", node=TitanConfig)


def compose(
    overrides: Sequence[str] = (), config_dir: str | None = None, config_name: str = CONFIG_NAME
) -> TitanConfig:
    """Compose a config as the command line would, without checking or starting anything.

    Args:
        overrides: What would be typed behind the command.
        config_dir: A folder of one's own groups, searched before titan's.
        config_name: The file to start from.

    Raises:
        ConfigError: If an override names an unknown group, option or key, or a value of the wrong type.
    """
    try:
        return to_typed(compose_untyped(overrides, config_dir, config_name))
    except COMPOSITION_ERRORS as error:
        raise ConfigError(list(explain_composition(error, overrides, config_dir, config_name))) from error


def compose_untyped(
    overrides: Sequence[str] = (), config_dir: str | None = None, config_name: str = CONFIG_NAME
) -> DictConfig:
    """Compose to Hydra's own type; leaves Hydra's process-wide state as it was."""
    with _lock:
        before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            register_schema()
            with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="titan"):
                extra = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
                return hydra_compose(config_name, overrides=[*extra, *overrides])
        finally:
            GlobalHydra.instance().clear()
            if before is not None:
                GlobalHydra.instance().initialize(before)


def to_typed(composed: DictConfig) -> TitanConfig:
    """Convert to dataclasses, strictly: no unknown key, no missing value, no value of another type.

    Raises:
        ConfigError: With all unknown keys, or all missing values.
        OmegaConfBaseException: If a value cannot be converted or an interpolation leads nowhere.
    """
    container = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(container, dict)
    container.pop("hydra", None)
    known = schema_keys()
    unknown = [key for key in _leaves(container) if key not in known]
    if unknown:
        raise ConfigError([unknown_key(key) for key in unknown])
    strict = OmegaConf.merge(OmegaConf.structured(TitanConfig), container)
    missing = sorted(OmegaConf.missing_keys(strict))
    if missing:
        raise ConfigError([_missing_value(key, strict) for key in missing])
    return typing.cast(TitanConfig, OmegaConf.to_object(strict))


def save_config(config: TitanConfig, path: Path) -> None:
    """Freeze a resolved config: nothing in the file refers to anything outside of it."""
    write_atomically(path, config_text(config))


def config_text(config: TitanConfig) -> str:
    """Return a resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


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
    except (*COMPOSITION_ERRORS, yaml.YAMLError, AssertionError) as error:
        raise ConfigError(f"{where} is not a titan config: {_first_line(error)}") from error


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a config by their dotted keys; enums by name."""
    if not dataclasses.is_dataclass(config):
        return {prefix: getattr(config, "name", config)}
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name = f"{prefix}.{field.name}" if prefix else field.name
        leaves |= flatten(getattr(config, field.name), name)
    return leaves


def schema_keys() -> set[str]:
    """Return the dotted keys of every node and leaf of the schema."""
    return set(_walk_schema(TitanConfig, ""))


def explain_composition(
    error: Exception,
    overrides: Sequence[str],
    config_dir: str | None = None,
    config_name: str = CONFIG_NAME,
    machine: Machine | None = None,
) -> Iterator[Problem]:
    """Say what is wrong with a command line that does not compose: every mistake in it, not only the first.

    Each override is tried alone on the schema or in its group; those that fail are left out until the rest
    composes, and the rest is checked too where `machine` is given.
    """
    remaining = list(overrides)
    while isinstance(error, COMPOSITION_ERRORS):
        found = _explain_one(error, remaining, config_dir)
        if found is None:
            yield Problem(_first_line(error), suggestion="--help   for the groups and keys there are")
            return
        bad, problem = found
        yield problem
        remaining.remove(bad)
        try:
            config = to_typed(compose_untyped(remaining, config_dir, config_name))
            if machine is not None:
                check_config(config, machine)
            return
        except ConfigError as others:
            yield from others.problems
            return
        except COMPOSITION_ERRORS as next_error:
            error = next_error


def unknown_key(key: str) -> Problem:
    """Return the problem of a key that the schema does not have, with the nearest ones that it has."""
    known = schema_keys()
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if not near:  # the right word in the wrong group
        last = key.rsplit(".", 1)[-1]
        near = sorted(k for k in known if difflib.SequenceMatcher(None, k.rsplit(".", 1)[-1], last).ratio() > 0.8)
    return Problem(
        f"{key} is not a key of titan's config",
        f"Nearest: {', '.join(near[:3])}" if near else "",
        f"{near[0]}=..." if near else "--help   for all keys",
    )


def _explain_one(error: Exception, overrides: Sequence[str], config_dir: str | None) -> tuple[str, Problem] | None:
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except COMPOSITION_ERRORS as bad:
            why = _first_line(bad)
            return text, Problem(f"{text} cannot be read as an override", why, "group=option   or  key=value")
        problem = _explain_override(override, config_dir)
        if problem is not None:
            return text, problem
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
        for text in overrides:
            if text.lstrip("+~").split("=", 1)[0].split("@")[0] == group:
                return text, _unknown_option(group, option, list(error.options or []))
    message = str(error)
    for text in overrides:
        if re.search(rf"(?<![\w.]){re.escape(text.split('=', 1)[0].lstrip('+~'))}(?![\w])", message):
            return text, Problem(f"{text} does not compose", _first_line(error))
    return None


def _explain_override(override: Override, config_dir: str | None) -> Problem | None:
    key = override.key_or_group
    groups = _groups(config_dir)
    if key in groups:
        option = override.value()
        options = groups[key]
        names = option if isinstance(option, list) else [option]
        wrong = [n for n in names if n is not None and str(n).removesuffix(".yaml") not in options]
        if wrong and not override.is_sweep_override() and not override.is_delete():
            return _unknown_option(key, str(wrong[0]), options)
        return None
    if key.split(".", 1)[0].split("/", 1)[0] == "hydra" or override.is_sweep_override():
        return None
    if "/" in key or "@" in (override.input_line or "").split("=", 1)[0] or override.is_delete():
        near = difflib.get_close_matches(key, groups, n=3)
        hint = f"{near[0]}=..." if near else "--help   for the groups there are"
        return None if key in schema_keys() else Problem(f"{key} is not a config group", suggestion=hint)
    if key not in schema_keys():
        if "." not in key and (near := difflib.get_close_matches(key, groups, n=1, cutoff=0.6)):
            return Problem(f"{key} is not a config group", f"Groups: {', '.join(sorted(groups))}", f"{near[0]}=...")
        return unknown_key(key)
    try:
        value = override.value()
        schema = OmegaConf.structured(TitanConfig)
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(schema, parent) if parent else schema
        if node is not None:
            OmegaConf.update(schema, key, value)
        del name
    except OmegaConfBaseException as error:
        return Problem(
            f"{(override.input_line or key).lstrip('+')} has the wrong type", _first_line(error), _expected(key)
        )
    return None


def _unknown_option(group: str, option: str, options: list[str]) -> Problem:
    near = difflib.get_close_matches(option, options, n=3, cutoff=0.5)
    return Problem(
        f"{group}={option} is not an option of the group {group}",
        f"There are: {', '.join(sorted(options))}",
        f"{group}={near[0]}" if near else f"{group}={sorted(options)[0]}" if options else "",
    )


def _missing_value(key: str, config: Any) -> Problem:
    group = key.split(".", 1)[0]
    chosen = OmegaConf.select(config, f"{group}.kind", throw_on_missing=False) if "." in key else None
    needs = f", but {group}={chosen.name} needs it" if chosen is not None and hasattr(chosen, "name") else ""
    example = "/path/to/files" if key == "data.path" else "/path/to/tokenizer.model" if "path" in key else "..."
    return Problem(f"{key} is not set{needs}", suggestion=f"{key}={example}")


def _expected(key: str) -> str:
    annotation: Any = TitanConfig
    for part in key.split("."):
        annotation = _node_type(typing.get_type_hints(annotation)[part])
    if isinstance(annotation, type) and issubclass(annotation, bool):
        return f"{key}=true   or  {key}=false"
    members = getattr(annotation, "__members__", None)
    if members:
        return "   or  ".join(f"{key}={name}" for name in members)
    examples = {int: "10", float: "0.1", str: "text", list: "[a,b]"}
    return f"{key}={examples.get(typing.get_origin(annotation) or annotation, '...')}"


def _groups(config_dir: str | None) -> dict[str, list[str]]:
    roots = [conf_dir()] + ([Path(config_dir)] if config_dir else [])
    groups: dict[str, set[str]] = {}
    for root in roots:
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != ".":
                groups.setdefault(group, set()).add(file.stem)
    return {group: sorted(options) for group, options in groups.items()}


def _walk_schema(node: type, prefix: str) -> Iterator[str]:
    for name, annotation in typing.get_type_hints(node).items():
        key = f"{prefix}{name}"
        yield key
        inner = _node_type(annotation)
        if dataclasses.is_dataclass(inner):
            yield from _walk_schema(typing.cast(type, inner), f"{key}.")


def _node_type(annotation: Any) -> Any:
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    return options[0] if options and type(None) in typing.get_args(annotation) else annotation


def _leaves(container: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in container.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key


def _first_line(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        text += " " + _first_line(cause)
    return text
