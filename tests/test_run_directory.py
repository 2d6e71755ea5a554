"""The files of a run, when a crash or a full disk has cut one short."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from titan import run_directory
from titan.config.load import save_config
from titan.errors import ConfigError
from titan.launch.dispatch import freeze
from titan.launch.environment import CONFIG_DIGEST, config_digest
from titan.metrics.sinks import JsonLines
from titan.run_directory import RunDirectory
from titan.worker import check_is_launchers

from .support.command import json_lines
from .trainer.conftest import Runs


def test_a_line_that_was_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    """What is appended after it is a line of its own; readers leave out the part, and find all the rest."""
    directory = RunDirectory(tmp_path)
    for step in (1, 2):
        directory.append_ledger({"first_step": step, "last_step": step})
        directory.append_event("save", step=step)
    for path in (directory.ledger, tmp_path / "events.jsonl"):
        path.write_bytes(path.read_bytes()[:-5])
    directory.append_ledger({"first_step": 3, "last_step": 3})
    directory.append_event("save", step=3)
    assert [row["first_step"] for row in directory.read_ledger()] == [1, 3]
    assert [event["step"] for event in directory.read_events("save")] == [1, 3]


def test_an_event_that_finds_no_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk loses an event, not the run; the ledger, which decides what is trained, is an error."""
    directory = RunDirectory(tmp_path)

    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_directory.os, "write", full)
    directory.append_event("save", step=1)
    with pytest.raises(OSError, match="No space left"):
        directory.append_ledger({"first_step": 1, "last_step": 1})


def test_metrics_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a full disk refuses come with the next that it takes, each once, also after going back."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    sink.write({"step": 1})
    with monkeypatch.context() as patch:

        def full(*given):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("titan.metrics.sinks.os.write", full)
        for step in (2, 3):
            sink.write({"step": step})
        sink.rewind(2)
    sink.write({"step": 4})
    assert [row["step"] for row in json_lines(path)] == [1, 2, 4]
    sink.close()
    path.write_bytes(path.read_bytes() + b'{"step": 5, "lo')
    JsonLines(path, 2).close()
    assert [row["step"] for row in json_lines(path)] == [1, 2]


def test_the_config_of_a_live_run_is_not_changed(runs: Runs) -> None:
    """A rank finds that its config was changed by another command since its launcher had frozen it."""
    config = runs.config("run")
    directory = RunDirectory(Path(config.run.dir))
    freeze(config, directory, [])
    digest = config_digest(directory.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CONFIG_DIGEST, digest)
        check_is_launchers(directory.config)
        save_config(runs.config("run", "optimizer.lr=0.5"), directory.config)
        with pytest.raises(ConfigError, match="was changed by another command just after this run was started"):
            check_is_launchers(directory.config)


@pytest.fixture
def runs(tmp_path: Path, text_file: Path, cache: Path) -> Runs:
    """Runs in an empty folder."""
    return Runs(tmp_path, text_file, cache)


def test_containers_with_one_pid_write_apart_from_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared disk, processes of one number and one host name never write to each other's temporary file."""
    path, original = tmp_path / "status.json", run_directory.write_synced

    def interrupted(temporary: Path, text: str) -> None:
        original(temporary, text)
        if text == "first":  # meanwhile, elsewhere
            run_directory.write_atomically(path, "second")
            assert path.read_text() == "second"

    monkeypatch.setattr(run_directory, "write_synced", interrupted)
    run_directory.write_atomically(path, "first")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt has another name, and would fill a full disk further."""

    def full(path: Path, text: str) -> None:
        path.write_text(text[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_directory, "write_synced", full)
    RunDirectory(tmp_path).write_status("running")
    assert list(tmp_path.iterdir()) == []


def test_only_what_nobody_writes_any_more_is_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is gone leaves its files to be removed at once, one of another container only after a day."""
    mine = run_directory.unique_temporary(tmp_path / "part_0.tokens")
    monkeypatch.setattr(run_directory.os, "getpid", lambda: 999_999_999)
    dead = run_directory.unique_temporary(tmp_path / "part_0.tokens")
    monkeypatch.setattr(run_directory, "_process_space", lambda: "elsewhere")
    foreign, old = (run_directory.unique_temporary(tmp_path / "part_0.tokens") for _ in range(2))
    monkeypatch.undo()
    other = tmp_path / ".notes.tmp"
    for path in (mine, dead, foreign, old, other):
        path.write_text("")
    os.utime(old, (0, 0))
    run_directory.remove_leftovers(tmp_path, "part_*")
    assert sorted(tmp_path.iterdir()) == sorted([mine, foreign, other])
