"""What every benchmark writes down beside its figures: the machine, the versions, the commit, and how busy it was."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "hydra-core", "omegaconf", "tiktoken", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": load(),
    }


def load() -> float:
    """Return how many processes have been running or waiting for a core, averaged over the last minute."""
    return os.getloadavg()[0]


def write_result(name: str, machine: dict[str, Any], **figures: Any) -> Path:
    """Write figures to results/<name>.json and return the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, **figures}, indent=2) + "\n")
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of some repetitions, the smallest and the largest."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
