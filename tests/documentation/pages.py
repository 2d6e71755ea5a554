"""The pages that repeat what the code says: `python -m tests.documentation.pages` writes them anew.

docs/configuration.md is made of the schema, its docstrings and the files of conf/; the tables of
docs/coming_from_torchtitan.md of the table that `python -m titan.convert toml` translates with. A test holds that
what is committed is what this gives.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from tests.support.command import REPOSITORY
from titan.config import schema
from titan.config.keys import Key, flatten, schema_keys
from titan.config.load import compose, conf_dir, option_groups
from titan.convert.torchtitan_options import OPTIONS, RENAMED, VERSION, Option

DOCS = REPOSITORY / "docs"
_MARKS = "<!-- generated: python -m tests.documentation.pages -->", "<!-- end of what is generated -->"

_HEAD = """# Configuration

Every key of titan's config: what it takes, what it is unless you say otherwise, and what it does. `group=option` on
the command line chooses a file of `conf/`, `group.key=value` sets one key; `--cfg job` behind a command shows what that
makes, and starts nothing. The default is that of the default option of the group; *to be said* is a key that an option
leaves to you. Rules between keys are checked before anything starts, all together (`src/titan/config/check.py`).

This page is made of `src/titan/config/schema.py` and `conf/` by `python -m tests.documentation.pages`.
"""


def configuration() -> str:
    """Return docs/configuration.md."""
    parts = [_HEAD]
    for name, key in schema_keys().items():
        if key.is_node and "." not in name:
            parts.append("\n".join(_node(name, key)))
    parts.append("\n".join(_experiments()))
    return "\n".join(parts).rstrip() + "\n"


def torchtitan_tables() -> str:
    """Return the tables of docs/coming_from_torchtitan.md."""
    sections: dict[str, list[Option]] = {}
    for option in OPTIONS:
        sections.setdefault(option.name.partition(".")[0], []).append(option)
    lines = []
    for section, options in sections.items():
        lines += [f"### {section}", "", "| TorchTitan | its default | titan | |", "|---|---|---|---|"]
        for option in options:
            keys = ", ".join(f"`{key}`" for key in option.keys) or "none"
            name = option.name.removeprefix(f"{section}.")
            lines.append(f"| `{name}` | {_code(_toml(option.default))} | {keys} | {_cell(option.note)} |")
        lines.append("")
    lines += [f"### Names before {VERSION}", "", "| earlier | now |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    return "\n".join(lines)


def coming_from_torchtitan(page: str) -> str:
    """Return docs/coming_from_torchtitan.md with its tables made anew."""
    start, end = _MARKS
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n\n{torchtitan_tables()}\n\n{end}{after}"


def pages() -> dict[Path, str]:
    """Return what each generated page should hold."""
    torchtitan = DOCS / "coming_from_torchtitan.md"
    return {
        DOCS / "configuration.md": configuration(),
        torchtitan: coming_from_torchtitan(torchtitan.read_text()),
    }


def _node(name: str, key: Key) -> list[str]:
    lines = [f"## {name}", "", _doc_of_class(key.type), ""]
    options = option_groups().get(name, [])
    if options:
        lines += [f"| `{name}=` | |", "|---|---|"]
        lines += [f"| `{option}`{_is_default(name, option)} | {_cell(_words_of(name, option))} |" for option in options]
        lines.append("")
    lines += ["| key | takes | default | |", "|---|---|---|---|"]
    lines += [_row(child) for child in _below(name)]
    for child in _tables(name):
        lines += ["", f"Under each name of `{child.name}`, besides what `{name}` has:", ""]
        lines += ["| key | takes | default | |", "|---|---|---|---|"]
        lines += [_entry_row(child, each) for each in _own_fields(typing.get_args(child.type)[1])]
    lines.append("")
    return lines


def _below(name: str) -> list[Key]:
    return [key for key in schema_keys().values() if key.name.startswith(f"{name}.") and not key.is_node]


def _tables(name: str) -> list[Key]:
    return [key for key in _below(name) if key.is_table and typing.get_args(key.type)[1] is not str]


def _own_fields(cls: type) -> list[str]:
    return list(cls.__annotations__)


def _entry_row(table: Key, field: str) -> str:
    cls = typing.get_args(table.type)[1]
    value = cls.__dataclass_fields__[field].default
    return f"| `{table.name}.NAME.{field}` | number | `{value}` | {_cell(_docs_of(cls)[field])} |"


def _row(key: Key) -> str:
    words = _docs_of(key.parent)[key.name.rpartition(".")[2]]
    return f"| `{key.name}` | {_kind(key)} | {_default(key)} | {_cell(words)} |"


def _kind(key: Key) -> str:
    if isinstance(key.type, type) and issubclass(key.type, Enum):
        kind = ", ".join(f"`{name}`" for name in key.type.__members__)
    else:
        names = {int: "whole number", float: "number", bool: "true or false", str: "text", list: "list", dict: "table"}
        kind = names[typing.get_origin(key.type) or key.type]
    return f"{kind}, or null" if key.is_optional else kind


def _default(key: Key) -> str:
    if key.name.startswith("run."):
        raw = yaml.safe_load((conf_dir() / "train.yaml").read_text())["run"]
        return _code(raw[key.name.removeprefix("run.")])
    values = _composed()
    if key.name in values:
        return _code(_toml(values[key.name], "null"))
    found = key.parent.__dataclass_fields__[key.name.rpartition(".")[2]].default
    return "*to be said*" if found == "???" else _code(_toml(found, "null"))


@functools.cache
def _composed() -> dict[str, Any]:
    return flatten(compose())


def _toml(value: Any, none: str = "") -> str:
    if value is None:
        return none
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _is_default(group: str, option: str) -> str:
    defaults = yaml.safe_load((conf_dir() / "train.yaml").read_text())["defaults"]
    return " (default)" if {group: option} in defaults else ""


def _words_of(group: str, option: str) -> str:
    """Return the comment that a file of conf/ begins with."""
    words = []
    for line in (conf_dir() / group / f"{option}.yaml").read_text().splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# "):
            break
        words.append(line.removeprefix("# "))
    return " ".join(words)


def _experiments() -> list[str]:
    lines = ["## experiment", "", "Whole recipes, each with what is expected of it.", "", "| `experiment=` | |"]
    lines.append("|---|---|")
    for option in option_groups()["experiment"]:
        words = (conf_dir() / "experiment" / f"{option}.yaml").read_text().splitlines()[1].removeprefix("# ")
        lines.append(f"| `{option}` | {_cell(words)} |")
    return lines


def _doc_of_class(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


@functools.cache
def _docs_of(cls: type) -> dict[str, str]:
    """Return the docstring under each field, those that it inherits too."""
    docs: dict[str, str] = {}
    tree = ast.parse(Path(schema.__file__).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for each in reversed([base for base in cls.__mro__ if base.__name__ in classes]):
        body = classes[each.__name__].body
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                assert isinstance(below.value, ast.Constant)
                docs[field.target.id] = str(below.value.value)
    return docs


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(path.relative_to(REPOSITORY))
