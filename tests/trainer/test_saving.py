"""The account of saving: every second that training waits is counted, and counted once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from titan.checkpoint.manifest import Manifest
from titan.checkpoint.store import Saved
from titan.errors import StorageError
from titan.trainer import saving
from titan.trainer.loop import build_meter
from titan.trainer.saving import Saver, Wishes

from .conftest import Runs


class SlowStore:
    """A store whose every call takes as long as it says, by a clock of its own."""

    is_first, is_saving = True, False

    def __init__(self, folder: Any) -> None:
        self.folder, self.now, self.pending = folder, 0.0, None

    def save(self, manifest: Manifest, state: object, config: str, in_background: bool) -> None:
        self.now += 3.0
        self.pending = Saved(manifest, self.folder / "step_00000000")

    def result(self) -> Saved | StorageError | None:
        outcome, self.pending = self.pending, None
        self.now += 10.0 if outcome is not None else 0.0
        return outcome

    def wait_for_copies(self) -> None:
        self.now += 0.5


@pytest.mark.parametrize("mode", ["sync", "async", "async_pinned"])
def test_every_second_of_waiting_is_counted_once(runs: Runs, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics and events agree, also where a save begins while the one before is still in hand."""
    trainer = runs.build(runs.config("run", f"checkpoint={mode}"))
    store = SlowStore(trainer.directory.checkpoints)
    trainer.store = store  # type: ignore[assignment]
    meter = build_meter(trainer)
    saver = Saver(trainer, meter)
    monkeypatch.setattr(saving, "time", SimpleNamespace(perf_counter=lambda: store.now, monotonic=lambda: store.now))
    for step in (2, 4):
        trainer.state.step = step
        saver.after_step(Wishes(is_saving=1))  # another rank's save goes on, so this one does not look for its end
        saver.wait_for_copies()
    saver.settle()
    assert meter.checkpoint_seconds == store.now == 2 * (3.0 + 10.0 + 0.5)
    waited = [event["waited_seconds"] for event in trainer.directory.read_events("save")]
    # what follows a synchronous save's account belongs to no save
    assert waited == ([13.0, 13.5] if mode == "sync" else [13.5, 13.5])
