"""The loss on held-out text: every so many steps and after the last, on the mesh that trains, without training on it.

Nothing that training depends on is touched: no gradient, no generator, no state of FSDP's or of a pipeline's schedule.
So a run that validates is the same run, to the bit, as one that does not.

A validation comes after the step's checkpoint, so a kill in it costs no step. Which validations are done is what
metrics.jsonl says: a run that goes on at a step whose validation is due, and is not in there, does it first. Each is
done once, wherever the run was stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from titan.checkpoint.first_rank import on_first_rank
from titan.config.schema import RecordFormat
from titan.data.batch import IGNORED_LABEL
from titan.data.held_out import HeldOutRows, InOrder
from titan.data.loader import Share, Step, build_loader
from titan.errors import DataError
from titan.log import logger
from titan.metrics.meter import Meter, validation_row
from titan.metrics.sinks import Sink
from titan.parallel.fsdp import forget_forward
from titan.trainer.build import Trainer
from titan.trainer.samples import Samples
from titan.trainer.watchdog import Watchdog

_ROUNDS_AT_ONCE = 4
"""Micro-batches that go through a pipeline without a gap, and between two looks at whether the run is to stop."""


@dataclass(frozen=True)
class Validation:
    """What a validation found, the same on every rank."""

    loss: float
    """Mean cross-entropy in nats a token."""
    tokens: int
    """How many were predicted."""


class Validator:
    """The validations of one run.

    Args:
        trainer: Whose weights are looked at, on its held-out rows; without any nothing is ever due.
        meter: Counts the seconds that training waits.
        sinks: Take the results; none on all ranks but one.
        watchdog: Gives a validation the time of a save.
        end_if_told: Called by all ranks now and then; raises where the run is to stop.
    """

    def __init__(
        self,
        trainer: Trainer,
        meter: Meter,
        sinks: Sequence[Sink],
        watchdog: Watchdog,
        end_if_told: Callable[[], None],
    ) -> None:
        self.trainer, self.meter, self.sinks = trainer, meter, sinks
        self.watchdog, self.end_if_told = watchdog, end_if_told
        step = trainer.state.step
        self._done = step if self._is_recorded(step) else step - 1
        self.samples = Samples(trainer)

    def rewind(self, step: int) -> None:
        """Go back with the run to a step that it had gone on from, so its own validation is done."""
        self._done = min(self._done, step)
        self.samples.rewind(step)

    def close(self) -> None:
        """Write what is still waiting, if that can be done."""
        self.samples.close()

    def is_due(self, step: int) -> bool:
        """Return whether the weights of a step are validated."""
        config = self.trainer.config
        if self.trainer.held_out is None or step == 0:
            return False
        return step % config.validation.interval == 0 or step == config.training.steps

    def run_if_due(self) -> None:
        """Validate the step in hand, if its turn has come and it is not done.

        Raises:
            DataError: If no token of the rows counts.
        """
        trainer, step = self.trainer, self.trainer.state.step
        if trainer.held_out is None or step <= self._done or not self.is_due(step):
            return
        began = time.perf_counter()
        with self.watchdog.extended():
            found = validate(trainer, trainer.held_out, self.end_if_told)
        seconds = time.perf_counter() - began
        with self.watchdog.extended():
            self.samples.take(step, self.end_if_told)
        self.meter.validation_seconds += time.perf_counter() - began
        self._done = step
        if not math.isfinite(found.loss) and dist.get_rank() == 0:
            logger.warning(f"step {step}: the validation loss is {found.loss}")
        settings = trainer.config.validation.data
        is_learned_whole = settings is not None and settings.format is RecordFormat.text
        text_bytes = trainer.held_out.text_bytes(found.tokens, is_learned_whole)
        for sink in self.sinks:
            sink.write(validation_row(step, found.loss, found.tokens, text_bytes, seconds))

    def _is_recorded(self, step: int) -> bool:
        """Whether metrics.jsonl has this step's validation, by rank 0's word."""
        if self.trainer.held_out is None or step == 0:
            return False

        def look() -> bool:
            lines = self.trainer.directory.metrics.read_text(errors="replace").splitlines()
            rows = [json.loads(line) for line in lines[-2:]]  # whole lines up to this step: `JsonLines` has seen to it
            return any(row["step"] == step and "validation_loss" in row for row in rows)

        return on_first_rank(look)


def validate(trainer: Trainer, rows: HeldOutRows, end_if_told: Callable[[], None] = lambda: None) -> Validation:
    """Return the mean loss over all tokens that count in some rows, with one denominator for all ranks.

    Args:
        trainer: Whose weights are looked at.
        rows: Each is looked at once.
        end_if_told: Called on all ranks alike, between some rows and the next; may raise.

    Raises:
        DataError: If no token counts.
    """
    mesh, config, device = trainer.mesh, trainer.config, trainer.device
    local_batch_size = config.training.local_batch_size
    share = Share(local_batch_size * mesh.data_ranks, local_batch_size, mesh.data_rank, mesh.data_ranks)
    rounds = -(-len(rows) // share.global_batch_size)
    loader = build_loader(
        rows, InOrder(share.global_batch_size), share, 0, 0, rounds, config.data.num_workers, config.data.prefetch
    )
    loss, tokens = torch.zeros(2, dtype=torch.float64, device=device)
    try:
        for some in _batched(loader, _ROUNDS_AT_ONCE):
            end_if_told()
            batches = [batch for each in some for batch in each.prepared_for(device, trainer.positions).batches]
            loss += trainer.evaluate(batches)
            tokens += torch.stack([(batch.labels != IGNORED_LABEL).sum() for batch in batches]).sum()
    finally:
        loader.close()
        for part in trainer.parts:
            forget_forward(part)
    if mesh.stage_group is not None:  # only the last stage knows it
        dist.all_reduce(loss, group=mesh.stage_group)
    sums = torch.stack((loss, tokens))
    dist.all_reduce(sums, group=mesh.loss_group)
    dist.broadcast(sums, 0)  # tensor-parallel ranks and replicas have each computed it by themselves
    total, count = sums.tolist()
    if not count:
        raise DataError(
            "validation.data has no token to predict in the rows that are looked at\n"
            "  Try  validation.rows=-1   or another validation.data"
        )
    return Validation(total / count, int(count))


def _batched(rounds: Iterator[Step], size: int) -> Iterator[list[Step]]:
    while some := list(itertools.islice(rounds, size)):
        yield some
