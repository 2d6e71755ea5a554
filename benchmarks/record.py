"""What the benchmarks share: running a command, and writing down what a figure depends on besides the code."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "hydra-core", "omegaconf", "tiktoken", "numpy")
QUIET_CORES = 0.2
"""Other processes may keep this many cores busy; a turn that they disturb more is taken again."""
MOST_DISTURBED_TURNS = 8
TITAN = (sys.executable, "-m", "titan.train")


class OtherLoad:
    """How many cores are busy with anything but this benchmark, from the moment this is made.

    Time that a hypervisor gives to other machines counts too: it is lost to the benchmark just the same.
    """

    def __init__(self) -> None:
        self._start = _busy_elsewhere_seconds(), time.monotonic()

    def cores(self) -> float:
        """Return the mean since the start; processes of the benchmark must have ended to count as its own."""
        busy, now = _busy_elsewhere_seconds(), time.monotonic()
        return round(max(0.0, (busy - self._start[0]) / (now - self._start[1])), 3)


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on: the machine, the versions, the commit, and what else was running."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD").strip(),
        "changed_since_commit": _git("status", "--porcelain", "--", "src", "conf").splitlines(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(name: str, machine: dict[str, Any], **figures: Any) -> Path:
    """Write figures to results/<name>.json and return the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, **figures}, indent=2) + "\n")
    return path


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return the median of some repetitions, the smallest and the largest."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def environment() -> dict[str, str]:
    """Return the environment of a user without a GPU: bytecode is kept between starts, whatever it is here."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


def run(command: Sequence[str]) -> str:
    """Run a command to its end; return what it wrote to stdout, or stop with all that it wrote."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def read_metrics(run_directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def unix_seconds(row: dict[str, Any]) -> float:
    """Return when a row of metrics was written."""
    return datetime.fromisoformat(row["time"]).timestamp()


def _busy_elsewhere_seconds() -> float:
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in used)


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")


def _git(*arguments: str) -> str:
    folder = Path(__file__).parents[1]
    without_locks = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # a benchmark only looks
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, env=without_locks, check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
