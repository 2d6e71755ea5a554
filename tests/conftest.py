"""Fixtures for all tests: titan's command in this process and in one of its own, ranks, and some text to train on."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from titan import train
from titan.config.load import without_collections
from titan.log import logger

from .parallel.pool import RankPool
from .support.command import TINY, Finished, clean_environment, finish, start

Command = Callable[..., Finished]

# A shell's background job ignores Ctrl-C, and so would every command that these tests start there and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Compiling titan anew takes each process longer than all else that its front end does.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_collection_finish() -> None:
    """Hide all modules from the collector, which would look through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], RankPool]]:
    """A pool of ranks of each size, made when first asked for."""
    made: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in made:
            made[world_size] = RankPool(world_size)
        return made[world_size]

    yield pool
    for each in made.values():
        each.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the tests of one session, so that none sees or fills the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document of some thousand bytes."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(f"the quick brown fox jumps over {number} lazy dogs\n" for number in range(200)))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def titan(
    here: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Titan's entry point, called in this process: for what ends before a rank starts."""
    environment = clean_environment(cache)
    loggers = logger, logging.getLogger()  # Hydra gives the second one handlers, for some of its flags
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]

    def run(*arguments: str, **variables: str) -> Finished:
        GlobalHydra.instance().clear()
        for name in set(os.environ) - set(environment):
            monkeypatch.delenv(name)
        for name, value in (environment | variables).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["titan", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit, without_collections():  # the process has none either
            train.main()
        out, err = capfd.readouterr()
        return Finished(exit.value.code or 0, out, err)  # type: ignore[arg-type]

    yield run
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture
def titan_process(here: Path, cache: Path) -> Command:
    """Titan's command as a process: for what starts ranks, and for what a process alone can show."""

    def run(*arguments: str, module: str = "titan.train", timeout_seconds: float = 240, **variables: str) -> Finished:
        process = start(["-m", module, *arguments], here, clean_environment(cache, **variables))
        return finish(process, timeout_seconds)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path, text_file: Path) -> Path:
    """The directory of a complete run of one rank. To be read only; copy it to change it."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["-m", "titan.train", *TINY, f"data.path={text_file}", "run.dir=run", "metrics.log_every=1"]
    finished = finish(start(arguments, folder, clean_environment(cache)))
    assert finished.code == 0, finished.text
    return folder / "run"
