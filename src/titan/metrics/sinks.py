"""Where the numbers go: one small interface, metrics.jsonl and the console behind it, and others beside them.

One rank writes, and no sink can stop a run: each is in a `Guarded`, which takes whatever goes wrong in it for a reason
to go on without it, and says so once. metrics.jsonl is the record, from which the others could be made again.

The trap is time that goes back. A run that resumes, or goes back after a spike, hands over steps that it has handed
over before, so every sink has to know `rewind`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from titan.log import logger


class Sink(Protocol):
    """Takes the rows of a run."""

    def write(self, row: dict[str, Any]) -> None:
        """Take a row of metrics, or of a validation, as it stands in metrics.jsonl."""

    def step(self) -> None:
        """Take note that a step is done, logged or not."""

    def rewind(self, step: int) -> None:
        """Go back with the run: the rows beyond this step will come again."""

    def close(self) -> None:
        """Let go of everything; at the end of the run however it comes."""


class Guarded:
    """A sink that cannot stop a run: the first time it fails it says why, and from then on it is left out.

    Args:
        name: What it is called in the warning.
        open_sink: Makes it.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self.name = name
        self._sink: Sink | None = None
        self._try(lambda: setattr(self, "_sink", open_sink()))

    def write(self, row: dict[str, Any]) -> None:
        """Hand a row on."""
        if (sink := self._sink) is not None:
            self._try(lambda: sink.write(row))

    def step(self) -> None:
        """Hand on that a step is done."""
        if (sink := self._sink) is not None:
            self._try(sink.step)

    def rewind(self, step: int) -> None:
        """Hand on that the run goes back."""
        if (sink := self._sink) is not None:
            self._try(lambda: sink.rewind(step))

    def close(self) -> None:
        """Close it."""
        if (sink := self._sink) is not None:
            self._try(sink.close)
        self._sink = None

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            broken, self._sink = self._sink, None
            why = str(error).strip() or type(error).__name__
            logger.warning(f"{self.name} is left out from here on, training goes on: {why}")
            if broken is not None:
                with contextlib.suppress(Exception):  # it is broken; what it holds is to be given back all the same
                    broken.close()


class JsonLines:
    """metrics.jsonl: one object a line, flushed as it goes, no step twice.

    What cannot be written, because the disk is full for instance, is kept and written with the next line that can.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Open for appending; lines beyond the step that is resumed from are dropped, for they will come again."""
        self.path = path
        self._waiting = b""
        self.rewind(resumed_step)

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        self._waiting += json.dumps(row).encode() + b"\n"
        self._flush()

    def step(self) -> None:
        """Take note of a step; of no use to a file."""

    def rewind(self, step: int) -> None:
        """Drop the lines beyond a step that the run has gone back to, and one that a crash has cut short."""
        waiting = self._waiting.splitlines(keepends=True)
        self._waiting = b"".join(line for line in waiting if _step_of(line) <= step)
        try:
            self.path.touch()
            kept = 0
            with self.path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n") or _step_of(line) > step:
                        break
                    kept += len(line)
            os.truncate(self.path, kept)  # in place, which takes no room on a full disk
        except OSError as error:
            logger.warning(f"{self.path.name} cannot be changed: {error.strerror}")

    def close(self) -> None:
        """Write what is still waiting, if that can be done."""
        self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        try:
            with self.path.open("ab", buffering=0) as file:  # a buffer would be written twice after a full disk
                self._waiting = self._waiting[os.write(file.fileno(), self._waiting) :]
        except OSError as error:
            logger.warning(f"{self.path.name} cannot be written now: {error.strerror}")


class Console:
    """One line a logged step, and on a terminal a progress bar below them."""

    def __init__(self, total_steps: int, first_step: int, tokens_to_bytes: Callable[[], tuple[int, int]]) -> None:
        self.total_steps = total_steps
        self._tokens_to_bytes = tokens_to_bytes
        self._bar = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False)

    def step(self) -> None:
        """Advance the progress bar."""
        if self._bar is not None:
            self._bar.update()

    def rewind(self, step: int) -> None:
        """Take the progress bar back to a step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, row: dict[str, Any]) -> None:
        """Show a row of metrics."""
        if "validation_loss" in row:
            logger.info(format_validation(row, self.total_steps))
        else:
            logger.info(format_row(row, self.total_steps, *self._tokens_to_bytes()))

    def close(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._bar.close()


def format_row(row: dict[str, Any], total_steps: int, tokens: int, text_bytes: int) -> str:
    """Return a row of metrics as a line with fixed columns."""
    from titan.metrics.meter import bits_per_byte

    left = (total_steps - row["step"]) * row["step_seconds"]
    columns = [
        f"step {row['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {row['loss']:.4f}",
        f"bits/byte {bits_per_byte(row['loss'], tokens, text_bytes):.3f}",
        f"grad {row['grad_norm']:.2f}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens_per_second']:,.0f} tok/s",
    ]
    if row["mfu"] is not None:
        columns.append(f"mfu {row['mfu']:.1%}")
    columns.append(f"peak {row['memory_gib']:.2f} GiB")
    if row["step"] < total_steps:
        columns.append(f"{format_seconds(left)} left")
    return "  ".join(columns)


def format_validation(row: dict[str, Any], total_steps: int) -> str:
    """Return a validation's row as a line with fixed columns."""

    def shown(name: str, digits: int) -> str:
        value = row[f"validation_{name}"]
        return "not finite" if value is None else f"{value:.{digits}f}"

    return "  ".join(
        [
            f"step {row['step']:>{len(str(total_steps))}}/{total_steps}",
            f"validation loss {shown('loss', 4)}",
            f"bits/byte {shown('bits_per_byte', 3)}",
            f"perplexity {shown('perplexity', 2)}",
            f"{row['validation_tokens']:,} tokens",
            f"in {row['validation_seconds']:.2f} s",
        ]
    )


def format_seconds(seconds: float) -> str:
    """Return a duration as 0:07, 12:34 or 3:04:05."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def section_of(name: str) -> str:
    """Return under which heading a number of a row is shown: train, speed or validation."""
    if name.startswith("validation_"):
        return "validation"
    return "train" if name in ("loss", "grad_norm", "learning_rate", "tokens") else "speed"


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a crash cut short
