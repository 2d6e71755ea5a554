"""metrics.jsonl as a small table, for a notebook or a program: no torch, and pandas only where it is asked for.

What a crash has cut short is left out, and a run that still goes on gives the rows that it has by now. What is no run
gets an answer that says what it is instead and what to type.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from titan.errors import CommandError
from titan.run_directory import RunDirectory, read_objects, short_path

if typing.TYPE_CHECKING:
    import pandas

_SHOWN = 8


class MetricsTable:
    """Rows of metrics.jsonl, oldest first: as a list of dicts, or by column.

    A row is a logged step or a validation; `training` and `validation` are the table of each alone.

    Args:
        rows: The objects of the lines.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = list(rows)

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in the order in which they first occur."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    @property
    def training(self) -> MetricsTable:
        """The logged steps."""
        return self._where(lambda row: "loss" in row)

    @property
    def validation(self) -> MetricsTable:
        """The validations."""
        return self._where(lambda row: "validation_loss" in row)

    def column(self, name: str) -> list[Any]:
        """Return a column; None where a row does not have it.

        Raises:
            KeyError: If no row has it; says which columns there are.
        """
        if not any(name in row for row in self.rows):
            raise KeyError(f"no column {name}; there are: {', '.join(self.columns) or 'none, for there are no rows'}")
        return [row.get(name) for row in self.rows]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a pandas DataFrame.

        Raises:
            CommandError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise CommandError("pandas is not installed\n  Try  pip install pandas") from None
        return pandas.DataFrame(self.rows, columns=self.columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    @typing.overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @typing.overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @typing.overload
    def __getitem__(self, key: slice) -> MetricsTable: ...
    def __getitem__(self, key: str | int | slice) -> list[Any] | dict[str, Any] | MetricsTable:
        if isinstance(key, str):
            return self.column(key)
        return MetricsTable(self.rows[key]) if isinstance(key, slice) else self.rows[key]

    def __repr__(self) -> str:
        if not self.rows:
            return "MetricsTable(no rows)"
        steps = f"steps {self.rows[0].get('step')} to {self.rows[-1].get('step')}"
        return f"MetricsTable({len(self)} rows, {steps}; {', '.join(self.columns)})"

    def _where(self, is_wanted: Callable[[dict[str, Any]], bool]) -> MetricsTable:
        return MetricsTable(row for row in self.rows if is_wanted(row))


def read_metrics(run_dir: str | Path) -> MetricsTable:
    """Return what a run has logged so far.

    Args:
        run_dir: The run's directory: what run.dir named.

    Raises:
        CommandError: If it is no run's, or the run has logged nothing yet.
    """
    directory = RunDirectory(Path(run_dir))
    if not is_run(directory):
        points = points_of(directory.path)
        if points:
            raise CommandError(
                f"{short_path(directory.path)} is a sweep of {len(points)} runs, not one run\n"
                f"  Try  {short_path(points[0].path)}   or another of them"
            )
        raise CommandError(describe_no_run(directory.path))
    table = load_table(directory)
    if not len(table):
        why = directory.read_status().get("why")
        raise CommandError(
            f"{short_path(directory.path)}: this run has logged no step yet ({describe_state(directory)})"
            + (f": {why}" if why else "")
            + f"\n  Try  again later, or look into {short_path(directory.path / 'logs')}"
        )
    return table


def load_table(directory: RunDirectory) -> MetricsTable:
    """Return the rows that are there, none where there is no file; lines that were cut short are left out."""
    return MetricsTable(row for row in load_lines(directory.metrics) if isinstance(row.get("step"), int))


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


def describe_no_run(path: Path) -> str:
    """Say why a path is no run, and what to type instead."""
    shown = short_path(path)
    if path.is_file():
        return f"{shown} is a file\n  Try  {short_path(path.parent)}   the directory that the run wrote to"
    if not path.exists():
        near = path.parent
        while not near.exists():
            near = near.parent
        names = sorted(each.name for each in near.iterdir() if each.is_dir() and not each.name.startswith("."))
        close = difflib.get_close_matches(path.name, names, n=1)
        there = f"\n  {short_path(near)} has: {_listed(names)}" if names else ""
        return f"{shown}: there is no such directory{there}\n  Try  " + (
            short_path(near / close[0]) if close and near == path.parent else "the directory that run.dir=... has named"
        )
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


def describe_state(directory: RunDirectory) -> str:
    """Return the state that a run's files give, in a word."""
    return str(directory.read_status().get("state") or "of unknown state")


def _number(name: str) -> float:
    return int(name) if name.isdecimal() else float("inf")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
