"""Weights & Biases, through its own library: the numbers of metrics.jsonl, the whole config, the machine's figures.

A run directory is one run there, however often it is resumed: the run's id is kept beside the metrics. What was sent
cannot be taken back, and steps only go up there; so what is kept is also the last step that was sent, and the rows of
a run that has gone back are sent from there on. A run that resumes has the same numbers, so nothing is lost.

The library talks to a process of its own, which talks to the network. It may take its time for that: at the start and
at the end it is given some seconds and no more, and what did not go out lies in <run.dir>/wandb for `wandb sync`.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import wandb

from titan.config.load import plain_config
from titan.config.schema import TitanConfig, WandbMode
from titan.config.tracking import has_wandb_key
from titan.log import logger
from titan.metrics.sinks import section_of
from titan.run_directory import RunDirectory, short_path

_START_SECONDS = 30.0
_FINISH_SECONDS = 30.0


class WeightsAndBiases:
    """One run there.

    Args:
        config: Sent as it was frozen.
        directory: Keeps the run's id, and what cannot be sent.
    """

    def __init__(self, config: TitanConfig, directory: RunDirectory) -> None:
        settings = config.metrics.wandb
        if settings.mode is WandbMode.online and not has_wandb_key():
            raise RuntimeError("there is no key: WANDB_API_KEY is not set, and nobody has logged in")
        self._known = directory.wandb
        self._sent = _read(directory.wandb)
        _write(self._known, self._sent)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or short_path(directory.path),
            group=settings.group or _sweep_of(directory.path),
            tags=settings.tags,
            id=self._sent["id"],
            resume="allow",
            mode=settings.mode.value,
            dir=str(directory.path),
            config=plain_config(config),
            save_code=False,
            settings=_limits(config.cluster.grace_seconds),
        )
        is_online = settings.mode is WandbMode.online
        where = self._run.url if is_online else f"{short_path(directory.path / 'wandb')}, for `wandb sync`"
        logger.info(f"{'wandb':<10} {where}")

    def write(self, row: dict[str, Any]) -> None:
        """Send a row, unless the run has sent that step before it went back."""
        kind = "validation" if "validation_loss" in row else "training"
        if row["step"] <= self._sent[kind]:
            return
        values = {f"{section_of(name)}/{name}": value for name, value in row.items() if _is_number(value)}
        # a validation that comes first after a resume has a step that the server takes for done
        self._run.log(values, step=max(row["step"], self._run.step))
        self._sent[kind] = row["step"]
        _write(self._known, self._sent)

    def step(self) -> None:
        """Take note of a step; of no use here."""

    def rewind(self, step: int) -> None:
        """Go back with the run: the steps that were sent are not sent again."""

    def close(self) -> None:
        """Send what is left, for so many seconds."""
        self._run.finish()


def _limits(grace_seconds: int) -> wandb.Settings:
    """Return settings that keep the library quiet, and from making the run wait for the network.

    Args:
        grace_seconds: What a run that is told to stop has for all that it has still to do.
    """
    wanted = {
        "silent": True,
        "console": "off",  # titan's own logs are files of the run, and its progress bar is none of theirs
        "init_timeout": _START_SECONDS,
        "login_timeout": _START_SECONDS,
        "finish_timeout": min(_FINISH_SECONDS, grace_seconds / 4),  # not in every version
        "finish_timeout_raises": True,
    }
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})


def _read(path: Path) -> dict[str, Any]:
    """Return the run's id and the last steps sent; new ones where there are none yet, or the file was cut short."""
    try:
        known = json.loads(path.read_text())
        return {"id": str(known["id"]), "training": int(known["training"]), "validation": int(known["validation"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"id": secrets.token_hex(4), "training": 0, "validation": 0}


def _write(path: Path, known: dict[str, Any]) -> None:
    path.write_text(json.dumps(known) + "\n")


def _sweep_of(path: Path) -> str | None:
    """Return the sweep that a run directory is a point of, by its name, which is the point's number."""
    return short_path(path.parent) if path.name.isdigit() else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
