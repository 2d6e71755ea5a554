"""`titan.metrics`: what a run has logged, as a table that needs no library; `to_pandas()` where there is pandas.

Training rows and validations have different columns, so validations are a table of their own in it. A line that is
still being written, or that a crash has cut short, is no row yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from titan.api.inputs import HasDirectory, run_directory_of
from titan.api.page import columns, page, table
from titan.errors import TitanError
from titan.run_directory import read_objects

if TYPE_CHECKING:
    import pandas

_SHOWN = (
    *("step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "memory_gib"),
    *("validation_loss", "validation_perplexity", "validation_bits_per_byte"),
)
"""The columns that have room on a screen; the others are named below it."""
_ENDS = 6
"""Rows shown of the beginning and of the end."""


class Table(Sequence[dict[str, Any]]):
    """Rows of numbers under names: a sequence of rows; `table["loss"]` is a column.

    Args:
        rows: What was logged, oldest first.
        validation: The validations, where there are any.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], validation: Table | None = None) -> None:
        self._rows, self._validation = list(rows), validation

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in the order in which they were first logged."""
        return list(dict.fromkeys(name for row in self._rows for name in row))

    @property
    def validation(self) -> Table:
        """The validations: their steps, losses, and so on."""
        return self._validation or Table([])

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    @overload
    def __getitem__(self, index: str) -> list[Any]: ...
    def __getitem__(self, index: int | slice | str) -> dict[str, Any] | Table | list[Any]:
        if isinstance(index, slice):
            return Table(self._rows[index], self._validation)
        if isinstance(index, int):
            return self._rows[index]
        if index not in self.columns:
            raise KeyError(f"there is no column {index}; there are: {', '.join(self.columns) or 'none yet'}")
        return [row.get(index) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame with the step as its index.

        Raises:
            TitanError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise TitanError("to_pandas() needs pandas, which is not installed\n  Try  pip install pandas") from error
        frame = pandas.DataFrame(self._rows, columns=self.columns)
        return frame.set_index("step") if "step" in frame else frame

    def __repr__(self) -> str:
        shown = self._shown()
        if not shown:
            return "no rows yet"
        rows = [shown, *([show_number(name, row.get(name)) for name in shown] for row in self._ends())]
        lines = columns(rows, right=range(len(shown)))
        if len(self) > 2 * _ENDS:
            lines.insert(1 + _ENDS, f"... {len(self) - 2 * _ENDS} rows ...")
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        shown = self._shown()
        if not shown:
            return page("<div>no rows yet</div>")
        rows = [[(show_number(name, row.get(name)), "number") for name in shown] for row in self._ends()]
        if len(self) > 2 * _ENDS:
            rows.insert(_ENDS, [("⋮", "number")] * len(shown))
        return page(table(shown, rows, "; ".join(self._notes())))

    def _shown(self) -> list[str]:
        # what is null in every row, such as mfu without a known peak, takes no room
        named = [name for name in self.columns if any(row.get(name) is not None for row in self._rows)]
        return [name for name in _SHOWN if name in named] or named

    def _ends(self) -> list[dict[str, Any]]:
        return self._rows if len(self) <= 2 * _ENDS else self._rows[:_ENDS] + self._rows[-_ENDS:]

    def _notes(self) -> Iterator[str]:
        others = [name for name in self.columns if name not in self._shown()]
        yield f"{len(self)} row{'s' * (len(self) != 1)}" + (f"; also {', '.join(others)}" if others else "")
        if count := len(self.validation):
            yield f"{count} validation{'s' * (count != 1)} in .validation"


def read_table(run_dir: HasDirectory | str | Path) -> Table:
    """Return what a run has logged; see `titan.metrics`."""
    directory = run_directory_of(run_dir)
    try:
        rows = read_objects(directory.metrics.read_text(errors="replace").splitlines())
    except FileNotFoundError:
        rows = []
    validation = Table([row for row in rows if "validation_loss" in row])
    return Table([row for row in rows if "validation_loss" not in row], validation)


def show_number(name: str, value: object) -> str:
    """Return a value as a person reads it: as many digits as mean something in a column of that name."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if name == "learning_rate":
        return f"{value:.2e}"
    if name == "mfu":
        return f"{value:.1%}"
    if name.endswith(("per_second", "per_second_per_device")):
        return f"{value:,.0f}"
    return f"{value:.4f}" if "loss" in name or "per_byte" in name else f"{value:.4g}"
