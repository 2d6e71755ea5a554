"""Rates between two logged steps. Everything shown was measured in this run, and says in its name what it is."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from titan.run_directory import utc_now


@dataclass
class Meter:
    """Adds up what happens between two logged steps.

    Args:
        tokens_per_step: Tokens of a global batch.
        flops_per_token: See `titan.models.flops`.
        devices: The world size.
        peak_tflops: A device's peak, or None where it is not known.
    """

    tokens_per_step: int
    flops_per_token: int
    devices: int
    peak_tflops: float | None
    steps: int = 0
    data_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    validation_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def row(self, step: int, loss: float, grad_norm: float, learning_rate: float, memory_gib: float) -> dict[str, Any]:
        """Return the line for metrics.jsonl, and start over.

        `step_seconds` is the mean over the steps since the last row, without what saving checkpoints and validations
        took; `data_seconds` and `checkpoint_seconds` are sums over them. `mfu` is a share of the peak, from 0 to 1; a
        value above 1 would mean that the peak is wrong, and is not shown.
        """
        elapsed = time.perf_counter() - self.started - self.checkpoint_seconds - self.validation_seconds
        tokens_per_second = self.steps * self.tokens_per_step / elapsed
        tflops = tokens_per_second * self.flops_per_token / self.devices / 1e12
        mfu = tflops / self.peak_tflops if self.peak_tflops else None
        row = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / self.devices,
            "tflops_per_device": tflops,
            "mfu": mfu if mfu is not None and mfu <= 1 else None,
            "memory_gib": memory_gib,
            "step_seconds": elapsed / max(1, self.steps),
            "data_seconds": self.data_seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
            "time": utc_now(),
        }
        self.start_over()
        return row

    def start_over(self) -> None:
        """Forget what was added up."""
        self.steps = 0
        self.data_seconds = self.checkpoint_seconds = self.validation_seconds = 0.0
        self.started = time.perf_counter()


def validation_row(step: int, loss: float, tokens: int, text_bytes: float, seconds: float) -> dict[str, Any]:
    """Return a validation's line for metrics.jsonl; a number that is not finite is null, as JSON has none.

    Args:
        step: The one whose weights were looked at.
        loss: Mean cross-entropy in nats a token.
        tokens: How many were predicted.
        text_bytes: Of the text that they are.
        seconds: All that it took.
    """
    perplexity = math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf
    return {
        "step": step,
        "validation_loss": _finite(loss),
        "validation_perplexity": _finite(perplexity),
        "validation_bits_per_byte": _finite(bits_per_byte(loss, tokens, text_bytes)),
        "validation_tokens": tokens,
        "validation_seconds": seconds,
        "time": utc_now(),
    }


def bits_per_byte(loss: float, tokens: int, text_bytes: float) -> float:
    """Return a loss in nats a token as bits a byte of text, which compares across tokenizers."""
    return loss / math.log(2) * tokens / max(1, text_bytes)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
