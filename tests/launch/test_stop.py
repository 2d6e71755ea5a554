"""Being told to stop: all ranks save after the same step, and the run that goes on is the undisturbed run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.support.command import (
    FAULT,
    TINY,
    Started,
    clean_environment,
    finish,
    json_lines,
    kill_all,
    processes_with,
    results,
    start,
    wait_until,
)
from titan.run_directory import RunDirectory

STEPS = 12
RUN = (*TINY, f"training.steps={STEPS}", "checkpoint.interval=100", "metrics.log_every=1", "run.dir=run")
SLOW = {"PYTHONPATH": str(FAULT), "PLANTED_FAULT": "slow:0:0.3"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path, text_file: Path) -> dict[int, Path]:
    """Return complete runs of so many ranks, each made when first asked for."""

    class Runs(dict[int, Path]):
        def __missing__(self, ranks: int) -> Path:
            folder = tmp_path_factory.mktemp(f"undisturbed{ranks}")
            arguments = ["-m", "titan.train", *RUN, f"data.path={text_file}", f"cluster.devices_per_node={ranks}"]
            finished = finish(start(arguments, folder, clean_environment(cache)))
            assert finished.code == 0, finished.text
            self[ranks] = folder / "run"
            return self[ranks]

    return Runs()


def started_and_at_work(process: Started, here: Path) -> None:
    """Wait until a run has done some steps."""
    metrics = here / "run" / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (metrics.exists() and len(json_lines(metrics)) > 1), "two steps")
    assert process.poll() is None, finish(process)


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        (1, signal.SIGTERM),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_in_order_and_the_same_command_goes_on(
    here: Path, cache: Path, text_file: Path, undisturbed: dict[int, Path], ranks: int, number: signal.Signals
) -> None:
    """The command exits with 75 once all is saved; typed again, it ends as the run that nobody stopped, bit for bit."""
    arguments = ["-m", "titan.train", *RUN, f"data.path={text_file}", f"cluster.devices_per_node={ranks}"]
    process = start(arguments, here, clean_environment(cache, **SLOW))
    try:
        started_and_at_work(process, here)
        process.send_signal(number)
        finished = finish(process)
        assert finished.code == 75, finished.text
        assert "Traceback" not in finished.text
        assert processes_with(process.mark) == {}
    finally:
        kill_all(process)
    directory = RunDirectory(here / "run")
    status = directory.read_status()
    assert (status["state"], status["saved_step"]) == ("preempted", status["step"])
    assert 1 < status["step"] < STEPS
    assert f"after step {status['step']}, and it is saved" in finished.text
    assert [event["step"] for event in directory.read_events("save")] == [status["step"]]

    again = finish(start(arguments, here, clean_environment(cache)))
    assert again.code == 0, again.text
    assert [event["step"] for event in directory.read_events("resume")] == [status["step"]]
    assert results(here / "run") == results(undisturbed[ranks])


@pytest.mark.slow
def test_a_signal_to_every_process_kills_no_reader(
    here: Path, cache: Path, text_file: Path, undisturbed: dict[int, Path]
) -> None:
    """SLURM tells all processes of a job, the data-loader's too: they live until their rank has stopped in order."""
    arguments = ["-m", "titan.train", *RUN, f"data.path={text_file}", "cluster.devices_per_node=2"]
    process = start([*arguments, "data.num_workers=2"], here, clean_environment(cache, **SLOW))
    try:
        started_and_at_work(process, here)
        assert len(processes_with(process.mark)) >= 7, "the launcher, two ranks, and two readers of each"
        os.killpg(process.pid, signal.SIGUSR2)
        finished = finish(process)
        assert finished.code == 75, finished.text
        assert processes_with(process.mark) == {}
    finally:
        kill_all(process)
    assert finish(start(arguments, here, clean_environment(cache))).code == 0
    assert results(here / "run") == results(undisturbed[2])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_again_ends_at_once(here: Path, cache: Path, text_file: Path, ranks: int) -> None:
    """The first Ctrl-C says what a second one does; the second does not wait for a step that takes for ever."""
    arguments = ["-m", "titan.train", *RUN, f"data.path={text_file}", f"cluster.devices_per_node={ranks}"]
    fault = {"PYTHONPATH": str(FAULT), "PLANTED_FAULT": "sleep:0:3"}
    process = start([*arguments, "data.num_workers=1"], here, clean_environment(cache, **fault))
    try:
        started_and_at_work(process, here)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        finished = finish(process)
        assert time.monotonic() - began < 20
        assert finished.code == 130, finished.text
        assert finished.err.count("stopping after this step; Ctrl-C again ends at once") == 1
        assert "Traceback" not in finished.text
        assert processes_with(process.mark) == {}
    finally:
        kill_all(process)
    directory = RunDirectory(here / "run")
    assert directory.read_status()["state"] == "failed"
    assert directory.read_events("save") == []
    for log in (here / "run" / "logs").iterdir():
        assert "Traceback" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_before_the_first_step_ends_at_once(here: Path, cache: Path, text_file: Path, ranks: int) -> None:
    """While the ranks build and tokenise there is nothing to save: the first Ctrl-C ends them."""
    arguments = ["-m", "titan.train", *RUN, f"data.path={text_file}", f"cluster.devices_per_node={ranks}"]
    process = start(arguments, here, clean_environment(cache))
    try:
        wait_until(lambda: len(list((here / "run").glob("logs/*.log"))) == ranks, "the ranks")
        wait_until(lambda: "state" in RunDirectory(here / "run").read_status(), "a status")
        os.killpg(process.pid, signal.SIGINT)
        finished = finish(process, 60)
        assert finished.code == 130, finished.text
        assert "Traceback" not in finished.text
        assert processes_with(process.mark) == {}
    finally:
        kill_all(process)
    assert RunDirectory(here / "run").read_status()["state"] == "failed"


