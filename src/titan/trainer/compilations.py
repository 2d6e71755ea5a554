"""Watches for graphs that are compiled anew in the middle of training, which costs seconds that nobody notices."""

from __future__ import annotations

from torch._dynamo.utils import guard_failures

from titan.log import logger
from titan.parallel.compile import count_graphs


class Compilations:
    """Counts what a run's steps compile after the first, which compiles all that they need; nothing where none does.

    Validations compile graphs of their own, without a backward pass, and are not counted.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self.after_first = 0
        """Graphs that were compiled after this process's first step."""
        self._is_first = True
        self._before = 0
        self._told: dict[object, int] = {}

    def begin(self) -> None:
        """A step begins."""
        if self.is_on:
            self._before = count_graphs()
            self._told = {code: len(reasons) for code, reasons in guard_failures.items()}

    def end(self, step: int) -> None:
        """A step is done; says so where it has compiled anew."""
        if not self.is_on:
            return
        count = count_graphs() - self._before
        if count and not self._is_first:
            self.after_first += count
            new = [why for code, reasons in guard_failures.items() for why in reasons[self._told.get(code, 0) :]]
            why = f": {new[0].strip().splitlines()[0]}" if new else ""
            logger.warning(f"step {step} compiled {count} graph{'s' * (count != 1)} anew{why}")
        self._is_first = False

    def describe(self) -> str:
        """Return what to say of it behind the run's last line."""
        return f", {self.after_first} graphs compiled after the first step" if self.is_on else ""
