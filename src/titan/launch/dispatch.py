"""Freezing: what makes a composed config the config of a run directory.

A directory that already holds a run is resumed, but only by a config that continues it. What decides the weights or
the data must be the same; anything else may change and is listed.
"""

from __future__ import annotations

from enum import Enum

from titan.config.keys import flatten, override
from titan.config.load import load_config, save_config
from titan.config.schema import TitanConfig
from titan.errors import ConfigError, Problem
from titan.launch.jobs import live_job
from titan.launch.lock import check_not_in_use
from titan.log import logger
from titan.run_directory import RunDirectory, write_atomically

CONTINUED = (
    "model.",
    "tokenizer.",
    "data.kind",
    "data.path",
    "data.text_field",
    "data.bad_documents",
    "data.mask_documents",
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
        ConfigError: If the directory holds another run, which this config would not continue, or a run or a job has
            it that has not ended.
    """
    try:
        found = _continue_run(config, directory) if directory.config.exists() else _new_run(directory)
        if found is not Frozen.complete:
            directory.path.mkdir(parents=True, exist_ok=True)
            save_config(config, directory.config)
            write_atomically(directory.overrides, "".join(f"- {text!r}\n" for text in overrides) or "[]\n")
    except OSError as error:
        raise ConfigError(
            [
                Problem(
                    f"run.dir = {directory.path} cannot be written",
                    f"{error.strerror or error}: {error.filename}" if error.filename else str(error),
                    "run.dir=/path/that/can/be/written",
                )
            ]
        ) from error
    return found


def changed_keys(before: TitanConfig, now: TitanConfig) -> dict[str, tuple[object, object]]:
    """Return the keys whose values differ, each with both values."""
    old, new = flatten(before), flatten(now)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _new_run(directory: RunDirectory) -> Frozen:
    check_not_in_use(directory)  # a rank by hand keeps no config here
    return Frozen.new


def _continue_run(config: TitanConfig, directory: RunDirectory) -> Frozen:
    """Hold a config against the run that the directory has; writes nothing."""
    try:
        before = load_config(directory.config)
    except ConfigError as error:
        raise ConfigError(
            [Problem(problem.what, problem.why, "run.dir=ANOTHER   for a new run") for problem in error.problems]
        ) from error
    changes = changed_keys(before, config)
    refused = [key for key in changes if key.startswith(CONTINUED)]
    if refused:
        raise ConfigError([_refuse(group, refused, changes, directory) for group in _groups(refused)])
    if directory.is_complete(config.training.steps):
        return Frozen.complete
    if (job := live_job(directory)) is not None:
        raise ConfigError(
            [
                Problem(
                    f"run.dir = {directory.path} belongs to job {job}, which has not ended",
                    "Two jobs would write to the same files.",
                    f"scancel {job}   or  run.dir=ANOTHER   for a new run",
                )
            ]
        )
    check_not_in_use(directory)
    for key, (old, new) in changes.items():
        logger.info(f"resuming with {key} = {new} (was {old})")
    return Frozen.continued


def _refuse(
    group: str, refused: list[str], changes: dict[str, tuple[object, object]], directory: RunDirectory
) -> Problem:
    """Return one problem for all keys of a group: another model differs in many, and is one mistake."""
    keys = [key for key in refused if key.startswith(f"{group}.")]
    lines = [f"{override(key, changes[key][1])}, but the run has {override(key, changes[key][0])}" for key in keys]
    return Problem(
        f"run.dir = {directory.path} holds a run with other {group} settings, which cannot be continued",
        "\n".join(lines),
        " ".join(override(key, changes[key][0]) for key in keys) + "   or  run.dir=ANOTHER   for a new run",
    )


def _groups(keys: list[str]) -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))
