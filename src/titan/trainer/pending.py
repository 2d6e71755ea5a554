"""Steps that the host has handed out and knows nothing of yet, and what the ranks tell each other meanwhile.

On a GPU the host is ahead of the device. Where it waited after every step to see the loss, the device would stand
still until the next step's work has come. So what a step gave is looked at when it is there, a step or two later, and
the host waits only for steps whose numbers or weights are needed at once: those that are logged, saved or validated.

All ranks have to find a bad step at the same moment, or one would go back while another goes on. So after every step
each says up to which step its device has come, in the exchange that they make anyway, and all look at what all have.
The exchange goes through the CPUs and is heard after the next step, so it waits for no device either.

A bad step that is found late has changed nothing, and steps after it are what they would have been: where batches are
skipped they were done on the same weights, and else they have changed nothing either (`titan.trainer.step`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from titan.trainer.build import Trainer
from titan.trainer.saving import Wishes
from titan.trainer.state import TrainState
from titan.trainer.step import PendingResult


@dataclass(frozen=True)
class TakenStep:
    """A step that was handed out."""

    before: TrainState
    """Where the run stood before it."""
    learning_rate: float
    result: PendingResult

    @property
    def number(self) -> int:
        """Counted from 1."""
        return self.before.step + 1


class PendingSteps:
    """The steps that were not looked at yet, in their order."""

    def __init__(self) -> None:
        self._steps: deque[TakenStep] = deque()

    def add(self, taken: TakenStep) -> None:
        """Add the step that comes next."""
        self._steps.append(taken)

    def take(self, last: int) -> Iterator[TakenStep]:
        """Take out the steps up to one."""
        while self._steps and self._steps[0].number <= last:
            yield self._steps.popleft()

    def before_first_away(self, step: int) -> int:
        """Return the step up to which all are here, on this rank; that is `step` where none is away."""
        return next((taken.number - 1 for taken in self._steps if not taken.result.is_here()), step)

    def forget(self) -> None:
        """Drop them all: the run has gone back."""
        self._steps.clear()


_UNKNOWN = Wishes(is_saving=1)
"""Nobody waits for a save that may still go on."""


@dataclass(frozen=True)
class News:
    """The largest of all ranks' values, of the exchange of the step before."""

    told: int = 0
    """The signal that has told one to stop, or 0."""
    wishes: Wishes = _UNKNOWN
    here: int = 0
    """The step up to which every rank has all values."""


class Exchange:
    """What the ranks tell each other after a step, and hear after the next.

    Args:
        trainer: All its ranks make one together.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._group: dist.ProcessGroup | None = None
        if trainer.defers and dist.get_world_size() > 1:
            seconds = trainer.config.cluster.timeout_seconds
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
            assert isinstance(group, dist.ProcessGroup), "of all ranks"
            self._group = group
        self._values: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def tell(self, told: int, wishes: Wishes, here: int) -> None:
        """Begin an exchange; see `News`."""
        self._values = torch.tensor([told, wishes.is_due, wishes.is_saving, -here])
        if self._group is not None:
            self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def hear(self) -> News:
        """End the exchange that was begun, if one was."""
        if self._values is None:
            return News()
        if self._work is not None:
            self._work.wait()
        told, is_due, is_saving, behind = self._values.tolist()
        self._values = self._work = None
        return News(told, Wishes(is_due, is_saving), -behind)


def agree(trainer: Trainer, told: int, wishes: Wishes) -> tuple[int, Wishes]:
    """Return the largest of all ranks' values now: the signal that told one to stop, or 0, and what concerns saving.

    One of the ranks may have been told before, or instead of, the others. Waits for the device.
    """
    if dist.get_world_size() == 1:
        return told, wishes
    values = torch.tensor([told, wishes.is_due, wishes.is_saving], device=trainer.device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    told, is_due, is_saving = values.tolist()
    return told, Wishes(is_due, is_saving)
