"""Whole runs that tokenise while they train: stopped and taken up, after spikes, and what they write down."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.command import json_lines, results
from titan.checkpoint.canonical import state_digests
from titan.checkpoint.files import read_metadata, tensor_infos
from titan.checkpoint.manifest import step_folder
from titan.checkpoint.state import CURSORS
from titan.config.schema import ComponentConfig, DataKind
from titan.errors import ConfigError, DataError, Stopped, WorkerLost
from titan.trainer.build import Trainer

from .conftest import Runs
from .test_spikes import nan_at


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty documents, of which six steps need several windows."""
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{number} " + "words " * (number % 7)}) + "\n" for number in range(60))
    )
    return path


@pytest.fixture
def streaming(texts: Path) -> tuple[str, ...]:
    """What a run is told to stream them: four rows a step, of two streams."""
    return (
        "data=jsonl",
        f"data.path={texts}",
        "data.streaming=true",
        "data.streams=2",
        "data.shuffle_window=4",
        "data.mask_documents=true",
        "training.global_batch_size=4",
    )


def rows_of(trainer: Trainer) -> list[dict]:
    """Return what the run has written down of its rows."""
    return json_lines(trainer.directory.rows)


def state_of(trainer: Trainer, step: int = 6) -> dict[str, str]:
    """Return the digests of a checkpoint of a run."""
    return state_digests(step_folder(trainer.directory.checkpoints, step))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_streaming_run_that_was_stopped_is_the_undisturbed_run(
    runs: Runs, streaming: tuple[str, ...], packing: str
) -> None:
    """Rows, losses, weights, and where the streams stand, to the bit, between two intervals and with other workers."""
    whole = runs.train("whole", *streaming, f"data.packing={packing}")
    assert [row["step"] for row in rows_of(whole)] == [1, 2, 3, 4, 5, 6]
    assert len({row["digest"] for row in rows_of(whole)}) == 6
    for row in rows_of(whole):
        assert re.fullmatch("[0-9a-f]{16}", row["digest"])
        assert row["tokens"] + row["padding"] <= 4 * 32
        assert (row["padding"] == 0) is (packing == "concat")
    for stop_after in (1, 3):
        name = f"stopped{stop_after}"
        first = runs.build(runs.config(name, *streaming, f"data.packing={packing}"))
        with pytest.raises(Stopped):
            runs.fit(first, stop_after)
        second = runs.train(name, *streaming, f"data.packing={packing}", "data.num_workers=2")
        assert rows_of(second) == rows_of(whole)
        assert results(second.directory.path) == results(whole.directory.path)
        assert state_of(second) == state_of(whole)
    infos = tensor_infos(read_metadata(step_folder(whole.directory.checkpoints, 6)))
    assert infos[CURSORS].shape == torch.Size([2, 8])


@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
def test_what_is_left_out_after_a_spike_is_used_up(runs: Runs, streaming: tuple[str, ...], on_spike: str) -> None:
    """The steps after it have the rows that they would have had, and a run that resumes among them has too."""
    whole = {row["step"]: row for row in rows_of(runs.train("whole", *streaming))}
    options = (*streaming, f"fault_tolerance.on_spike={on_spike}", "checkpoint.interval=1", "checkpoint.keep_latest=0")
    options = (*options, "checkpoint.interval=2") if on_spike == "rollback" else options
    trainer = runs.train("spike", *options, change=nan_at(4))
    left_out = {4} if on_spike == "skip" else {3, 4}
    assert rows_of(trainer) == [row for step, row in whole.items() if step not in left_out]
    stopped = runs.build(runs.config("stopped", *options))
    nan_at(4)(stopped)
    with pytest.raises(Stopped):
        runs.fit(stopped, 4)
    resumed = runs.train("stopped", *options)
    assert rows_of(resumed) == rows_of(trainer)
    assert state_of(resumed) == state_of(trainer)


def test_prepared_runs_write_down_their_rows_too(runs: Runs) -> None:
    """Every step once, appended on resume, whatever is logged; the same rows have the same digest."""
    whole = runs.train("whole", "metrics.log_every=5")
    first = runs.build(runs.config("stopped", "metrics.log_every=5"))
    with pytest.raises(Stopped):
        runs.fit(first, 3)
    assert [row["step"] for row in rows_of(first)] == [1, 2, 3]
    second = runs.train("stopped", "metrics.log_every=5", "data.num_workers=1")
    assert rows_of(second) == rows_of(whole)
    assert [row["step"] for row in rows_of(whole)] == [1, 2, 3, 4, 5, 6]


