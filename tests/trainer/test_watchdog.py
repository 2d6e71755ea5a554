"""A rank that hangs ends the run, with its name and the place, whichever rank it is and however it hangs."""

from __future__ import annotations

import faulthandler
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.support.command import FAULT, TINY, processes_with, wait_until
from titan.config.schema import ClusterConfig, FaultToleranceConfig, TitanConfig
from titan.errors import StepHung
from titan.run_directory import RunDirectory
from titan.trainer.watchdog import Watchdog, describe_limits

RUN = (
    *(*TINY, "training.steps=1000000", "run.dir=run", "metrics.log_every=1", "checkpoint=disabled"),
    *("fault_tolerance.step_timeout_seconds=6", "fault_tolerance.first_step_timeout_seconds=60"),
)
PLACE = "/sitecustomize.py:"


def watchdog(folder: Path, *limits: int) -> Watchdog:
    """Return a watchdog of one rank."""
    (folder / "logs").mkdir(parents=True)
    return Watchdog(FaultToleranceConfig(*limits), RunDirectory(folder), 0, 1, 0, report=lambda hung: None)


def test_a_step_that_ends_in_time_leaves_nothing(tmp_path: Path) -> None:
    """Nothing happens to a run that does not hang, and no file of it is left."""
    with watchdog(tmp_path, 1, 1, 1) as guard:
        for step in range(1, 5):
            guard.step(step)
            time.sleep(0.4)
            with guard.extended():
                pass
        assert (tmp_path / "logs" / "rank_00000.attempt_0.stacks").exists()
    assert list((tmp_path / "logs").iterdir()) == []
    assert not (tmp_path / "events.jsonl").exists()


def test_stacks_of_an_earlier_hang_are_kept(tmp_path: Path) -> None:
    """Who starts the run again at once can still look into what has happened."""
    guard = watchdog(tmp_path, 1, 1, 1)
    (tmp_path / "logs" / "rank_00000.attempt_0.stacks").write_text("it hung here")
    with guard:
        pass
    assert [path.read_text() for path in (tmp_path / "logs").iterdir()] == ["it hung here"]


def test_a_stack_of_a_moment_that_passed_is_forgotten(tmp_path: Path) -> None:
    """A machine that is slow for seconds has stacks written; a hang much later is not where the rank was then."""
    stacks = tmp_path / "logs" / "rank_00000.attempt_0.stacks"
    with watchdog(tmp_path, 300, 1800, 1800) as guard:
        faulthandler.dump_traceback(guard._file)
        wait_until(lambda: not stacks.read_text(), "it to look again", 30)


def test_a_step_costs_next_to_nothing(tmp_path: Path) -> None:
    """Three calls a step, far below a thousandth of the shortest step there is."""
    with watchdog(tmp_path, 300, 1800, 1800) as guard:
        began = time.perf_counter()
        for step in range(1000):
            guard.step(step)
            with guard.extended():
                pass
        assert time.perf_counter() - began < 0.1


def test_a_collective_that_times_out_is_a_hang_without_a_watchdog_too(tmp_path: Path) -> None:
    """It ends with the same code where nobody looks at the clock; any other error stays what it is."""
    with pytest.raises(StepHung, match="rank 0 has waited for another one in vain"), watchdog(tmp_path / "a", 0):
        raise RuntimeError("Timed out waiting 4000ms for recv operation to complete")
    with pytest.raises(RuntimeError, match="Connection closed by peer"), watchdog(tmp_path / "b", 0):
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("limits", "wait", "words"),
    [
        ((300, 1800, 1800), 600, "300 s a step, 1800 s for the first, 1800 s where it saves"),
        ((300, 0, 60), 600, "300 s a step, no limit for the first, 300 s where it saves"),
        ((300, 1800, 1800), 60, "but a collective gives up after 60 s (cluster.timeout_seconds)"),
        ((0, 1800, 1800), 60, "off; a collective waits 60 s for a rank"),
    ],
)
def test_the_limits_are_told(limits: tuple[int, ...], wait: int, words: str) -> None:
    """A run says how long it will wait, and what comes before that."""
    config = TitanConfig(fault_tolerance=FaultToleranceConfig(*limits), cluster=ClusterConfig(timeout_seconds=wait))
    assert describe_limits(config).endswith(words)


@dataclass(frozen=True)
class Hang:
    """A way to hang, and what is said of it."""

    fault: str
    words: str
    more: list[str] = field(default_factory=list)
    during: str = "step 4 has taken longer than fault_tolerance.step_timeout_seconds = 6: "
    leaves_stack: bool = True

    @property
    def rank(self) -> int:
        """The one that hangs."""
        return int(self.fault.split(":")[1])


HANGS = {
    "in Python": Hang("sleep:1:4", f"{PLACE}.* in _strike"),
    "rank 0, with readers": Hang("sleep:0:4", f"{PLACE}.* in _strike", ["data.num_workers=1"]),
    "in its data": Hang("sleep:1:row:4", "titan/trainer/ahead.py:.* in prepare_steps", ["data.num_workers=1"]),
    "with Python's lock": Hang("lock:1:4", f"{PLACE}.* in _strike"),
    "stopped": Hang("stop:0:4", "does not answer", leaves_stack=False),
    "a collective times out first": Hang(
        "sleep:1:4",
        f"{PLACE}.* in _strike",
        ["cluster.timeout_seconds=5", "fault_tolerance.step_timeout_seconds=100"],
        during="step 4 hangs, and a collective has timed out (cluster.timeout_seconds): ",
    ),
}


@pytest.mark.parametrize(
    "hang",
    [pytest.param(hang, id=name, marks=[pytest.mark.slow] * (name != "in Python")) for name, hang in HANGS.items()],
)
def test_a_rank_that_hangs_ends_the_run_with_its_name(
    titan_process: Command, here: Path, text_file: Path, hang: Hang
) -> None:
    """Exit code 74; console, every log, status and events name the rank and the place; no process is left."""
    arguments = (*RUN, *hang.more, f"data.path={text_file}", "cluster.devices_per_node=2")
    finished = titan_process(*arguments, PYTHONPATH=str(FAULT), PLANTED_FAULT=hang.fault)
    assert finished.code == 74, finished.text
    assert processes_with(finished.mark) == {}
    assert "Traceback" not in finished.text

    directory = RunDirectory(here / "run")
    status = directory.read_status()
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 74, hang.rank)
    (verdict,) = directory.read_events("hang")
    assert verdict["ranks"] == [hang.rank]
    answering = [rank for rank in (0, 1) if rank != hang.rank or "stop" not in hang.fault]
    logs = [directory.log(rank, 0).read_text() for rank in answering if "lock" not in hang.fault or rank != hang.rank]
    for text in (finished.err, status["why"], verdict["why"], *logs):
        assert hang.during in text
        assert re.search(f"rank {hang.rank} .*{hang.words}", text)
        assert re.search(f"; rank {1 - hang.rank} waits at .* in count_valid_tokens", text)
    assert bool(directory.stacks(hang.rank, 0).read_text()) is hang.leaves_stack
