"""Ranks as processes of this machine: they train one run together, and none outlives its launcher or a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import Command
from tests.support.command import (
    FAULT,
    TINY,
    Finished,
    clean_environment,
    files_below,
    finish,
    json_lines,
    kill_all,
    processes_with,
    start,
    wait_until,
)
from titan.config.degrees import world_size
from titan.config.load import load_config
from titan.run_directory import RunDirectory

TWO = (*TINY, "cluster.devices_per_node=2", "metrics.log_every=1", "run.dir=run")
ENDLESS = "training.steps=1000000"
SECONDS = 60
"""Within seconds, on a machine that does other things too; far from the 600 of cluster.timeout_seconds."""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, cache: Path, text_file: Path) -> tuple[RunDirectory, Finished]:
    """A run of two ranks that has ended, and what it wrote on the console."""
    folder = tmp_path_factory.mktemp("together")
    arguments = ["-m", "titan.train", *TWO, f"data.path={text_file}"]
    return RunDirectory(folder / "run"), finish(start(arguments, folder, clean_environment(cache)))


def test_two_ranks_train_one_run(together: tuple[RunDirectory, Finished]) -> None:
    """Two processes make one run: it is complete, says so everywhere, and its metrics have the contract's fields."""
    directory, finished = together
    assert finished.code == 0, finished.text
    status = directory.read_status()
    assert (status["state"], status["why"], status["step"]) == ("complete", "", 2)

    rows = json_lines(directory.metrics)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert list(row) == [
            *("step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"),
            *("tokens_per_second_per_device", "tflops_per_device", "mfu", "memory_gib", "step_seconds"),
            *("data_seconds", "checkpoint_seconds", "time"),
        ]
    assert rows[-1]["tokens"] == 2 * 4 * 32
    assert status["loss"] == rows[-1]["loss"]

    events = json_lines(directory.path / "events.jsonl")
    assert [event["event"] for event in events] == ["start", "save", "exit"]
    assert events[0]["ranks"] == 2
    assert events[-1]["code"] == 0
    assert [path.name for path in directory.checkpoints.iterdir()] == ["step_00000002"]


def test_what_was_typed_and_what_it_made_is_kept(together: tuple[RunDirectory, Finished]) -> None:
    """config.yaml is the whole config with nothing left open; overrides.yaml is the command line."""
    directory, _ = together
    text = directory.config.read_text()
    for left_open in ("${", "???", ": auto\n"):
        assert left_open not in text
    config = load_config(directory.config)
    assert world_size(config.cluster) == 2
    assert config.parallelism.dp_shard == 2
    assert config.run.dir == str(directory.path)
    overrides = yaml.safe_load(directory.overrides.read_text())
    assert overrides[: len(TWO)] == list(TWO)


def test_the_console_shows_one_rank_and_every_rank_has_a_log(together: tuple[RunDirectory, Finished]) -> None:
    """Each line comes once on the console, and each rank's file has its own lines, with time and rank."""
    directory, finished = together
    assert finished.err == ""
    assert sum("mesh " in line for line in finished.out.splitlines()) == 1
    assert "dp_shard 2" in finished.out
    for rank in (0, 1):
        lines = directory.log(rank, 0).read_text().splitlines()
        assert any(f" rank {rank} INFO mesh" in line for line in lines)
    assert len(list((directory.path / "logs").iterdir())) == 2


def test_a_complete_run_is_left_as_it_is(titan: Command, together: tuple[RunDirectory, Finished]) -> None:
    """The same command again, or a rank by hand, says that the run is complete, exits with 0 and changes nothing."""
    directory, _ = together
    config = load_config(directory.config)
    before = files_below(directory.path)
    again = titan(*TWO, f"data.path={config.data.path}", f"run.dir={directory.path}")
    assert again.code == 0
    assert "this run is complete (step 2); nothing to do" in again.out
    assert files_below(directory.path) == before


def test_a_run_goes_on_where_it_stood(titan_process: Command, here: Path, trained: Path) -> None:
    """More steps in the same directory resume from the checkpoint; no step is repeated, and the change is told."""
    config = load_config(trained / "config.yaml")
    subprocess.run(["cp", "-r", trained, here / "run"], check=True)
    finished = titan_process(*TINY, f"data.path={config.data.path}", "run.dir=run", "training.steps=4")
    assert finished.code == 0, finished.text
    assert "resuming with training.steps = 4 (was 2)" in finished.out
    assert "resumed at step 2" in finished.out
    directory = RunDirectory(here / "run")
    assert [row["step"] for row in json_lines(directory.metrics)] == [1, 2, 4]
    events = [event["event"] for event in json_lines(directory.path / "events.jsonl")]
    assert events == ["start", "save", "exit", "start", "resume", "save", "exit"]
    assert directory.read_status()["step"] == 4
    assert load_config(directory.config).training.steps == 4


