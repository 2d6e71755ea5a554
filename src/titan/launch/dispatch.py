"""Freezing: what makes a composed config the config of a run directory.

A directory that already holds a run is resumed, but only by a config that continues it. What decides the weights or
the data must be the same; anything else may change and is listed.
"""

from __future__ import annotations

from enum import Enum

from titan.config.load import flatten, load_config, save_config
from titan.config.schema import TitanConfig
from titan.errors import ConfigError, Problem
from titan.log import logger
from titan.run_directory import RunDirectory, write_atomically

CONTINUED = (
    "model.",
    "tokenizer.",
    "data.kind",
    "data.path",
    "data.text_field",
    "data.bad_documents",
    "training.seq_len",
    "training.global_batch_size",
    "training.seed",
)
"""Keys, or groups of them, that a resumed run must not change."""


class Frozen(Enum):
    """What freezing found."""

    new = "new"
    continued = "continued"
    complete = "complete"


def freeze(config: TitanConfig, directory: RunDirectory, overrides: list[str]) -> Frozen:
    """Write the config into its run directory.

    Returns:
        Whether the run is new, goes on, or is complete already, in which case nothing was written.

    Raises:
        ConfigError: If the directory holds another run, which this config would not continue.
    """
    found = Frozen.new
    if directory.config.exists():
        found = Frozen.continued
        changes = changed_keys(load_config(directory.config), config)
        refused = [key for key in changes if key.startswith(CONTINUED)]
        if refused:
            raise ConfigError(
                [
                    Problem(
                        f"{key} = {changes[key][1]}, but the run in {directory.path} has {changes[key][0]}",
                        "A resumed run goes on with the same model and the same data.",
                        f"{key}={changes[key][0]}   or  run.dir=ANOTHER   for a new run",
                    )
                    for key in refused
                ]
            )
        status = directory.read_status()
        if status.get("state") == "complete" and status.get("step", 0) >= config.training.steps:
            return Frozen.complete
        for key, (before, now) in changes.items():
            logger.info(f"resuming with {key} = {now} (was {before})")
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        save_config(config, directory.config)
        write_atomically(directory.overrides, "".join(f"- {override!r}\n" for override in overrides) or "[]\n")
    except OSError as error:
        raise ConfigError(
            [
                Problem(
                    f"run.dir = {directory.path} cannot be written: {error.strerror or error}",
                    suggestion="run.dir=/path/that/can/be/written",
                )
            ]
        ) from error
    return found


def changed_keys(before: TitanConfig, now: TitanConfig) -> dict[str, tuple[object, object]]:
    """Return the keys whose values differ, each with both values."""
    old, new = flatten(before), flatten(now)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
