"""Memory does not grow while training goes on: 100 steps of the real command, beside the same with a planted leak.

What is compared is the anonymous resident memory of the process after each step: pages of mapped files, which the
kernel takes and gives as it likes, are not in it. Both runs are processes of their own, so that what other tests have
freed is no room to hide in, and both run at once.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from .support.command import TINY, clean_environment, finish, start

LEAKED_KIB_PER_STEP = 64
TOLERATED_KIB = 640
"""Over 40 steps; what a clean run needs is below half of it, and a leak of 16 KiB a step is just found."""

_RECORDER = """
import json, os, sys
from pathlib import Path

import titan.trainer.loop as loop
from titan import train

recorded, leaked_bytes = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
train_step, kept, resident_kib = loop.train_step, [], []


def recording(*arguments):
    result = train_step(*arguments)
    kept.append(os.urandom(leaked_bytes))
    status = Path("/proc/self/status").read_text()
    resident_kib.append(int(status.partition("RssAnon:")[2].split()[0]))
    return result


loop.train_step = recording
try:
    train.main()
finally:
    recorded.write_text(json.dumps(resident_kib))
"""
"""The command with the memory noted after every step, and some bytes of each step kept."""


@pytest.fixture(scope="module")
def resident_kib(tmp_path_factory: pytest.TempPathFactory, cache: Path, text_file: Path) -> dict[str, list[int]]:
    """Anonymous resident memory in KiB after each of 100 steps, of a clean run and of one that leaks."""
    folder = tmp_path_factory.mktemp("memory")
    environment = clean_environment(cache)
    run = [*TINY, "training.steps=100", f"data.path={text_file}", "cluster.device=cpu"]
    run += ["metrics.log_every=1", "checkpoint.interval=25"]
    leaks = {"clean": 0, "leaking": LEAKED_KIB_PER_STEP * 1024}
    processes = {
        name: start(
            # a cache each: they would tokenise the same text at the same moment
            ["-c", _RECORDER, f"{name}.json", str(leak), *run, f"run.dir={name}", f"data.cache_dir={name}_cache"],
            folder,
            environment,
        )
        for name, leak in leaks.items()
    }
    for process in processes.values():
        finished = finish(process)
        assert finished.code == 0, finished.text
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in processes}


def grown_kib(resident: list[int]) -> float:
    """Return by how much the median of steps 80 to 100 is above that of steps 40 to 60, in KiB."""
    assert len(resident) == 100, "one value for every step"
    return statistics.median(resident[80:]) - statistics.median(resident[40:60])


def test_memory_does_not_grow_over_100_steps(resident_kib: dict[str, list[int]]) -> None:
    """A step gives back all the memory it took; a checkpoint does too."""
    assert grown_kib(resident_kib["clean"]) < TOLERATED_KIB


def test_a_leak_of_64_kib_a_step_is_seen(resident_kib: dict[str, list[int]]) -> None:
    """The measure sees memory that a step keeps, or the test above would prove nothing."""
    assert grown_kib(resident_kib["leaking"]) > TOLERATED_KIB
    assert grown_kib(resident_kib["leaking"]) == pytest.approx(40 * LEAKED_KIB_PER_STEP, abs=TOLERATED_KIB)
