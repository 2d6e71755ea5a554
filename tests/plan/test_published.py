"""Plans of runs that others have published, against what those measured."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.plan.assumptions import TITAN, TORCHTITAN_2025, Assumptions
from titan.plan.published import (
    LATER_ROWS,
    OWN_ROWS,
    ROWS,
    Compared,
    Row,
    compare,
    configs_of,
    constants,
    fitted_to_first_row,
    table,
)

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
MISSED = {"8B, 64 H100, tp 8, rowwise": (0.25, 0.50), "8B, 64 H100, tp 8, rowwise, async": (0.25, 0.60)}
"""Rows whose tokens/s are further off than 25 %, and between what."""


@functools.cache
def compared() -> dict[Row, Compared]:
    """Return every row with its plan."""
    later, own = compare(LATER_ROWS, TORCHTITAN_2025), compare(OWN_ROWS, TITAN)
    return {each.row: each for each in (*compare(), *later, *own)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_published_tables_are_met(row: Row) -> None:
    """Memory within 15 % and tokens/s within 25 % on every row, with constants of the first row alone."""
    each = compared()[row]
    assert each.memory_error is not None
    assert abs(each.memory_error) < 0.15
    assert abs(each.speed_error) < 0.25


@pytest.mark.parametrize("row", [*LATER_ROWS, *OWN_ROWS], ids=lambda row: row.name)
def test_rows_that_nothing_was_fitted_to(row: Row) -> None:
    """Later runs, of a later program and of titan, partly on another GPU, are met; or missed by as much as is said."""
    each = compared()[row]
    low, high = MISSED.get(row.name, (0.0, 0.25))
    assert low <= abs(each.speed_error) < high
    if each.memory_error is not None:
        assert abs(each.memory_error) < 0.15


def test_the_first_row_is_fitted_and_what_is_shipped_is_that() -> None:
    """The two measured constants that titan ships are those that the first published row gives."""
    fitted, shipped = fitted_to_first_row(), Assumptions()
    first = compared()[ROWS[0]]
    assert first.memory_error == pytest.approx(0, abs=1e-3)
    assert first.speed_error == pytest.approx(0, abs=1e-3)
    assert shipped.matmul_efficiency == pytest.approx(fitted.matmul_efficiency, abs=1e-3)
    assert shipped.memory_overhead == pytest.approx(fitted.memory_overhead, abs=1e-3)
    assert dict(shipped.describe()[2:]) == dict(fitted.describe()[2:])


def test_rows_are_configs_as_a_user_would_compose_them() -> None:
    """A row's overrides on titan's command line give the config that is planned."""
    row = LATER_ROWS[-2]
    (config,) = configs_of([row])
    composed = check_config(compose(row.overrides), Machine(gpus=8))
    assert replace(config, run=composed.run) == composed  # whose folder has the time in its name


def test_the_page_shows_the_table_as_it_comes_out() -> None:
    """docs/plan.md has what `python -m titan.plan published` prints."""
    found = re.findall(r"^\|.*\|$", PAGE.read_text(), flags=re.MULTILINE)
    for line in (*constants(), *table([*compared().values()])):
        assert line in found
