"""Fitting the two measured constants to a run, and keeping them in a file.

One run gives two numbers, the seconds of a step and the memory, so it can tell two constants: what share of its peak
the device reaches in products, and what the allocator reserves on top of what is counted. They are fitted to the first
half of the steps that the run has logged, and held against the second.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from titan.config.keys import flatten
from titan.config.load import load_config
from titan.config.schema import Device, ModelConfig, TitanConfig
from titan.errors import CommandError, Problem
from titan.plan.assumptions import TITAN, Assumptions, System
from titan.plan.devices import Accelerator
from titan.plan.memory import rank_memory
from titan.plan.planner import Plan
from titan.plan.rank import Shapes
from titan.plan.speed import time_step
from titan.run_directory import RunDirectory, read_objects, write_atomically

GIB = 1 << 30
LEAST_ROWS = 3
"""Logged steps that a calibration needs: one that is left out, one to fit, one to hold against."""
_KIND = "titan plan calibration"
_LARGEST_EFFICIENCY = 1.0
_LARGE_ERROR = 0.1
_LARGEST_RATE = 1e3  # TFLOP/s of a device whose peak is not known


@dataclass(frozen=True)
class Measured:
    """What a run says of itself."""

    config: TitanConfig
    seconds: list[float]
    """Of logged steps, the first left out."""
    memory_gib: float
    source: str


@dataclass(frozen=True)
class Calibration:
    """Constants that were fitted to a run."""

    device: str
    matmul_efficiency: float
    memory_overhead: float | None
    """None where the run was on a CPU, whose memory_gib is the whole process's."""
    model: str
    source: str
    speed_error: float
    """What the plan is off on the steps it was not fitted to, as a share of their seconds."""

    def apply(self, assumptions: Assumptions) -> Assumptions:
        """Return the assumptions with what was fitted."""
        overhead = self.memory_overhead or assumptions.memory_overhead
        return replace(assumptions, matmul_efficiency=self.matmul_efficiency, memory_overhead=overhead)


def read_run(path: Path, model: ModelConfig | None = None) -> Measured:
    """Return what a run has measured.

    Args:
        path: Its directory.
        model: The one that is to be planned; None takes any.

    Raises:
        CommandError: If there is no run, or not one that can be learned from.
    """
    directory = RunDirectory(path)
    if not path.is_dir():
        raise _refuse(path, "There is no such folder.", "--calibrate runs/NAME/DATE   the run.dir of a finished run")
    if not directory.config.is_file():
        raise _refuse(path, "It has no config.yaml, so it is no run's folder.", "--calibrate <run.dir>")
    config = load_config(directory.config)
    if model is not None and config.model != model:
        mine, its = flatten(model), flatten(config.model)
        keys = [key for key in mine if mine[key] != its.get(key)]
        raise _refuse(
            path,
            f"It trained another model than is to be planned: "
            f"{', '.join(f'{key} {its.get(key)} and not {mine[key]}' for key in keys[:4])}.",
            f"model={config.model.name} --store FILE   and then --calibration FILE, which any model may take",
        )
    state = directory.read_status().get("state")
    if state == "running":
        raise _refuse(
            path,
            "status.json says that it is running, or was when its machine went down.",
            "wait until it has ended, or stop it   or  another run",
        )
    try:
        lines = directory.metrics.read_text().splitlines()
    except OSError:
        lines = []
    rows = [row for row in read_objects(lines) if "loss" in row and _is_number(row.get("step_seconds"))]
    if len(rows) < LEAST_ROWS:
        raise _refuse(
            path,
            f"metrics.jsonl has {len(rows)} logged steps, and {LEAST_ROWS} are the least: the first is left out, for "
            "all is compiled and warmed up in it.",
            "train for more steps, with metrics.log_every=1",
        )
    memory = max((row["memory_gib"] for row in rows if _is_number(row.get("memory_gib"))), default=0.0)
    return Measured(config, [row["step_seconds"] for row in rows[1:]], memory, str(path))


