"""`titan.show`: a config as a tree, with what differs from the defaults marked.

The defaults are what `titan.compose()` gives without overrides; for a run's frozen config, what that becomes here.
In a notebook the groups fold; one that has a marked key is open. What a key means, from the schema, is its tooltip.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan.api.inputs import HasDirectory, filled_in, read_config, without_time
from titan.api.page import escape, page, spelled
from titan.config import schema
from titan.config.keys import flatten, schema_keys
from titan.config.load import compose
from titan.config.schema import TitanConfig


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One key of a config."""

    key: str
    """Dotted."""
    value: Any
    default: Any

    @property
    def name(self) -> str:
        """The key without its groups."""
        return self.key.rpartition(".")[2]

    @property
    def is_changed(self) -> bool:
        """Whether the value is not the default."""
        return self.value != self.default


class Tree:
    """A config to look at. Its text is the tree; a notebook shows it as HTML.

    Args:
        leaves: All keys, in the schema's order.
    """

    def __init__(self, leaves: list[Leaf]) -> None:
        self.leaves = leaves
        """Every key with its value and its default."""

    @classmethod
    def of(cls, given: TitanConfig | HasDirectory | str | Path) -> Tree:
        """Return the tree of a config, or of what leads to one; see `titan.show`."""
        config, is_run = read_config(given)
        own, values = flatten(config), flatten(without_time(config))
        defaults = flatten(without_time(filled_in(compose()) if is_run else compose()))
        return cls(
            [
                # a run.dir that nobody chose is shown, and no difference
                Leaf(key, own[key], own[key] if value == defaults.get(key) else defaults.get(key))
                for key, value in values.items()
            ]
        )

    @property
    def changed(self) -> list[Leaf]:
        """The keys whose values are not the defaults."""
        return [leaf for leaf in self.leaves if leaf.is_changed]

    def __repr__(self) -> str:
        return "\n".join([_title(self.leaves), *_lines(_nest(self.leaves))])

    def _repr_html_(self) -> str:
        folded = "".join(_fold(name, inner) for name, inner in _nest(self.leaves).items())
        return page(f"<details open><summary>{escape(_title(self.leaves))}</summary>{folded}</details>")


Branch = dict[str, "Branch | Leaf"]


def _nest(leaves: list[Leaf]) -> Branch:
    root: Branch = {}
    for leaf in leaves:
        at = root
        for group in leaf.key.split(".")[:-1]:
            inner = at.setdefault(group, {})
            assert isinstance(inner, dict), "a key is a group or a value"
            at = inner
        at[leaf.name] = leaf
    return root


def _title(leaves: list[Leaf]) -> str:
    count = sum(leaf.is_changed for leaf in leaves)
    return f"config, {count} of {len(leaves)} keys differ from the defaults" + (" (*)" if count else "")


def _lines(branch: Branch, indent: str = "") -> Iterator[str]:
    for index, (name, inner) in enumerate(branch.items()):
        is_last = index == len(branch) - 1
        stem = f"{indent}{'└── ' if is_last else '├── '}{name}"
        if isinstance(inner, Leaf):
            was = f"  * (default {spelled(inner.default)})" if inner.is_changed else ""
            yield f"{stem}: {spelled(inner.value)}{was}"
        else:
            yield stem
            yield from _lines(inner, indent + ("    " if is_last else "│   "))


def _fold(name: str, inner: Branch | Leaf) -> str:
    if isinstance(inner, Leaf):
        value = f": {escape(spelled(inner.value))}"
        tip = escape(describe_keys().get(inner.key, ""))
        if inner.is_changed:
            value = f'<span class="changed">{value} *</span>'
            value += f' <span class="faint">default {escape(spelled(inner.default))}</span>'
        return f'<div class="leaf" title="{tip}">{escape(name)}{value}</div>'
    leaves = list(_leaves_of(inner))
    count = sum(leaf.is_changed for leaf in leaves)
    note = f'<span class="changed">{count} *</span>' if count else f'<span class="faint">{len(leaves)}</span>'
    folded = "".join(_fold(key, each) for key, each in inner.items())
    return f"<details{' open' * bool(count)}><summary>{escape(name)} {note}</summary>{folded}</details>"


def _leaves_of(branch: Branch) -> Iterator[Leaf]:
    for inner in branch.values():
        if isinstance(inner, Leaf):
            yield inner
        else:
            yield from _leaves_of(inner)


@functools.cache
def describe_keys() -> dict[str, str]:
    """Return what the schema says below each of its keys."""
    said: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                said[node.name, field.target.id] = " ".join(str(below.value.value).split())
    found = {}
    for name, key in schema_keys().items():
        field = name.rpartition(".")[2]
        found[name] = next(
            (said[each.__name__, field] for each in key.parent.__mro__ if (each.__name__, field) in said), ""
        )
    return found
