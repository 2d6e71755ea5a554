"""`titan.diff`: the keys in which two configs differ, and whether a run could go on with the other one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan.api.inputs import HasDirectory, filled_in, read_config, without_time
from titan.api.page import columns, page, spelled, table
from titan.config.continuation import changed_keys, refused_keys
from titan.config.keys import schema_keys
from titan.config.schema import TitanConfig

_ANOTHER_RUN = "another run"


@dataclass(frozen=True)
class Change:
    """One key in which two configs differ."""

    key: str
    """Dotted."""
    before: Any
    """The first config's value; enums by name."""
    after: Any
    """The second config's."""
    makes_another_run: bool
    """Whether it decides the weights or the data, so that a run of the one cannot go on with the other."""


class Difference(Mapping[str, Change]):
    """What differs between two configs: a mapping from keys to changes, in the schema's order.

    Args:
        changes: All of them.
    """

    def __init__(self, changes: list[Change]) -> None:
        self._changes = {change.key: change for change in changes}

    @classmethod
    def of(cls, a: TitanConfig | HasDirectory | str | Path, b: TitanConfig | HasDirectory | str | Path) -> Difference:
        """Compare two configs, or what leads to them; see `titan.diff`."""
        (before, is_run), (after, is_other_run) = read_config(a), read_config(b)
        if is_run != is_other_run:
            before, after = (before, filled_in(after)) if is_run else (filled_in(before), after)
        changes = changed_keys(without_time(before), without_time(after))
        refused = set(refused_keys(changes))
        order = {key: place for place, key in enumerate(schema_keys())}
        found = [Change(key, old, new, key in refused) for key, (old, new) in changes.items()]
        return cls(sorted(found, key=lambda change: order.get(change.key, len(order))))

    def __getitem__(self, key: str) -> Change:
        return self._changes[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    @property
    def makes_another_run(self) -> bool:
        """Whether any of the changes decides the weights or the data."""
        return any(change.makes_another_run for change in self.values())

    def __repr__(self) -> str:
        rows = [("  key", "a", "b", ""), *((f"  {key}", a, b, note) for key, a, b, note in self._cells())]
        return "\n".join([self._title(), *(columns(rows) if self else ())])

    def _repr_html_(self) -> str:
        rows = [[(key, ""), (a, "faint"), (b, "changed"), (note, "faint")] for key, a, b, note in self._cells()]
        return page(table(("key", "a", "b", ""), rows, self._title()) if self else f"<div>{self._title()}</div>")

    def _title(self) -> str:
        if not self:
            return "no key differs"
        keys = f"{len(self)} keys differ" if len(self) > 1 else "1 key differs"
        return keys + ("" if self.makes_another_run else "; a run of the one can go on with the other")

    def _cells(self) -> Iterator[tuple[str, str, str, str]]:
        for change in self.values():
            note = _ANOTHER_RUN if change.makes_another_run else ""
            yield change.key, spelled(change.before), spelled(change.after), note
