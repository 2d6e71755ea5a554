"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Counts that a checkpoint keeps."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen by all ranks together, padding included."""
