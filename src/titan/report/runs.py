"""A run as its directory tells it: config, state, metrics, events, samples. Reads, and changes nothing.

The config is read without the schema, so that a page can also be made of a run of another version.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from titan.api.finding import describe_no_run, is_run, load_lines, points_of
from titan.errors import CommandError
from titan.launch.lock import RunInUse, check_not_in_use
from titan.run_directory import RunDirectory, short_path

_PLACES = ("run.", "cluster.", "data.cache_dir", "metrics.")
"""Keys of the config that say where a run is and where it tells of itself, not what it is."""


@dataclass
class Run:
    """One run."""

    directory: RunDirectory
    name: str
    """What it is called on the page: its path, or its number in a sweep."""
    config: dict[str, Any]
    """The frozen config by dotted keys; empty where it cannot be read."""
    config_text: str
    status: dict[str, Any]
    is_live: bool
    """Whether it has the lock of its directory, so it runs now."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """All rows, oldest first."""
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The logged steps."""
        return [row for row in self.metrics if "loss" in row]

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """The validations."""
        return [row for row in self.metrics if "validation_loss" in row]

    @property
    def state(self) -> str:
        """How it stands, in words: complete, running, stopped, failed, or killed without a word."""
        state = self.status.get("state")
        if self.is_live:
            return "still running"
        if state == "running":
            return "ended without a word"
        return {"preempted": "stopped, can go on"}.get(str(state), str(state or "unknown"))

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return self.metrics[-1]["step"] if self.metrics else int(self.status.get("step") or 0)

    @property
    def steps(self) -> int | None:
        """The steps that it is to have."""
        steps = self.config.get("training.steps")
        return steps if isinstance(steps, int) else None

    @property
    def final_loss(self) -> float:
        """The last logged loss; infinity where there is none."""
        loss = self.training[-1]["loss"] if self.training else None
        return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else math.inf


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs in some paths; a directory of runs gives all of them.

    Raises:
        CommandError: For the first path that is neither.
    """
    runs: list[Run] = []
    for path in paths:
        directory = RunDirectory(path)
        if is_run(directory):
            runs.append(read_run(directory, short_path(path.absolute())))
            continue
        points = points_of(path)
        if not points:
            raise CommandError(describe_no_run(path.absolute()))
        prefix = f"{short_path(path.absolute())}/" if len(paths) > 1 else ""
        runs += [read_run(point, prefix + point.path.name) for point in points]
    found = {run.directory.path.absolute(): run for run in runs}
    return list(found.values())  # each once, however it was named


def read_run(directory: RunDirectory, name: str) -> Run:
    """Return one run."""
    text = ""
    with contextlib.suppress(OSError):
        text = directory.config.read_text(errors="replace")
    is_live = False
    try:
        check_not_in_use(directory, patience_seconds=0)
    except RunInUse:
        is_live = True
    except OSError:
        pass
    return Run(
        directory=directory,
        name=name,
        config=flatten_config(text),
        config_text=text,
        status=directory.read_status(),
        is_live=is_live,
        metrics=[row for row in load_lines(directory.metrics) if isinstance(row.get("step"), int)],
        events=load_lines(directory.events),
        samples=load_lines(directory.samples),
    )


def flatten_config(text: str) -> dict[str, Any]:
    """Return a config's leaves by dotted keys; nothing where it is no config."""
    try:
        container = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text else {}
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError):
        return {}
    leaves: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        elif prefix:
            leaves[prefix] = node

    walk(container, "")
    return leaves


def varied_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys in which runs differ, but for those that say where a run is."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [
        key
        for key in keys
        if not key.startswith(_PLACES) and len({repr(run.config.get(key)) for run in runs if run.config}) > 1
    ]
