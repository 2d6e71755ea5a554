"""What a run directory lets a config do: begin in it, go on, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.launch.test_lock import hold
from tests.support.command import TINY, files_below, json_lines
from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.load import load_config
from titan.config.schema import TitanConfig
from titan.errors import ConfigError
from titan.launch.dispatch import Frozen, already_complete, freeze
from titan.launch.lock import RunInUse, RunLock
from titan.log import logger
from titan.run_directory import RunDirectory

Freeze = Callable[..., Frozen]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A run directory that is still to be made."""
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def config(directory: RunDirectory, text_file: Path) -> Callable[..., TitanConfig]:
    """Composes and checks a config of some overrides, for the directory."""

    def composed(*overrides: str) -> TitanConfig:
        common = (*TINY, f"data.path={text_file}", f"run.dir={directory.path}", "cluster.device=cpu")
        return check_config(compose([*common, *overrides]), Machine())

    return composed


@pytest.fixture
def frozen(directory: RunDirectory, config: Callable[..., TitanConfig]) -> Freeze:
    """Freezes a config of some overrides into the directory, which has one of none already."""

    def run(*overrides: str) -> Frozen:
        return freeze(config(*overrides), directory, list(overrides))

    assert run() is Frozen.new
    return run


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are logged."""
    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lines.append)
    return lines


def fail_before_a_step(directory: RunDirectory) -> None:
    """Leave what an attempt leaves that ends before its first step is done, and while it saves what it begins with."""
    for event in ("start", "exit"):
        directory.append_event(event)
    directory.write_identity("an identity")
    for file in (directory.rows, directory.metrics, directory.samples):
        file.touch()
    (directory.checkpoints / ".step_00000000.1234abcd.tmp").mkdir(parents=True)


@pytest.mark.parametrize("state", ["", "failed", "running", "preempted"])
def test_a_directory_in_which_nothing_was_trained_takes_any_config(
    directory: RunDirectory, frozen: Freeze, said: list[str], state: str
) -> None:
    """However the attempt before has ended; the new settings are the frozen ones, and what was typed for them too."""
    fail_before_a_step(directory)
    if state:
        directory.write_status(state, **({"step": 0} if state == "running" else {}))
    assert frozen("training.seed=7", "model.dim=64") is Frozen.new
    config = load_config(directory.config)
    assert (config.training.seed, config.model.dim) == (7, 64)
    assert "training.seed=7" in directory.overrides.read_text()
    assert said == [f"nothing was trained in {directory.path} yet: it begins with the new settings"]
    assert frozen("training.seed=7", "model.dim=64") is Frozen.continued
    assert len(said) == 1, "the same settings are no news"


SOMETHING: dict[str, Callable[[RunDirectory], object]] = {
    "a step's rows": lambda run: run.rows.write_text(json.dumps({"step": 1}) + "\n"),
    "a logged step": lambda run: run.metrics.write_text(json.dumps({"step": 1}) + "\n"),
    "a step that was left out": lambda run: run.append_ledger({"first_step": 1, "last_step": 1}),
    "a checkpoint of step 0": lambda run: (run.checkpoints / "step_00000000").mkdir(parents=True),
    "a damaged checkpoint": lambda run: (run.checkpoints / "damaged_step_00000004").mkdir(parents=True),
    "a checkpoint that was once saved": lambda run: run.append_event("save", step=0),
    "a stop after a step": lambda run: run.write_status("preempted", step=3),
}


@pytest.mark.parametrize("what", SOMETHING)
def test_a_directory_that_holds_something_keeps_its_config(directory: RunDirectory, frozen: Freeze, what: str) -> None:
    """One trace of a step or of a checkpoint is enough, whichever others are gone; nothing is changed."""
    SOMETHING[what](directory)
    before = files_below(directory.path)
    with pytest.raises(ConfigError, match="other training settings, which cannot be continued"):
        frozen("training.seed=7")
    assert files_below(directory.path) == before


def test_nobody_goes_back_where_nothing_was_trained(directory: RunDirectory, frozen: Freeze) -> None:
    """A step to go back to is one that was saved."""
    before = files_below(directory.path)
    with pytest.raises(ConfigError, match=r"has no such checkpoint\n    There are: none"):
        frozen("training.seed=7", "checkpoint.load_step=4")
    assert files_below(directory.path) == before


def test_a_live_run_that_has_trained_nothing_yet_keeps_its_config(directory: RunDirectory, frozen: Freeze) -> None:
    """It is about to; so it is in use, whatever it has come to."""
    text = directory.config.read_text()
    process = hold(directory.path, 600)
    try:
        with pytest.raises(RunInUse):
            frozen("training.seed=7")
    finally:
        process.kill()
        process.wait()
    assert directory.config.read_text() == text


def test_a_run_that_trains_while_one_waits_for_it_keeps_its_config(
    directory: RunDirectory, frozen: Freeze, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the lock another command may have trained and ended."""
    acquire, text = RunLock.acquire, directory.config.read_text()

    def late(lock: RunLock) -> None:
        directory.write_status("complete", step=2)
        acquire(lock)

    monkeypatch.setattr(RunLock, "acquire", late)
    with pytest.raises(ConfigError, match="has been trained in by another command just now"):
        frozen("training.seed=7")
    assert directory.config.read_text() == text


