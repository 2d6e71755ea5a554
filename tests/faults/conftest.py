"""Fixtures of the fault suite: its seed, undisturbed runs to compare with, and runs to disturb.

FAULT_SEED=7 make test-faults       other moments, other bits; the seed is printed
FAULT_ROUNDS=3 make test-faults     everything three times, each at other moments
FAULT_RECORDS=<file>                what was injected and what came of it, as JSON
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults.reference import Reference
from tests.faults.report import Report
from tests.faults.supervisor import HANG_SECONDS, Run
from tests.support.command import FAULT, TINY, clean_environment, finish, start

INTERVAL = 3
STEPS, SHORT = 90, 24
SEED = int(os.environ.get("FAULT_SEED", "1"))

MakeReference = Callable[..., Reference]
MakeRun = Callable[..., Run]


_INJECTED = pytest.StashKey[int]()
_OF_WORKER = "faults_injected"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was injected, and what the moments were drawn from."""
    if injected := config.stash.get(_INJECTED, 0):
        terminalreporter.write_line(f"{injected} faults injected, FAULT_SEED={SEED}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Count what was injected by a process of pytest-xdist."""
    injected = getattr(node, "workeroutput", {}).get(_OF_WORKER, 0)
    node.config.stash[_INJECTED] = node.config.stash.get(_INJECTED, 0) + injected


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    """Return what all tests add to; it is written down at the end, where FAULT_RECORDS says so."""
    report, began = Report(SEED), time.monotonic()
    yield report
    request.config.stash[_INJECTED] = len(report.records)
    if (output := getattr(request.config, "workeroutput", None)) is not None:
        output[_OF_WORKER] = len(report.records)
    if path := os.environ.get("FAULT_RECORDS"):
        report.write(Path(path), request.session.testsfailed, time.monotonic() - began)


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> Random:
    """Return what draws a test's moments: a function of the seed and the test's name."""
    return Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path, text_file: Path) -> MakeReference:
    """Return complete runs without any fault, each made when first asked for.

    One that nothing more is said about keeps a checkpoint of every step.
    """
    made: dict[tuple[str, ...], Reference] = {}

    def make(steps: int = STEPS, *arguments: str, faults: str = "") -> Reference:
        key = (str(steps), *arguments, faults)
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            planted = {"PYTHONPATH": str(FAULT), "PLANTED_FAULT": faults} if faults else {}
            every = [] if arguments else ["checkpoint.interval=1"]
            words = [*command(steps, text_file), "checkpoint.keep_latest=0", *every, *arguments]
            process = start(["-m", "titan.train", *words], folder, clean_environment(cache, **planted))
            finished = finish(process, HANG_SECONDS)
            assert finished.code == 0, finished.text
            made[key] = Reference(folder / "run")
        return made[key]

    return make


@pytest.fixture
def make_run(here: Path, cache: Path, text_file: Path, draw: Random, report: Report, request) -> MakeRun:
    """Return a run of two ranks in a folder of its own, to be compared with a reference."""
    report.test = request.node.name

    def make(
        reference: Reference,
        *arguments: str,
        lost_intervals: int = 1,
        folder: Path = here,
        cache: Path = cache,
        data: Path = text_file,
    ) -> Run:
        words = [*command(max(reference.rows), data), "checkpoint.keep_latest=3", *arguments]
        environment = clean_environment(cache)
        return Run(folder, words, environment, reference, draw, report, INTERVAL, lost_intervals)

    return make


def command(steps: int, data: Path) -> list[str]:
    """Return the arguments of a run of two ranks, sharded."""
    return [
        *(word for word in TINY if not word.startswith("data=")),
        f"data={'jsonl' if data.suffix == '.jsonl' else 'text'}",
        f"data.path={data}",
        f"training.steps={steps}",
        "run.dir=run",
        "parallelism=fsdp",
        "cluster.devices_per_node=2",
        "metrics.log_every=1",
        f"checkpoint.interval={INTERVAL}",
    ]