@pytest.mark.slow
def test_ctrl_c_on_torchrun_leaves_nothing(here: Path, cache: Path, text_file: Path) -> None:
    """Torchrun passes on what the terminal has already told its ranks: they save all the same, and nothing hangs."""
    process = start([*torchrun(), *RUN, f"data.path={text_file}"], here, clean_environment(cache, **SLOW))
    try:
        started_and_at_work(process, here)
        os.killpg(process.pid, signal.SIGINT)
        finish(process, 60)  # its own exit code is 1 in any case
        assert processes_with(process.mark) == {}
    finally:
        kill_all(process)
    assert RunDirectory(here / "run").read_status()["state"] == "preempted"


def test_without_checkpoints_it_says_that_nothing_was_saved(here: Path, cache: Path, text_file: Path) -> None:
    """A run that keeps no checkpoints stops in order too, and does not promise to go on."""
    arguments = ["-m", "titan.train", *RUN, f"data.path={text_file}", "checkpoint=disabled"]
    process = start(arguments, here, clean_environment(cache, **SLOW))
    try:
        started_and_at_work(process, here)
        process.send_signal(signal.SIGTERM)
        finished = finish(process)
    finally:
        kill_all(process)
    assert finished.code == 143, "75 would ask to go on"
    assert "nothing was saved" in finished.out
    assert RunDirectory(here / "run").read_status()["saved_step"] is None


def test_an_earlier_stop_is_no_answer_to_a_crash(here: Path, cache: Path, text_file: Path) -> None:
    """Ranks that die before they can say anything have not stopped in order, though the run once did."""
    arguments = ["-m", "titan.train", *RUN, f"data.path={text_file}", "cluster.devices_per_node=2"]
    directory = RunDirectory(here / "run")
    directory.path.mkdir()
    directory.write_status("preempted", why="long ago", step=4, signal="SIGUSR2", saved_step=4)
    (directory.path / "logs").write_text("in the way of the ranks' logs")
    finished = finish(start(arguments, here, clean_environment(cache)))
    assert finished.code == 1
    assert "failed first" in finished.err
    assert "is saved" not in finished.text


def test_a_sweep_that_is_stopped_starts_no_other_point(here: Path, cache: Path, text_file: Path) -> None:
    """Stopping one point of a sweep stops the sweep."""
    arguments = ["-m", "titan.train", "--multirun", *RUN, f"data.path={text_file}", "training.seed=1,2"]
    process = start(arguments, here, clean_environment(cache, **SLOW))
    first = here / "run" / "0" / "metrics.jsonl"
    try:
        wait_until(lambda: first.exists() and bool(first.read_text()), "a step")
        process.send_signal(signal.SIGTERM)
        assert finish(process).code == 75
    finally:
        kill_all(process)
    assert not (here / "run" / "1").exists()


def torchrun(*flags: str) -> list[str]:
    """Return the command of a user of torchrun."""
    return ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *flags, "-m", "titan.train"]


@pytest.mark.slow
def test_torchrun_told_to_stop_saves(here: Path, cache: Path, text_file: Path, undisturbed: dict[int, Path]) -> None:
    """SIGTERM to torchrun, which hands it on, is an orderly stop too."""
    arguments = [*torchrun(), *RUN, f"data.path={text_file}"]
    process = start(arguments, here, clean_environment(cache, **SLOW))
    try:
        started_and_at_work(process, here)
        process.send_signal(signal.SIGTERM)
        finish(process)  # its own exit code is 1 in any case
    finally:
        kill_all(process)
    assert RunDirectory(here / "run").read_status()["state"] == "preempted"
    assert finish(start(arguments, here, clean_environment(cache))).code == 0
    assert results(here / "run") == results(undisturbed[2])


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(2))
def test_torchrun_restarts_from_the_last_checkpoint(
    here: Path, cache: Path, text_file: Path, undisturbed: dict[int, Path], attempt: int
) -> None:
    """`--max-restarts`: ranks that one of them took along come back, resume, and end as the undisturbed run.

    Several times, for gloo's ranks may find the addresses of the attempt before in torchrun's store.
    """
    arguments = [*torchrun("--max-restarts=1"), *RUN, "checkpoint.interval=4", f"data.path={text_file}"]
    fault = {"PYTHONPATH": str(FAULT), "PLANTED_FAULT": "kill_once:1:7"}
    finished = finish(start(arguments, here, clean_environment(cache, **fault)))
    assert finished.code == 0, finished.text
    directory = RunDirectory(here / "run")
    assert [event["attempt"] for event in directory.read_events("start")] == [0, 1]
    assert [event["step"] for event in directory.read_events("resume")] == [4]
    assert len(list((here / "run" / "logs").glob("*.log"))) == 4
    assert results(here / "run") == results(undisturbed[2])


def test_a_complete_run_is_not_trained_again_by_its_ranks(
    titan_process: Command, trained: Path, text_file: Path
) -> None:
    """A scheduler that starts the ranks of a finished run once more gets 0 and a word, and nothing changes."""
    before = (trained / "status.json").read_bytes(), (trained / "metrics.jsonl").read_bytes()
    finished = titan_process(str(trained / "config.yaml"), module="titan.worker")
    assert finished.code == 0
    assert "this run is complete" in finished.out
    assert before == ((trained / "status.json").read_bytes(), (trained / "metrics.jsonl").read_bytes())
