"""What a person would notice on the console if they watched it, said once in a while, with what to do about it.

Only what matters and can be changed: waiting for data, a run that has become slow, memory that is nearly full, a loss
that jumps. A loss that is no number has an answer of its own (`titan.trainer.spikes`), and so has a graph that is
compiled anew. Rates are judged over half a minute of training, so that one slow step is no news.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from titan.config.schema import ActivationCheckpointMode, TitanConfig
from titan.log import logger

_WINDOW_SECONDS = 30.0
"""Rates are judged over so much training."""
_QUIET_SECONDS = 1800.0
"""The same is not said again before."""
_DATA_SHARE = 0.1
_SLOW_SHARE = 0.75
_MEMORY_SHARE = 0.95
_WINDOWS = 5
"""So many are known before one is called slow."""
_LOSSES = 20
"""So many logged losses are looked back at."""
_LEAST_JUMP = 0.2
"""In nats: smaller ones are noise, however smooth the curve was."""
_DEVIATIONS = 8.0


class Advice:
    """The advice to one run.

    Args:
        config: Says what could be changed.
        memory_gib: Of the device; None where it is not the rank's alone.
        clock: Returns seconds.
    """

    def __init__(
        self, config: TitanConfig, memory_gib: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config, self.memory_gib = config, memory_gib
        self._clock = clock
        self._told: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._rates: list[float] = []
        self._last_step: int | None = None
        self._start_over()

    def write(self, row: dict[str, Any]) -> None:
        """Look at a row."""
        if "validation_loss" in row:
            return
        self._look_at_loss(row)
        self._look_at_memory(row)
        before, self._last_step = self._last_step, row["step"]
        if before is None:  # the first row has compiling and warming up in it
            return
        steps = row["step"] - before
        self._seconds += steps * row["step_seconds"]
        self._data_seconds += row["data_seconds"]
        self._tokens += steps * row["step_seconds"] * row["tokens_per_second"]
        if self._seconds >= _WINDOW_SECONDS:
            self._look_at_data(row)
            self._look_at_rate(row)
            self._start_over()

    def step(self) -> None:
        """Take note of a step; of no use here."""

    def rewind(self, step: int) -> None:
        """Go back with the run."""
        self._losses.clear()
        self._last_step = None
        self._start_over()

    def close(self) -> None:
        """Nothing is left to say."""

    def _start_over(self) -> None:
        self._seconds = self._data_seconds = self._tokens = 0.0

    def _say(self, what: str, text: str) -> None:
        now = self._clock()
        if now - self._told.get(what, -math.inf) >= _QUIET_SECONDS:
            self._told[what] = now
            logger.warning(text)

    def _look_at_data(self, row: dict[str, Any]) -> None:
        share, workers = self._data_seconds / self._seconds, self.config.data.num_workers
        if share > _DATA_SHARE:
            way = f"data.num_workers={workers + 2}   (is {workers})"
            if self.config.data.streaming:
                way += "   or tokenise once, before training: data.streaming=false"
            self._say("data", f"step {row['step']}: {share:.0%} of the time goes into waiting for data; try  {way}")

    def _look_at_rate(self, row: dict[str, Any]) -> None:
        rate, usual = self._tokens / self._seconds, statistics.median(self._rates or [0.0])
        if len(self._rates) >= _WINDOWS and rate < _SLOW_SHARE * usual:
            self._say(
                "rate",
                f"step {row['step']}: {rate:,.0f} tok/s, where this run has had {usual:,.0f}: something else uses the "
                "machine, a device is throttled, or storage is slow; the same command with "
                f"profiling=trace profiling.start_step={row['step'] + 10} says where the time goes",
            )
        self._rates.append(rate)

    def _look_at_memory(self, row: dict[str, Any]) -> None:
        if self.memory_gib is None or row["memory_gib"] <= _MEMORY_SHARE * self.memory_gib:
            return
        training, recomputes = self.config.training, self.config.activation_checkpoint.mode
        ways = ["activation_checkpoint=selective"] if recomputes is ActivationCheckpointMode.none else []
        if training.local_batch_size > 1:
            ways.append(f"training.local_batch_size={training.local_batch_size // 2}")
        self._say(
            "memory",
            f"step {row['step']}: {row['memory_gib']:.1f} of the device's {self.memory_gib:.1f} GiB are taken, so a "
            f"little more ends the run; try  {'   or  '.join(ways or ['more parallelism.dp_shard'])}",
        )

    def _look_at_loss(self, row: dict[str, Any]) -> None:
        loss, before = row["loss"], list(self._losses)
        self._losses.append(loss)
        if len(before) < _LOSSES:
            return
        usual = statistics.median(before)
        deviation = statistics.median(abs(each - usual) for each in before)
        if loss - usual > max(_LEAST_JUMP, _DEVIATIONS * deviation):
            norm = row["grad_norm"]
            self._say(
                "loss",
                f"step {row['step']}: the loss jumped to {loss:.3f}, from about {usual:.3f}, at a gradient norm of "
                f"{norm:.2f}; if it does not come back: a lower optimizer.lr, more lr_scheduler.warmup_steps, or "
                f"fault_tolerance.on_spike=rollback fault_tolerance.spike_grad_norm={max(1.0, norm / 2):.0f}",
            )