def calibrate(measured: Measured, device: Accelerator, assumptions: Assumptions) -> Calibration:
    """Fit to the first half of a run's steps; holds the result against the second.

    Raises:
        CommandError: If the run was on another kind of device.
    """
    config = measured.config
    is_cpu = config.cluster.device is Device.cpu
    if is_cpu != (device.name == "cpu"):
        where = "CPU" if is_cpu else "GPU"
        problem = Problem(
            f"--calibrate {measured.source} is a run on a {where}, and --device is {device.name}",
            suggestion="--device cpu" if is_cpu else "--device h100",
        )
        raise CommandError(str(problem))
    half = max(1, len(measured.seconds) // 2)
    first, second = measured.seconds[:half], measured.seconds[half:]
    fitted = fit(config, device, assumptions, statistics.median(first), None if is_cpu else measured.memory_gib)
    timing = time_step(config, with_peak(device), fitted)
    assert timing is not None, "the peak is known, or 1"
    return Calibration(
        device=device.name,
        matmul_efficiency=fitted.matmul_efficiency,
        memory_overhead=None if is_cpu else fitted.memory_overhead,
        model=config.model.name,
        source=measured.source,
        speed_error=timing.step / statistics.median(second) - 1,
    )


def fit(
    config: TitanConfig,
    device: Accelerator,
    assumptions: Assumptions,
    seconds: float,
    memory_gib: float | None,
    system: System = TITAN,
) -> Assumptions:
    """Return the assumptions with which the plan of a run says what the run has measured, as far as two can do that."""
    shapes, known = Shapes(config), with_peak(device)
    low, high = 1e-6, _LARGEST_EFFICIENCY if device.peak_tflops is not None else _LARGEST_RATE
    for _ in range(80):
        middle = (low * high) ** 0.5
        timing = time_step(config, known, replace(assumptions, matmul_efficiency=middle), system, shapes)
        assert timing is not None, "the peak is known, or 1"
        low, high = (middle, high) if timing.step > seconds else (low, middle)
    fitted = replace(assumptions, matmul_efficiency=high)
    if memory_gib:
        bare = replace(fitted, memory_overhead=1.0)
        ranks = range(config.parallelism.pp)  # metrics.jsonl has the fullest rank's
        counted = max(rank_memory(config, rank, bare, system, shapes).total for rank in ranks)
        fitted = replace(fitted, memory_overhead=max(1.0, memory_gib * GIB / counted))
    return fitted


def with_peak(device: Accelerator) -> Accelerator:
    """Return a device whose peak is not known as one of 1 TFLOP/s, so that its efficiency is a rate."""
    return device if device.peak_tflops is not None else replace(device, peak_tflops=1.0, is_peak_known=False)


def describe(found: Calibration, measured: Measured, before: Plan, after: Plan) -> Iterator[str]:
    """Return what was fitted, and how far plans of the same run are off, as lines."""
    seconds = statistics.median(measured.seconds)
    yield (
        f"calibrated {found.source}: {found.model} on {found.device}, {len(measured.seconds)} logged steps of "
        f"{seconds:.3f} s (median), {measured.memory_gib:.2f} GiB"
    )
    unit = "" if after.device.is_peak_known else " TFLOP/s, for nobody knows the peak"
    yield f"  matmul_efficiency {found.matmul_efficiency:.4g}{unit} (was {before.assumptions.matmul_efficiency:g})"
    if found.memory_overhead is None:
        yield "  memory_overhead is not fitted: on a CPU memory_gib is the whole process's, with PyTorch in it"
    else:
        was = f"was {before.assumptions.memory_overhead:g}, {before.memory_gib:.2f} GiB"
        yield f"  memory_overhead {found.memory_overhead:.4g} ({was}); a plan of it says {after.memory_gib:.2f} GiB now"
    assert before.timing is not None, "the peak is known, or 1"
    if before.device.is_peak_known:
        yield f"  error before: {before.timing.step / seconds - 1:+.1%} of a step's seconds"
    yield f"  error after, on the later half of the steps, which it was not fitted to: {found.speed_error:+.1%}"
    if abs(found.speed_error) > _LARGE_ERROR:
        yield "  that is much: the run's speed changed, or something else than what is planned limits it"


def store(calibration: Calibration, path: Path) -> None:
    """Write a calibration to a file, for `load`."""
    write_atomically(path, json.dumps({"kind": _KIND, **asdict(calibration)}, indent=2) + "\n")


def load(path: Path) -> Calibration:
    """Read a calibration.

    Raises:
        CommandError: If the file is none.
    """
    try:
        found: Any = json.loads(path.read_text())
        if not isinstance(found, dict) or found.pop("kind", None) != _KIND:
            raise ValueError("it says so nowhere")
        return Calibration(**found)
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        problem = Problem(
            f"--calibration {path} is no calibration of titan.plan: {reason}",
            suggestion="--calibrate <run.dir> --store FILE   which makes one",
        )
        raise CommandError(str(problem)) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _refuse(path: Path, why: str, suggestion: str) -> CommandError:
    return CommandError(str(Problem(f"--calibrate {path} cannot be learned from", why, suggestion)))
