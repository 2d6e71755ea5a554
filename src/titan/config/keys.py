"""The schema as dotted keys: which there are, what each takes, and which one a misspelt key may have meant."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from titan.config.schema import TitanConfig
from titan.errors import Problem


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the schema."""

    name: str
    """Dotted, from the root."""
    parent: type
    """The dataclass that has it."""
    type: Any
    """What it takes, without None: int, list[str], an enum, a dataclass."""
    is_optional: bool
    """Whether it may be null."""

    @property
    def is_node(self) -> bool:
        """Whether it holds further keys and no value of its own."""
        return dataclasses.is_dataclass(self.type)

    @property
    def is_table(self) -> bool:
        """Whether it holds entries under names of the user's choice."""
        return typing.get_origin(self.type) is dict

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        field = next(field for field in dataclasses.fields(self.parent) if field.name == self.name.rpartition(".")[2])
        return field.default == "???"


@functools.cache
def schema_keys() -> dict[str, Key]:
    """Return every node and leaf of the schema by its dotted key, in the schema's order."""
    return {key.name: key for key in _walk(TitanConfig, "")}


def find_key(name: str) -> Key | None:
    """Return a key of the schema, or one inside an entry of a table whose entries have keys of their own."""
    known = schema_keys().get(name)
    if known is not None:
        return known
    for key in schema_keys().values():
        entry_type = typing.get_args(key.type)[1] if key.is_table else None
        if not dataclasses.is_dataclass(entry_type) or not name.startswith(f"{key.name}."):
            continue
        entry, _, inner = name.removeprefix(f"{key.name}.").partition(".")
        if not inner:
            return Key(name, key.parent, entry_type, False)
        prefix = f"{key.name}.{entry}."
        return next((found for found in _walk(typing.cast(type, entry_type), prefix) if found.name == name), None)
    return None


def table_of(name: str) -> Key | None:
    """Return the table that a dotted name is an entry of, if it is one."""
    parent, _, entry = name.rpartition(".")
    key = schema_keys().get(parent)
    return key if key is not None and key.is_table and entry else None


def is_known(name: str) -> bool:
    """Whether a dotted name is a key of the schema, or an entry of one of its tables."""
    return find_key(name) is not None or table_of(name) is not None


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a config by their dotted keys; enums by name."""
    if not dataclasses.is_dataclass(config):
        return {prefix: config.name if isinstance(config, Enum) else config}
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name = f"{prefix}.{field.name}" if prefix else field.name
        leaves |= flatten(getattr(config, field.name), name)
    return leaves


def override(key: str, value: object) -> str:
    """Return what sets a key on the command line."""
    return f"{key}={_typed(value)}"


def unknown_key(key: str, value: str = "...") -> Problem:
    """Return the problem of a key that the schema does not have, with the nearest ones that it has."""
    leaves = [name for name, known in schema_keys().items() if not known.is_node]
    if (entry := find_key(key.rpartition(".")[0])) is not None and entry.name not in schema_keys() and entry.is_node:
        leaves = [found.name for found in _walk(entry.type, f"{entry.name}.")]
    last = key.rpartition(".")[2]
    near = [name for name in leaves if name.rpartition(".")[2] == last]  # the right word in the wrong group
    near += [name for name in difflib.get_close_matches(key, leaves, n=3, cutoff=0.6) if name not in near]
    if not near:
        near = [name for name in leaves if _likeness(name.rpartition(".")[2], last) > 0.8]
    return Problem(
        f"{key} is not a key of titan's config",
        f"Nearest: {', '.join(near[:3])}" if near else "",
        _moved(near[0], value) if near else "--help   for all keys",
    )


def _moved(name: str, text: str) -> str:
    """Return what sets another key to the same value; to one of its own where it takes none of this type."""
    try:
        value = OmegaConf.from_dotlist([f"value={text}"]).value
    except (OmegaConfBaseException, yaml.YAMLError):
        value = text
    key = find_key(name)
    if text == "..." or key is None or takes(key, value):
        return f"{name}={text}"
    return wrong_value(key, value).suggestion


def default_of(key: Key) -> str | None:
    """Return what a key is if nothing is said of it, as one types it; None where that depends, or is nothing."""
    last = key.name.rpartition(".")[2]
    default = next(field.default for field in dataclasses.fields(key.parent) if field.name == last)
    if default in (MISSING, None, dataclasses.MISSING):
        return _EXAMPLES.get(key.name)
    return _typed(default.name if isinstance(default, Enum) else default)


def takes(key: Key, value: object) -> bool:
    """Return whether a value is of the type that a key takes."""
    if key.type is bool and is_no_switch(value):
        return False
    try:
        OmegaConf.update(OmegaConf.structured(key.parent), key.name.rpartition(".")[2], value)
    except OmegaConfBaseException:
        return False
    return True


def is_no_switch(value: object) -> bool:
    """Whether a value is a number that says neither true nor false; OmegaConf takes all but 0 for true."""
    return isinstance(value, int | float) and value not in (0, 1)


def wrong_value(key: Key, value: object) -> Problem:
    """Return the problem of a value that a key does not take."""
    given = _typed(value)
    what = f"{key.name} = {given}"
    if key.is_node:
        leaves = [found.name for found in _walk(key.type, f"{key.name}.")]
        listed = ", ".join(name.rpartition(".")[2] for name in leaves)
        return Problem(f"{what}, but {key.name} holds keys, not a value", f"Its keys: {listed}", f"{leaves[0]}=...")
    if isinstance(key.type, type) and issubclass(key.type, Enum):
        names = list(key.type.__members__)
        near = difflib.get_close_matches(given, names, n=1, cutoff=0.5) or names[:1]
        return Problem(f"{what} is none of its values", f"There are: {', '.join(names)}", f"{key.name}={near[0]}")
    wanted, example = _WANTED.get(typing.get_origin(key.type) or key.type, ("a value of its type", "..."))
    if key.type in (int, float, str):
        example = default_of(key) or example
    if value is None:
        return Problem(f"{what}, but it cannot be left open", suggestion=f"{key.name}={example}")
    if key.type is int and isinstance(value, float) and value.is_integer():
        example = str(int(value))
    if typing.get_origin(key.type) is list and not isinstance(value, dict):
        example = f"[{given}]"
    return Problem(f"{what} is not {wanted}", suggestion=f"{key.name}={example}")


_WANTED = {
    int: ("a whole number", "10"),
    float: ("a number", "0.1"),
    bool: ("true or false", "true"),
    str: ("text", "text"),
    list: ("a list", "[a,b]"),
    dict: ("a table", "{name:value}"),
}


_EXAMPLES = {"optimizer.lr": "3e-4"}
"""A value that one may begin with, of keys without a default."""


def walk_keys(node: type) -> Iterator[Key]:
    """Yield the keys of any dataclass, as of the schema's."""
    return _walk(node, "")


def _walk(node: type, prefix: str) -> Iterator[Key]:
    for name, annotation in typing.get_type_hints(node).items():
        options = typing.get_args(annotation)
        is_optional = type(None) in options
        inner = next(option for option in options if option is not type(None)) if is_optional else annotation
        key = Key(f"{prefix}{name}", node, inner, is_optional)
        yield key
        if key.is_node:
            yield from _walk(inner, f"{key.name}.")


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _typed(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_typed(entry)}' for name, entry in value.items())}}}"
    return str(value)
