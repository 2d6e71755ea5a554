"""No sink can stop a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from titan.log import logger
from titan.metrics.sinks import Guarded


class Breaking:
    """A sink that raises where it is told to, and notes what it was asked."""

    def __init__(self, where: str) -> None:
        self.where, self.asked = where, []
        self._reach("open")

    def write(self, row: dict[str, Any]) -> None:
        self._reach("write")

    def step(self) -> None:
        self._reach("step")

    def rewind(self, step: int) -> None:
        self._reach("rewind")

    def close(self) -> None:
        self._reach("close")

    def _reach(self, where: str) -> None:
        self.asked.append(where)
        if where == self.where:
            raise RuntimeError(f"no {where} today")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What titan has warned of, as it comes."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def use(sink: Guarded) -> None:
    """Do twice what a run does with a sink."""
    for step in (1, 2):
        sink.write({"step": step})
        sink.step()
        sink.rewind(step)
    sink.close()


@pytest.mark.parametrize("where", ["open", "write", "step", "rewind", "close"])
def test_a_sink_that_fails_is_left_out_with_one_warning_that_says_why(where: str, warnings: list[str]) -> None:
    """Wherever it raises, nothing reaches the run; the name and the reason are said once, and it is asked no more."""
    made: list[Breaking] = []

    def open_sink() -> Breaking:
        sink = Breaking.__new__(Breaking)
        made.append(sink)
        sink.__init__(where)
        return sink

    use(Guarded("the telegraph", open_sink))
    assert warnings == [f"the telegraph is left out from here on, training goes on: no {where} today"]
    assert made[0].asked.count(where) == (2 if where == "close" else 1)
    if where in ("write", "step", "rewind"):
        assert made[0].asked[-2:] == [where, "close"]  # so that it gives back what it holds


def test_a_sink_that_works_is_asked_everything(warnings: list[str]) -> None:
    """The guard adds and leaves out nothing."""
    sink = Breaking("nowhere")
    use(Guarded("x", lambda: sink))
    assert sink.asked == ["open", *["write", "step", "rewind"] * 2, "close"]
    assert warnings == []


def test_an_interrupt_is_not_taken_for_a_failure() -> None:
    """Ctrl-C ends a run also while a sink is at work."""

    def open_sink() -> Breaking:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded("x", open_sink)
