"""Finding runs: answers to what is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from titan.errors import CommandError
from titan.report.runs import find_runs

from .made import training_row, write_lines, write_run


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
        ("waiting", ["has a config, but its run has not started"]),
    ],
)
def test_what_is_no_run_is_told_what_to_type(path: str, said: list[str], here: Path) -> None:
    """A mistyped name, an empty folder, another folder, a file, a run that has not begun: each has an answer."""
    (here / "empty").mkdir()
    (here / "other").mkdir()
    (here / "other" / "notes.txt").write_text("")
    write_run(here / "ran", [training_row(1, 1.0)])
    for point in ("10", "2"):
        write_run(here / "further" / "one" / point, [training_row(1, 1.0)])
    if path == "waiting":
        write_run(here / path, [], state="running")
        os.remove(here / path / "metrics.jsonl")
        os.remove(here / path / "status.json")
    with pytest.raises(CommandError) as refusal:
        find_runs([Path(path)])
    for text in said:
        assert text in str(refusal.value)


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    """What is JSON but has no step is no row, nor is a line that is still being written."""
    run = write_run(tmp_path / "run", [training_row(1, 1.0)])
    write_lines(run / "metrics.jsonl", [{"step": "one"}, {"loss": 1.0}, {"step": 4, "loss": 1.0}])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "los\xff')
    (found,) = find_runs([run])
    assert [row["step"] for row in found.metrics] == [4]
