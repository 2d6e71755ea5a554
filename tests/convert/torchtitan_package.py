"""What the installed package torchtitan says of itself, without importing it: that would take the compiler along.

Its dataclasses and its schedule are executed as they are in the package; only the imports around them are left out.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


@functools.cache
def package() -> Path:
    """The folder of the package."""
    spec = importlib.util.find_spec("torchtitan")
    assert spec is not None, "torchtitan is in the extra dev"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


@functools.cache
def job_config() -> type:
    """Its class of configs."""
    tree = ast.parse((package() / "config" / "job_config.py").read_text())
    foreign = ("torch", "torchtitan.tools.logging")
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.Import) and node.names[0].name in foreign)
        and not (isinstance(node, ast.ImportFrom) and node.module in foreign)
    ]
    module = types.ModuleType("torchtitan_job_config")
    sys.modules[module.__name__] = module  # where dataclasses look for the names in annotations
    exec(compile(tree, "job_config.py", "exec", dont_inherit=True), module.__dict__)  # its annotations are types
    return module.JobConfig


def read(tables: dict[str, Any], cls: type | None = None) -> Any:
    """Make one of its configs of a TOML file's tables, as its own reader does: what it does not know is an error."""
    cls = cls or job_config()
    nested = {field.name: field.type for field in dataclasses.fields(cls) if dataclasses.is_dataclass(field.type)}
    return cls(**{name: read(value, nested[name]) if name in nested else value for name, value in tables.items()})


def defaults(node: Any = None, prefix: str = "") -> dict[str, Any]:
    """Return its defaults by dotted name."""
    node = job_config()() if node is None else node
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), f"{prefix}{field.name}"
        leaves |= defaults(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return leaves


@functools.cache
def schedule() -> Callable[..., float]:
    """Its learning rate of a step as a share of the peak."""
    tree = ast.parse((package() / "components" / "lr_scheduler.py").read_text())
    found = next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and "warmup_stable_decay" in node.name
    )
    space: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([found], []), "lr_scheduler.py", "exec"), space)
    return space[found.name]


def llama3_shapes() -> dict[str, dict[str, Any]]:
    """Return the arguments of each of its flavors of llama3."""
    tree = ast.parse((package() / "models" / "llama3" / "__init__.py").read_text())
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
    assert isinstance(table, ast.Dict)
    return {
        ast.literal_eval(name): {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
        for name, call in zip(table.keys, table.values, strict=True)
        if name is not None and isinstance(call, ast.Call)
    }
