"""Run directories as runs write them, made in a moment, with everything in them that a page shows."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.load import config_text

BEGAN = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


def at(seconds: float) -> str:
    """Return the time so many seconds after the run's first event."""
    return datetime.fromtimestamp(BEGAN + seconds, UTC).isoformat(timespec="milliseconds")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training_row(step: int, seconds: float, **values: Any) -> dict[str, Any]:
    """Return a row of metrics, at so many seconds."""
    noise = random.Random(step)
    row = {
        "step": step,
        "loss": 2.2 + 8 * math.exp(-step / 60) + 0.03 * noise.random(),
        "grad_norm": 0.8 + 0.5 * noise.random(),
        "learning_rate": 3e-4 * min(1.0, step / 100),
        "tokens": step * 524_288,
        "tokens_per_second": 410_000 + 9_000 * noise.random(),
        "tokens_per_second_per_device": 51_000.0,
        "tflops_per_device": 420.0,
        "mfu": 0.41 + 0.02 * noise.random(),
        "memory_gib": 61.25,
        "step_seconds": 1.05,
        "data_seconds": 0.0,
        "checkpoint_seconds": 0.0,
        "time": at(seconds),
    }
    return row | values


@functools.cache
def _frozen() -> str:
    """Return a frozen config, which takes a while to make."""
    return config_text(check_config(compose(["run.dir=unsaid", "model=llama3_8b"]), Machine(gpus=1)))


def write_run(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]] = (),
    state: str = "complete",
    overrides: Sequence[str] = (),
    samples: Sequence[dict[str, Any]] = (),
    why: str = "",
) -> Path:
    """Write a run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = OmegaConf.create(_frozen())
    for key, _, value in (each.partition("=") for each in (f"run.dir={folder}", *overrides)):
        OmegaConf.update(config, key, value if key == "run.dir" else yaml.safe_load(value))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "events.jsonl", events)
    if samples:
        write_lines(folder / "samples.jsonl", samples)
    (folder / "status.json").write_text(
        json.dumps({"state": state, "why": why, "step": rows[-1]["step"] if rows else 0})
    )
    return folder


def eventful_run(folder: Path, steps: int = 600) -> Path:
    """Write a run that was submitted, killed once, went back once, and was complete after a third start."""
    cut, rows = steps // 3, []
    events: list[dict[str, Any]] = [
        {"time": at(0), "event": "submit", "job": "4711"},
        {"time": at(120), "event": "start", "ranks": 8, "attempt": 0},
    ]
    clock = 150.0

    def train(first: int, last: int) -> None:
        nonlocal clock
        for step in range(first, last + 1):
            is_saved = step % 100 == 0
            waited = {"checkpoint_seconds": 4.0 * is_saved, "data_seconds": 0.05}
            clock += 1.05 + 4.0 * is_saved
            rows.append(training_row(step, clock, **waited))
            if is_saved:
                events.append({"time": at(clock), "event": "save", "step": step, "seconds": 6.0, "waited_seconds": 4.0})
                clock += 8.5
                rows.append(
                    {
                        "step": step,
                        "validation_loss": 2.4 + 8 * math.exp(-step / 60),
                        "validation_perplexity": 11.0,
                        "validation_bits_per_byte": 0.9,
                        "validation_tokens": 100_000,
                        "validation_seconds": 8.5,
                        "time": at(clock),
                    }
                )

    train(1, cut)
    clock += 40  # steps that were lost, and until somebody noticed
    events.append({"time": at(clock), "event": "start", "ranks": 8, "attempt": 1})
    events.append({"time": at(clock + 20), "event": "resume", "step": cut})
    clock += 25
    train(cut + 1, 2 * cut)
    events.append({"time": at(clock + 10), "event": "spike", "action": "rollback", "step": 2 * cut + 8, "loss": "nan"})
    clock += 10
    train(2 * cut + 9, steps)
    events.append({"time": at(clock + 2), "event": "exit", "code": 0})
    samples = [
        {
            "step": step,
            "prompt": "Once upon a time",
            "text": f", after {step} steps, there was a loss.\n",
            "time": at(1),
        }
        for step in (100, 200, 300)
    ]
    return write_run(folder, rows, events, samples=samples, overrides=[f"training.steps={steps}"])


def sweep(folder: Path, points: int, rows: int) -> Path:
    """Write a sweep over learning rate and warm-up, with so many logged steps a point."""
    for point in range(points):
        rate, better = 1e-4 * (1 + point), abs(point - points // 2)
        logged = [
            training_row(
                step,
                step * 1.0,
                loss=2.0
                + 0.05 * better
                + 8 * math.exp(-step / (rows / 12))
                + 0.05 * random.Random(step * points).random(),
                learning_rate=rate,
            )
            for step in range(1, rows + 1)
        ]
        events = [
            {"time": at(0), "event": "start", "ranks": 1, "attempt": 0},
            {"time": at(rows + 1), "event": "exit", "code": 0},
        ]
        overrides = [
            f"optimizer.lr={rate:.6f}",
            f"training.steps={rows}",
            f"lr_scheduler.warmup_steps={50 * (point % 2)}",
        ]
        write_run(folder / str(point), logged, events, overrides=overrides)
    return folder
