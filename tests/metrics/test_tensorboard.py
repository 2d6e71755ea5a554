"""TensorBoard's own reader finds in the files what metrics.jsonl has, and no step twice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from titan.metrics.sinks import Guarded

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the package's own imports
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from titan.metrics.tensorboard import TensorBoard


def row(step: int, loss: float) -> dict[str, Any]:
    """Return a row of metrics."""
    return {"step": step, "loss": loss, "mfu": None, "memory_gib": 0.5, "time": "2026-01-01T00:00:00+00:00"}


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every curve that TensorBoard shows, as steps and values."""
    shown = event_accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_each_number_is_a_curve(tmp_path: Path) -> None:
    """Numbers are there under their names, with their steps, as soon as they are written; null is left out."""
    sink = TensorBoard(tmp_path / "tensorboard", 0)
    sink.write(row(1, 2.5))
    assert read(tmp_path / "tensorboard") == {"train/loss": [(1, 2.5)], "speed/memory_gib": [(1, 0.5)]}
    sink.write(row(2, 1.5))
    sink.write({"step": 2, "validation_loss": 1.25, "time": "2026"})
    sink.close()
    shown = read(tmp_path / "tensorboard")
    assert shown["train/loss"] == [(1, 2.5), (2, 1.5)]
    assert shown["validation/validation_loss"] == [(2, 1.25)]


def test_a_run_that_goes_back_shows_no_step_twice(tmp_path: Path) -> None:
    """After a resume from an earlier step, and after going back at a spike, each step has its last value only."""
    sink = TensorBoard(tmp_path, 0)
    for step in range(1, 7):
        sink.write(row(step, 1.0))
    sink.rewind(4)
    for step in (5, 6, 7):
        sink.write(row(step, 2.0))
    sink.close()
    resumed = TensorBoard(tmp_path, 6)
    resumed.write(row(7, 3.0))
    resumed.close()
    assert read(tmp_path)["train/loss"] == [*((step, 1.0) for step in range(1, 5)), (5, 2.0), (6, 2.0), (7, 3.0)]


def test_files_that_cannot_be_written_stop_nothing(tmp_path: Path) -> None:
    """Where the folder cannot be made, the run goes on without."""
    (tmp_path / "tensorboard").write_text("")
    sink = Guarded("TensorBoard", lambda: TensorBoard(tmp_path / "tensorboard", 0))
    sink.write(row(1, 2.5))
    sink.rewind(0)
    sink.close()
    assert (tmp_path / "tensorboard").read_text() == ""
