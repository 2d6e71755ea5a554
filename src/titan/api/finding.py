"""Telling a run's directory from others, and what to type instead where a path is none."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Any

from titan.run_directory import RunDirectory, read_objects, short_path

_SHOWN = 8
"""Names that a message lists."""


def load_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of one a line, none where there is no file."""
    try:
        with path.open(errors="replace") as file:
            return read_objects(file)
    except OSError:
        return []


def is_run(directory: RunDirectory) -> bool:
    """Whether a directory is a run's."""
    return directory.metrics.is_file() or (directory.config.is_file() and (directory.path / "status.json").is_file())


def points_of(path: Path) -> list[RunDirectory]:
    """Return the runs that lie in a directory, the points of a sweep in their order."""
    try:
        below = [RunDirectory(each) for each in path.iterdir() if each.is_dir()]
    except OSError:
        return []
    return sorted(filter(is_run, below), key=lambda run: (_number(run.path.name), run.path.name))


def describe_missing(path: Path, instead: str) -> str:
    """Say that a path is not there, which directories are near, and what to type.

    Args:
        path: Absolute.
        instead: What to type where no name is like its own.
    """
    near = path.parent
    while not near.is_dir():
        near = near.parent
    names: list[str] = []
    with contextlib.suppress(OSError):  # nobody may list it
        names = sorted(each.name for each in near.iterdir() if each.is_dir() and not each.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=1)
    there = f"\n  {short_path(near)} has: {_listed(names)}" if names else ""
    return f"{short_path(path)}: there is no such directory{there}\n  Try  " + (
        short_path(near / close[0]) if close and near == path.parent else instead
    )


def describe_no_run(path: Path) -> str:
    """Say why a path is no run, and what to type instead."""
    shown = short_path(path)
    if path.is_file():
        return f"{shown} is a file\n  Try  {short_path(path.parent)}   the directory that the run wrote to"
    if not path.exists():
        return describe_missing(path, "the directory that run.dir=... has named")
    if not any(path.iterdir()):
        return f"{shown} is empty: no run has written there\n  Try  python -m titan.train run.dir={shown}"
    deeper = [run for child in sorted(path.iterdir()) if child.is_dir() for run in points_of(child)]
    if deeper:
        return f"{shown} holds runs, but further down\n  Try  {short_path(deeper[-1].path)}   one of {len(deeper)} runs"
    if (path / "config.yaml").is_file():
        return f"{shown} has a config, but its run has not started\n  Try  again when it has"
    names = sorted(each.name for each in path.iterdir())
    return (
        f"{shown} is not a run's directory: it has no metrics.jsonl, but {_listed(names)}\n"
        "  Try  the directory that run.dir=... has named, or the one that a sweep has made"
    )


def _number(name: str) -> float:
    return int(name) if name.isdecimal() else float("inf")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
