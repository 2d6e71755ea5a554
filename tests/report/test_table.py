"""Metrics as a table: what is in the file and no more, and answers to what is no run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from titan.errors import CommandError
from titan.report.metrics_table import MetricsTable, read_metrics

from .made import eventful_run, training_row, write_lines, write_run


def test_the_table_has_what_the_file_has(trained: Path) -> None:
    """Rows and columns equal those of metrics.jsonl, with every digit."""
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    table = read_metrics(trained)
    assert list(table) == rows
    assert table["loss"] == [row["loss"] for row in rows]
    assert table.columns == list(rows[0])
    assert table[-1] == rows[-1]
    assert list(table[:1]) == rows[:1]
    assert len(table) == len(rows) == 2
    assert "2 rows, steps 1 to 2" in repr(table)


def test_steps_and_validations_can_be_had_apart(tmp_path: Path) -> None:
    """Each alone, and together with None where a row does not have a column."""
    table = read_metrics(eventful_run(tmp_path / "run", steps=300))
    assert len(table.training) + len(table.validation) == len(table)
    assert table.validation["step"] == [100, 200, 300]
    assert table["validation_loss"].count(None) == len(table.training)
    with pytest.raises(KeyError, match="no column lss; there are: step, loss"):
        table.column("lss")


def test_a_table_becomes_a_data_frame(tmp_path: Path) -> None:
    """With pandas, which is asked for only here."""
    pandas = pytest.importorskip("pandas")
    table = read_metrics(eventful_run(tmp_path / "run", steps=300))
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["step"]) == table["step"]
    assert math.isnan(frame["validation_loss"][0])
    assert MetricsTable([]).to_pandas().empty


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    """A run that still goes on, or one that was cut, gives the rows that are whole."""
    run = write_run(tmp_path / "run", [training_row(1, 1.0), training_row(2, 2.0)], state="running")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "los\xff')
    assert read_metrics(run)["step"] == [1, 2]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("rnu", ["rnu: there is no such directory", "has: empty, further, other, ran", "Try  "]),
        ("rann", ["there is no such directory", "Try  ran"]),
        ("a/b/c", ["there is no such directory", "run.dir=..."]),
        ("empty", ["empty is empty: no run has written there", "Try  python -m titan.train run.dir=empty"]),
        ("other", ["other is not a run's directory: it has no metrics.jsonl, but notes.txt"]),
        ("other/notes.txt", ["is a file", "Try  other"]),
        ("further", ["further holds runs, but further down", "Try  further/one"]),
        ("further/one", ["is a sweep of 2 runs, not one run", "Try  further/one/2"]),
        ("waiting", ["has a config, but its run has not started"]),
        ("begun", ["this run has logged no step yet (running)", "Try  again later, or look into begun/logs"]),
        ("broken", ["this run has logged no step yet (failed): DataError: no text"]),
    ],
)
def test_what_is_no_run_is_told_what_to_type(path: str, said: list[str], here: Path) -> None:
    """A mistyped name, an empty folder, another folder, a file, a sweep, a run without a step: each has an answer."""
    (here / "empty").mkdir()
    (here / "other").mkdir()
    (here / "other" / "notes.txt").write_text("")
    write_run(here / "ran", [training_row(1, 1.0)])
    for point in ("10", "2"):
        write_run(here / "further" / "one" / point, [training_row(1, 1.0)])
    if path in ("waiting", "begun", "broken"):
        write_run(here / path, [], state="failed" if path == "broken" else "running", why="DataError: no text")
        if path == "begun":
            (here / path / "status.json").write_text('{"state": "running"}')
        if path == "waiting":
            os.remove(here / path / "metrics.jsonl")
            os.remove(here / path / "status.json")
    with pytest.raises(CommandError) as refusal:
        read_metrics(path)
    for text in said:
        assert text in str(refusal.value)


def test_rows_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    """What is JSON but has no step is no row."""
    run = write_run(tmp_path / "run", [training_row(1, 1.0)])
    write_lines(run / "metrics.jsonl", [{"step": "one"}, {"loss": 1.0}, {"step": 4, "loss": 1.0}])
    assert read_metrics(run)["step"] == [4]