def test_a_rank_by_hand_needs_the_frozen_config_alone(titan_process: Command, trained: Path, here: Path) -> None:
    """`python -m titan.worker CONFIG` does the run of a config, from any folder."""
    text = (trained / "config.yaml").read_text()
    (here / "frozen.yaml").write_text(text.replace(str(trained), str(here / "by_hand")))
    finished = titan_process("frozen.yaml", module="titan.worker")
    assert finished.code == 0, finished.text
    by_hand, before = json_lines(here / "by_hand" / "metrics.jsonl"), json_lines(trained / "metrics.jsonl")
    assert [row["loss"] for row in by_hand] == [row["loss"] for row in before]


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("error:1:2", 1, ["rank 1 failed first: RuntimeError: a planted error", "rank_00001.attempt_0.log"]),
        ("kill:1:2", 1, ["rank 1 failed first: ended by SIGKILL", "rank_00001.attempt_0.log"]),
        ("nan:1:2", 71, ["the loss is nan; no weight was moved"]),
    ],
    ids=["an error", "a kill", "a loss that is not finite"],
)
def test_a_failing_rank_ends_the_run(
    titan_process: Command, here: Path, text_file: Path, fault: str, code: int, words: list[str]
) -> None:
    """One rank fails while the other waits for it: all end within seconds, and the console says which, why, where."""
    began = time.monotonic()
    arguments = (*TWO, ENDLESS, f"data.path={text_file}")
    finished = titan_process(*arguments, PYTHONPATH=str(FAULT), PLANTED_FAULT=fault)
    assert time.monotonic() - began < SECONDS
    assert finished.code == code
    for word in words:
        assert word in finished.err
    assert processes_with(finished.mark) == {}
    directory = RunDirectory(here / "run")
    status = directory.read_status()
    assert (status["state"], status["exit_code"]) == ("failed", code)
    if not fault.startswith("nan"):  # which all ranks find together
        assert status["rank"] == 1
        assert "Traceback" not in finished.text, "what happened to others is in their logs"
    log = directory.log(1, 0).read_text()
    if fault.startswith("error"):
        assert "RuntimeError: a planted error" in log
        assert "Traceback" in log
    if fault.startswith("nan"):
        assert "Traceback" not in finished.text


def test_bad_data_ends_the_run_with_its_file_and_line(titan_process: Command, here: Path) -> None:
    """Data that turns out bad while running: exit code 65, the file and line, no traceback."""
    (here / "bad.txt").write_bytes(b"good\nnot \xff UTF-8\n")
    finished = titan_process(*TWO, "data.path=bad.txt")
    assert finished.code == 65
    assert "bad.txt, line 2" in finished.err
    assert "Traceback" not in finished.text
    assert RunDirectory(here / "run").read_status()["exit_code"] == 65


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [
        (signal.SIGINT, True, 75),
        (signal.SIGTERM, False, 75),
        (signal.SIGUSR2, False, 75),
        (signal.SIGKILL, False, -9),
    ],
    ids=["Ctrl-C", "SIGTERM to the launcher", "SIGUSR2 to the launcher", "SIGKILL to the launcher"],
)
def test_no_process_outlives_its_launcher(
    here: Path, cache: Path, text_file: Path, number: signal.Signals, whole_group: bool, code: int
) -> None:
    """However the command is stopped in the middle of training, all that it started ends within seconds.

    Where that is in order, the signal that was sent is named, and once.
    """
    arguments = ["-m", "titan.train", *TWO, ENDLESS, f"data.path={text_file}", "data.num_workers=1"]
    process = start(arguments, here, clean_environment(cache))
    metrics = here / "run" / "metrics.jsonl"
    try:
        wait_until(lambda: process.poll() is not None or (metrics.exists() and bool(metrics.read_text())), "a step")
        assert process.poll() is None, finish(process)
        assert len(processes_with(process.mark)) >= 5, "the launcher, two ranks, and a reader of each"
        if whole_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        finished = finish(process, SECONDS)
        assert finished.code == code
        if code == 75:  # a rank that is killed may see its reader go first, in the moment before
            assert "Traceback" not in finished.text
        wait_until(lambda: processes_with(process.mark) == {}, "all processes have ended", SECONDS)
    finally:
        kill_all(process)
    if code == 75:
        directory = RunDirectory(here / "run")
        status = directory.read_status()
        assert (status["state"], status["signal"]) == ("preempted", number.name)
        assert [event["signal"] for event in directory.read_events("signal")] == [number.name]
        assert finished.text.count("stopped by ") == finished.text.count(f"stopped by {number.name} after step") == 1


def torchrun(here: Path, cache: Path, *arguments: str) -> Finished:
    """Start two ranks as a user of torchrun does."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "titan.train", *arguments]
    return finish(start(command, here, clean_environment(cache)))


def test_torchrun_in_front_trains_one_run(here: Path, cache: Path, text_file: Path) -> None:
    """Ranks that an outer launcher started agree on one run directory, though each has composed a time of its own."""
    finished = torchrun(here, cache, *TINY, f"data.path={text_file}", "metrics.log_every=1")
    assert finished.code == 0, finished.text
    (path,) = (here / "runs" / "llama3_debug").iterdir()
    directory = RunDirectory(path)
    assert directory.read_status()["state"] == "complete"
    assert [row["step"] for row in json_lines(directory.metrics)] == [1, 2]
    assert load_config(directory.config).parallelism.dp_shard == 2
    assert len(list((path / "logs").iterdir())) == 2
    assert sum("mesh " in line for line in finished.out.splitlines()) == 1


def test_a_mistake_behind_torchrun_is_told_once(here: Path, cache: Path) -> None:
    """All ranks find the same mistake, and one of them says so."""
    finished = torchrun(here, cache, *TINY, "data.path=nope", "cluster.devices_per_node=3")
    assert finished.code != 0
    assert finished.err.count("2 problems in the composed config") == 1
    assert "the outer launcher started 2" in finished.err
    assert not (here / "runs").exists()
