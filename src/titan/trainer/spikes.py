"""Spikes: a loss or a gradient that is no number, or too large, and what a run does about it.

The step is found out before any weight has moved, on all ranks alike, for loss and norm are global: by the device,
which leaves its update out. The host may learn of it some steps later (`titan.trainer.pending`). The run then stops; or
it leaves the batch out and goes on; or it goes back to the last checkpoint and leaves out every batch from there to
this one, which is what one does against instability that had been building up.

What was left out is written to a ledger in the run directory before the run goes on. A run that resumes reads it first,
so it leaves out the same batches and is the same run.

Source:
    PaLM, https://arxiv.org/abs/2204.02311, section 5.1 (go back and skip batches).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from titan.checkpoint.first_rank import on_first_rank
from titan.config.schema import CheckpointContent, FaultToleranceConfig, OnSpike
from titan.errors import NonFiniteError, StorageError
from titan.log import logger
from titan.trainer.build import Trainer
from titan.trainer.resume import load_checkpoint
from titan.trainer.saving import Saver
from titan.trainer.state import TrainState


class Ledger:
    """The steps that a run leaves out.

    Args:
        trainer: Whose run directory holds the ledger.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.settings: FaultToleranceConfig = trainer.config.fault_tolerance
        rows = on_first_rank(trainer.directory.read_ledger)
        self.spikes = len(rows)
        self.steps = {step for row in rows for step in range(row["first_step"], row["last_step"] + 1)}
        self.spikes_left = self._count_left()
        """On the device: how many bad steps the run gets over without being stopped or going back, see `train_step`."""

    def answer(self, spike: NonFiniteError, before: TrainState, saver: Saver) -> bool:
        """Do what the config says about a step, which may lie some steps back.

        Args:
            spike: What is wrong with it.
            before: Where the run stood before it.
            saver: Of the run.

        Returns:
            Whether the run has gone back to a checkpoint; else only this step is left out.

        Raises:
            NonFiniteError: If the run is to stop; its state is that before the step.
            StorageError: If the ledger cannot be written.
        """
        trainer, action = self.trainer, self.settings.on_spike
        step = before.step + 1
        if action is OnSpike.stop:
            raise self._stop(spike, before, "")
        if self.spikes >= self.settings.max_spikes:
            raise self._stop(spike, before, f"; there were {self.spikes} before: fault_tolerance.max_spikes")
        first = step
        if action is OnSpike.rollback:
            first = self._go_back(spike, before, saver) + 1
        else:
            trainer.state.tokens -= trainer.tokens_per_step
        self.spikes += 1
        self.steps |= set(range(first, step + 1))
        self._write(spike, first, step)
        if action is OnSpike.rollback:
            self.spikes_left = self._count_left()
        return action is OnSpike.rollback

    def _count_left(self) -> Tensor:
        left = self.settings.max_spikes - self.spikes if self.settings.on_spike is OnSpike.skip else 0
        return torch.tensor(float(max(0, left)), device=self.trainer.device)

    def _go_back(self, spike: NonFiniteError, before: TrainState, saver: Saver) -> int:
        """Load the last checkpoint; returns its step."""
        saver.settle()
        store = self.trainer.store
        saved = store.find(self.trainer.run_identity) if store is not None else None
        if store is None or saved is None:
            raise self._stop(spike, before, "; there is no checkpoint to go back to")
        load_checkpoint(self.trainer, store, saved.path, saved.manifest, CheckpointContent.all)
        saver.saved_step = saved.manifest.step  # not one that turned out to be damaged
        return saved.manifest.step

    def _write(self, spike: NonFiniteError, first: int, last: int) -> None:
        row = {"first_step": first, "last_step": last, "loss": str(spike.loss), "grad_norm": str(spike.grad_norm)}
        try:
            on_first_rank(lambda: self.trainer.directory.append_ledger(row))
        except StorageError as error:  # a run that resumed would not know what was left out
            raise StorageError(f"{self.trainer.directory.ledger} cannot be written: {error}") from None
        if dist.get_rank() != 0:
            return
        self.trainer.directory.append_event("spike", action=self.settings.on_spike.name, step=last, **row)
        left_out = f"step {last} is" if first == last else f"steps {first} to {last} are"
        logger.warning(f"step {last}: {spike}; {left_out} left out")

    def _stop(self, spike: NonFiniteError, before: TrainState, why: str) -> NonFiniteError:
        self.trainer.state, step = before, before.step + 1
        if dist.get_rank() == 0:
            values = {"loss": str(spike.loss), "grad_norm": str(spike.grad_norm)}
            self.trainer.directory.append_event("spike", action="stop", step=step, **values)
        return NonFiniteError(f"step {step}: {spike}{why}", spike.loss, spike.grad_norm)
