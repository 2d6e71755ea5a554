"""When a run saves, and what it does when that fails: it goes on, and tries again.

The ranks decide together, because saving takes them all. What only one of them knows (rank 0's clock, whether a
background save has ended everywhere) goes into the exchange that every step makes anyway, see `trainer.pending`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan.checkpoint.manifest import Manifest, versions
from titan.checkpoint.state import CURSORS, optimizer_state, rng_name, rng_state, weights_state
from titan.checkpoint.store import CheckpointStore, Saved
from titan.config.load import config_text
from titan.config.schema import CheckpointConfig, CheckpointContent, CheckpointMode
from titan.errors import StorageError
from titan.log import logger
from titan.metrics.meter import Meter
from titan.parallel.apply import DTYPES
from titan.run_directory import utc_now
from titan.trainer.build import Trainer

_LAST_TRIES = 2
"""For a run that is told to stop: its time is short."""


@dataclass(frozen=True)
class Wishes:
    """What one rank knows; the ranks take the largest of each."""

    is_due: int = 0
    """Whether it is time, by rank 0's clock."""
    is_saving: int = 0
    """Whether a save goes on in the background."""


class Saver:
    """The saving of one run.

    Args:
        trainer: Whose state is saved, to its store; without one nothing is ever due.
        meter: Counts the seconds that training waits.
    """

    def __init__(self, trainer: Trainer, meter: Meter) -> None:
        self.trainer, self.meter = trainer, meter
        self.settings: CheckpointConfig = trainer.config.checkpoint
        self.store = trainer.store
        self.saved_step = trainer.resumed_step
        self.failures = 0
        self._waited = 0.0
        self._last = time.monotonic()
        self._retry_at: float | None = None

    def wishes(self) -> Wishes:
        """Return what this rank knows."""
        if self.store is None:
            return Wishes()
        now, minutes = time.monotonic(), self.settings.interval_minutes
        by_clock = minutes > 0 and now - self._last >= 60 * minutes
        by_retry = self._retry_at is not None and now >= self._retry_at
        return Wishes(int(self.store.is_first and (by_clock or by_retry)), int(self.store.is_saving))

    def is_due(self, step: int) -> bool:
        """Return whether a step is saved in its turn."""
        # a retry has a time of its own
        return self.store is not None and step % self.settings.interval == 0 and self._retry_at is None

    def after_step(self, wishes: Wishes) -> None:
        """Save if it is time, and see to a save that has ended.

        Args:
            wishes: The largest of all ranks'.

        Raises:
            StorageError: After `checkpoint.max_failures` in a row.
        """
        if self.store is None:
            return
        if not wishes.is_saving:
            self.settle()
        step = self.trainer.state.step
        if step < self.trainer.config.training.steps and (wishes.is_due or self.is_due(step)):
            self._save(self.store)  # the last step has a save of its own

    def save_now(self) -> int | None:
        """Save and wait for it; returns the step of the newest checkpoint, which is an older one if all tries fail.

        Raises:
            StorageError: After `checkpoint.max_failures` in a row.
        """
        for rest in reversed(range(_LAST_TRIES)):
            if self.try_to_save():
                break
            if rest:
                time.sleep(min(1.0, self.settings.retry_seconds))
        return self.saved_step

    def settle(self) -> None:
        """Wait for the save in hand, if there is one, and write down what came of it.

        Raises:
            StorageError: After `checkpoint.max_failures` in a row.
        """
        if self.store is None:
            return
        began = time.perf_counter()
        outcome = self.store.result()
        if outcome is None:
            return
        self._count(time.perf_counter() - began)
        waited, self._waited = self._waited, 0.0
        if isinstance(outcome, Saved):
            self._succeeded(outcome, waited)
        else:
            self._failed(outcome, waited)

    def try_to_save(self, content: CheckpointContent = CheckpointContent.all) -> bool:
        """Save the step in hand, if it is not saved, and wait for it; returns whether it is there now.

        Args:
            content: What to save of it.

        Raises:
            StorageError: After `checkpoint.max_failures` in a row.
        """
        if self.store is None:
            return True
        self.settle()
        if self.saved_step != self.trainer.state.step:
            self._save(self.store, content, waits=True)
        return self.saved_step == self.trainer.state.step

    def wait_for_copies(self) -> None:
        """Return when the weights may move; counts the time."""
        if self.store is not None:
            began = time.perf_counter()
            self.store.wait_for_copies()
            self._count(time.perf_counter() - began)

    def close(self) -> None:
        """Let a save in the background end, at the end of the run however it comes; never raises."""
        if self.store is None:
            return
        self.store.close()
        try:
            self.settle()
        except Exception as error:
            logger.warning(f"the last save did not end: {error}")

    def _save(
        self, store: CheckpointStore, content: CheckpointContent = CheckpointContent.all, waits: bool = False
    ) -> None:
        self.settle()
        began = time.perf_counter()  # after what has its own account
        self._last, self._retry_at = time.monotonic(), None
        in_background = not waits and self.settings.mode is not CheckpointMode.sync
        store.save(self._manifest(content), self._state(content), config_text(self.trainer.config), in_background)
        self._count(time.perf_counter() - began)
        if not in_background:
            self.settle()

    def _succeeded(self, saved: Saved, waited: float) -> None:
        self.failures, self.saved_step = 0, saved.manifest.step
        if dist.get_rank() == 0:
            name = saved.path.relative_to(self.trainer.directory.path)
            logger.info(f"saved {name} in {saved.seconds:.2f} s, training waited {waited:.2f} s")
            self.trainer.directory.append_event(
                "save",
                step=saved.manifest.step,
                seconds=round(saved.seconds, 3),
                waited_seconds=round(waited, 3),
                bytes=saved.manifest.bytes,
            )

    def _failed(self, error: StorageError, waited: float) -> None:
        self.failures += 1
        self._retry_at = time.monotonic() + self.settings.retry_seconds
        most, kept = self.settings.max_failures, f"; step {self.saved_step} is the newest" * bool(self.saved_step)
        text = f"a checkpoint could not be saved ({self.failures} of {most} times in a row): {error}{kept}"
        if dist.get_rank() == 0:
            self.trainer.directory.append_event(
                "failed save", why=str(error), in_a_row=self.failures, waited_seconds=round(waited, 3)
            )
        if self.failures >= most:
            raise StorageError(text)
        if dist.get_rank() == 0:
            logger.warning(f"{text}; training goes on, next try in {self.settings.retry_seconds:.0f} s")

    def _count(self, seconds: float) -> None:
        self._waited += seconds
        self.meter.checkpoint_seconds += seconds

    def _manifest(self, content: CheckpointContent) -> Manifest:
        trainer = self.trainer
        return Manifest(
            step=trainer.state.step,
            tokens=trainer.state.tokens,
            content=content.name,
            run=trainer.run_identity,
            files={},
            mesh=trainer.mesh.degrees,
            data=describe_data(trainer),
            versions=versions(),
            time=utc_now(),
        )

    def _state(self, content: CheckpointContent) -> dict[str, Tensor]:
        trainer = self.trainer
        weights = weights_state(trainer.parameters)
        if content is CheckpointContent.weights:
            dtype = DTYPES[self.settings.last_dtype]
            return {name: tensor.to(dtype) for name, tensor in weights.items()}
        state = weights | optimizer_state(trainer.parameters, trainer.optimizer)
        state |= data_state(trainer)
        return state | {rng_name(dist.get_rank()): rng_state()}


def describe_data(trainer: Trainer) -> dict[str, Any]:
    """Return what says which data a run is trained on and where in it the next step begins."""
    return {**trainer.data.identity, "rows": trainer.state.step * trainer.config.training.global_batch_size}


def data_state(trainer: Trainer) -> dict[str, Tensor]:
    """Return where the streams of all ranks stand, the same on every rank; nothing where the data needs no state.

    All ranks take part, for each knows its own streams only.
    """
    if trainer.data.cursors is None:
        return {}
    cursors = torch.from_numpy(trainer.data.cursors).to(trainer.device)
    if dist.get_world_size() > 1:
        cursors = cursors.clone()
        dist.all_reduce(cursors, op=dist.ReduceOp.MAX)  # -1 where a rank does not know
    return {CURSORS: cursors.cpu()}