def test_a_complete_run_says_what_it_has_and_what_it_does_not_take(
    directory: RunDirectory, frozen: Freeze, config: Callable[..., TitanConfig]
) -> None:
    """The steps that were done, whatever is asked for; settings that differ, with both values; nothing is changed."""
    directory.write_status("complete", step=60, loss=1.0)
    before, complete = files_below(directory.path), f"{directory.path}: this run is complete"
    for overrides, words in (
        (["training.steps=60"], " (step 60); nothing to do"),
        (["training.steps=8"], " (60 steps, 8 asked for); nothing to do"),
        (
            ["training.steps=8", "optimizer.lr=0.001"],
            " (60 steps, 8 asked for); nothing to do\n"
            "  optimizer.lr=0.001 (it had 0.002) changes nothing in it; for a new run  run.dir=ANOTHER",
        ),
        (
            ["training.steps=60", "optimizer.lr=0.001", "metrics.log_every=7"],
            " (step 60); nothing to do\n"
            "  optimizer.lr=0.001 (it had 0.002), metrics.log_every=7 (it had 10) change nothing in it; "
            "for a new run  run.dir=ANOTHER",
        ),
    ):
        assert frozen(*overrides) is Frozen.complete
        assert already_complete(config(*overrides), directory) == complete + words
    assert files_below(directory.path) == before


def test_a_mistake_that_the_rank_finds_is_corrected_in_place(titan_process: Command, here: Path) -> None:
    """Data that a rank refuses with 65: the same command with the correction trains, as if it had come first."""
    lines = [f"the quick brown fox jumps over {number} lazy dogs\n" for number in range(200)]
    (here / "good.txt").write_text("".join(lines))
    (here / "bad.txt").write_bytes("".join(lines).encode() + b"not \xff UTF-8\n")
    typed = (*TINY, "run.dir=run", "metrics.log_every=1")
    refused = titan_process(*typed, "data.path=bad.txt")
    assert refused.code == 65, refused.text
    assert "bad.txt, line 201" in refused.text
    corrected = titan_process(*typed, "data.path=good.txt")
    assert corrected.code == 0, corrected.text
    assert "nothing was trained in run yet: it begins with the new settings" in corrected.out
    run = RunDirectory(here / "run")
    assert [row["step"] for row in json_lines(run.metrics)] == [row["step"] for row in json_lines(run.rows)] == [1, 2]
    assert [event["event"] for event in json_lines(run.events)] == ["start", "exit", "start", "save", "exit"]
    assert (load_config(run.config).data.path or "").endswith("good.txt")