def test_a_mixture_tells_the_rows_of_each_component(runs: Runs, streaming: tuple[str, ...], texts: Path) -> None:
    """Three rows of four from the one and one from the other, in every step; the streams of both are saved."""
    config = runs.config("run", *streaming)
    parts = {name: ComponentConfig(DataKind.jsonl, str(texts), weight=weight) for name, weight in (("a", 3), ("b", 1))}
    config = replace(config, data=replace(config.data, kind=DataKind.mixture, path=None, components=parts))
    trainer = runs.build(config)
    runs.fit(trainer)
    assert [row["rows"] for row in rows_of(trainer)] == [{"a": 3, "b": 1}] * 6
    infos = tensor_infos(read_metadata(step_folder(trainer.directory.checkpoints, 6)))
    assert infos[CURSORS].shape == torch.Size([4, 8])


def test_data_that_has_changed_refuses_the_resume(runs: Runs, streaming: tuple[str, ...], texts: Path) -> None:
    """Another file would give other rows; nothing is changed, and the message says what to do instead."""
    with pytest.raises(Stopped):
        runs.fit(runs.build(runs.config("run", *streaming)), 3)
    with texts.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match="has changed since step 3 was saved"):
        runs.build(runs.config("run", *streaming))


@pytest.mark.parametrize("key", ["data.streams=1", "data.shuffle_window=5", "data.packing=best_fit"])
def test_options_that_change_the_rows_refuse_the_resume(runs: Runs, streaming: tuple[str, ...], key: str) -> None:
    """With the value that the run has."""
    with pytest.raises(Stopped):
        runs.fit(runs.build(runs.config("run", *streaming)), 2)
    with pytest.raises(ConfigError, match=key.partition("=")[0]):
        runs.build(runs.config("run", *streaming, key))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_data_met_in_a_worker_is_the_error_that_it_is(
    runs: Runs, streaming: tuple[str, ...], texts: Path, workers: int
) -> None:
    """DataError, exit code 65, with file and line, unwrapped; the same with and without workers."""
    lines = texts.read_text().splitlines()
    texts.write_text("\n".join([*lines[:9], "no json", *lines[9:]]) + "\n")
    trainer = runs.build(runs.config("run", *streaming, f"data.num_workers={workers}"))
    with pytest.raises(DataError, match=r"^\S*texts.jsonl, line 10: broken JSON") as caught:
        runs.fit(trainer)
    assert caught.value.exit_code == 65
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("streams", [True, False], ids=["streaming", "prepared"])
def test_a_worker_that_is_killed_is_an_error_that_names_it(
    runs: Runs, streaming: tuple[str, ...], streams: bool
) -> None:
    """Which worker, the signal, and what to try; at once, and none of the others is left."""
    config = runs.config("run", *(streaming if streams else ()), "data.num_workers=2", "training.steps=400")
    trainer = runs.build(config)

    def kill(batches, valid_tokens, run=trainer.forward_backward):
        if trainer.state.step == 2:
            (worker,) = [child for child in multiprocessing.active_children() if child.name == "data1"]
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        return run(batches, valid_tokens)

    trainer.forward_backward = kill
    with pytest.raises(WorkerLost) as caught:
        runs.fit(trainer)
    assert caught.value.exit_code == 1
    assert re.search(r"data worker 1 of this rank's 2 \(process \d+\) was killed by SIGKILL", str(caught.value))
    assert "data.num_workers=1" in str(caught.value)
    assert [child for child in multiprocessing.active_children() if child.name.startswith("data")] == []


def test_an_empty_source_ends_the_run(runs: Runs, streaming: tuple[str, ...], texts: Path) -> None:
    """No endless search: DataError."""
    texts.write_text('{"text": ""}\n' * 3)
    config = runs.config("run", *streaming)
    trainer = runs.build(config)
    with pytest.raises(DataError, match="no text to train on"):
        runs.fit(trainer)
