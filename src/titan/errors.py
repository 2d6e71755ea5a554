"""Every error that titan raises on purpose, and the exit code each one ends a process with.

A user's mistake never shows a traceback: the entry points print a `TitanError` as text and exit with its code.
Anything else that escapes is a defect, of titan or of the machine, and keeps its traceback.

    TitanError            1   anything below, and a rank that crashed
    ├── ConfigError       2   the config or the command is wrong; nothing was started or changed
    ├── CommandError      2   a command is wrong that has no config
    ├── DataError        65   bad data, met while running
    ├── WorkerLost        1   a process that reads data ahead has died; says of what
    ├── CheckpointError  66   no usable checkpoint
    ├── NonFiniteError   71   the loss or the gradient is not finite
    ├── StorageError     73   storage failed repeatedly
    ├── StepHung         74   a step took too long; names the rank that hangs
    ├── Stopped          75   told to stop, and did so in order; the same command goes on
    ├── PeerLost          1   another rank ended first; that one says why
    └── RanksFailed           a rank ended with an error; its exit code
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

INTERRUPTED = 130
"""The exit code after Ctrl-C, as a shell reports it."""
TERMINATED = 143
"""The exit code after SIGTERM, as a shell reports it."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a config: what is wrong, why it matters, and what to type instead."""

    what: str
    """The key, its value and the rule it breaks."""
    why: str = ""
    """The reason, with the numbers or the allowed values."""
    suggestion: str = ""
    """An override that can be pasted on the command line, or a short instruction."""

    def __str__(self) -> str:
        lines = [f"  {self.what}"]
        lines += [f"    {line}" for line in self.why.splitlines()]
        if self.suggestion:
            lines.append(f"    Try  {self.suggestion}")
        return "\n".join(lines)


class TitanError(Exception):
    """An error whose text is meant for the user."""

    exit_code = 1


class ConfigError(TitanError):
    """The composed config or the command line is wrong. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem(problems)] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        title = "1 problem in the composed config" if count == 1 else f"{count} problems in the composed config"
        super().__init__(title + "\n\n" + "\n\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)  # from a process that tokenises, or reads ahead


class CommandError(TitanError):
    """The command line is wrong, of a command that composes no config. Says what to type instead."""

    exit_code = 2


class DataError(TitanError):
    """The training data cannot be used: names the file and, where there is one, the line."""

    exit_code = 65


class WorkerLost(TitanError):
    """A process that reads data ahead for a rank has died, most often for want of memory."""


class CheckpointError(TitanError):
    """No checkpoint can be used, or the one asked for is missing or belongs to another run."""

    exit_code = 66


class NonFiniteError(TitanError):
    """The loss or the gradient norm is not finite, or above its limit. Raised before any weight moves."""

    exit_code = 71

    def __init__(self, message: str, loss: float, grad_norm: float) -> None:
        super().__init__(message)
        self.loss, self.grad_norm = loss, grad_norm


class StorageError(TitanError):
    """Writing to the run directory failed repeatedly."""

    exit_code = 73


class StepHung(TitanError):
    """A rank hangs, and all others wait for it.

    Args:
        ranks: Those to blame.
        message: What took too long, who hangs and where.
    """

    exit_code = 74

    def __init__(self, ranks: list[int], message: str) -> None:
        super().__init__(message)
        self.ranks = ranks


class Stopped(TitanError):
    """The run was told to stop and did, between two steps and on all ranks together.

    75 asks to be started again. Without a checkpoint there is nothing to go on from, so it is 143 then, or 130 after
    Ctrl-C.

    Args:
        signal_name: What told it.
        step: The last step.
        saved_step: The step of the newest checkpoint, which is an earlier one if saving failed; None without any.
    """

    exit_code = 75

    def __init__(self, signal_name: str, step: int, saved_step: int | None) -> None:
        saved = "and it is saved: the same command goes on from there"
        if saved_step is None:
            saved = "and nothing was saved"
        elif saved_step != step:
            saved = f"which could not be saved: the same command goes on from step {saved_step}"
        super().__init__(f"stopped by {signal_name} after step {step}, {saved}")
        self.signal_name, self.step, self.saved_step = signal_name, step, saved_step
        if saved_step is None:
            self.exit_code = INTERRUPTED if signal_name == "SIGINT" else TERMINATED


class PeerLost(TitanError):
    """Another rank ended while this one waited for it: a consequence, and never the first failure of a run."""


class RanksFailed(TitanError):
    """A rank that this process started ended with an error; takes over that rank's exit code."""

    def __init__(self, message: str, rank: int, exit_code: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code
