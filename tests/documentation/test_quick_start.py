"""docs/index.md, followed by somebody who has just installed titan: train, watch, kill, resume."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.command import REPOSITORY, clean_environment, finish, start, wait_until

from .commands import Command, blocks, commands_of

PAGE = REPOSITORY / "docs" / "index.md"
SMALL = ("model.dim=32", "model.n_layers=1", "model.ffn_dim=64", "training.seq_len=32", "metrics.log_every=1")
"""Makes a step of the quick start's model one of milliseconds."""


def shown(beginning: str) -> list[Command]:
    """Return the commands of the page that begin so."""
    found = [command for block in blocks(PAGE) for command in commands_of(block)]
    return [command for command in found if command.text.startswith(beginning)]


@pytest.mark.slow
def test_a_new_user_follows_the_page(here: Path, cache: Path) -> None:
    """Interrupted by Ctrl-C and started again with the same command, the run completes and misses no step."""
    first, again = shown("python -m titan.train run.dir=")
    assert first.text == again.text
    environment = clean_environment(cache)
    typed = [*first.words[1:], *SMALL]
    metrics = here / "runs" / "first" / "metrics.jsonl"
    running = start(typed, here, environment)
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 12, "twelve steps")
    running.send_signal(signal.SIGINT)
    stopped = finish(running)
    assert stopped.code in (0, 75), stopped.text  # 0 where all steps were done before the signal came
    assert stopped.code == 0 or "the same command goes on from there" in stopped.text

    for command in (*shown("tail"), *shown("cat"), *shown("ls")):
        watched = subprocess.run(command.words, cwd=here, capture_output=True, text=True, timeout=30)
        assert watched.returncode == 0, command.text
        assert watched.stdout
    status = json.loads((here / "runs" / "first" / "status.json").read_text())
    assert status["state"] == ("complete" if stopped.code == 0 else "preempted")

    resumed = finish(start(typed, here, environment))
    assert resumed.code == 0, resumed.text
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 61))


def test_the_page_is_in_order() -> None:
    """It installs, trains, watches and resumes, in that order, and its first command is a target of the Makefile."""
    texts = [command.text for block in blocks(PAGE) for command in commands_of(block)]
    assert texts[0] == "make .venv/.installed"
    order = ["make", "pip install", "python -m titan.train", "tail", "python -m titan.train run.dir="]
    places = [next(place for place, text in enumerate(texts) if text.startswith(beginning)) for beginning in order[:-1]]
    assert places == sorted(places)
