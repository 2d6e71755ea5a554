"""Watches for graphs that are compiled anew in the middle of training, which costs seconds that nobody notices."""

from __future__ import annotations

from torch._dynamo.utils import guard_failures

from titan.log import logger
from titan.parallel.compile import count_graphs


class Compilations:
    """Counts what a run's steps compile after the first, which compiles all that they need.

    Validations compile graphs of their own, without a backward pass, and are not counted.
    """

    def __init__(self) -> None:
        self.after_first = 0
        """Graphs that were compiled after this process's first step."""
        self._before: int | None = None
        self._is_first = True
        self._reasons = 0

    def begin(self) -> None:
        """A step begins."""
        self._before = count_graphs()

    def end(self, step: int) -> None:
        """A step is done; says so where it has compiled anew."""
        assert self._before is not None, "begun"
        count = count_graphs() - self._before
        reasons = [reason for found in guard_failures.values() for reason in found]
        if count and not self._is_first:
            self.after_first += count
            why = f": {reasons[-1].strip().splitlines()[0]}" if len(reasons) > self._reasons else ""
            logger.warning(f"step {step} compiled {count} graph{'s' * (count != 1)} anew{why}")
        self._is_first, self._reasons = False, len(reasons)
