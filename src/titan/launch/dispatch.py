"""Freezing: what makes a composed config the config of a run directory.

A directory that already holds a run is resumed, but only by a config that continues it. What decides the weights or
the data must be the same; anything else may change and is listed.
"""

from __future__ import annotations

from enum import Enum

from titan.checkpoint.manifest import committed_steps, rename_aside, step_folder
from titan.config.continuation import changed_keys, refused_keys
from titan.config.keys import override
from titan.config.load import load_config, save_config
from titan.config.schema import CheckpointMode, TitanConfig
from titan.errors import ConfigError, Problem
from titan.launch.jobs import live_job
from titan.launch.lock import check_not_in_use
from titan.log import logger
from titan.run_directory import RunDirectory, write_atomically

SET_ASIDE = "aside"
"""What the names of checkpoints begin with that a run has gone back behind."""


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
        found = _continue_run(config, directory) if directory.config.exists() else _begin_run(config, directory)
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


def _begin_run(config: TitanConfig, directory: RunDirectory) -> Frozen:
    check_not_in_use(directory)  # a rank by hand keeps no config here
    if config.checkpoint.load_step >= 0:
        raise ConfigError(
            [
                Problem(
                    f"checkpoint.load_step = {config.checkpoint.load_step}, but {config.run.dir} holds no run",
                    suggestion="run.dir=<the folder of the run to go back in>",
                )
            ]
        )
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
    refused = refused_keys(changes)
    if refused:
        raise ConfigError([_refuse(group, refused, changes, directory) for group in _groups(refused)])
    goes_back = "checkpoint.load_step" in changes and config.checkpoint.load_step >= 0
    if directory.is_complete(config.training.steps) and not goes_back:
        return Frozen.complete
    if config.checkpoint.mode is CheckpointMode["disabled"] and committed_steps(directory.checkpoints):
        raise ConfigError(
            [
                Problem(
                    f"run.dir = {directory.path} has checkpoints, but checkpoint=disabled would begin anew over them",
                    suggestion=f"checkpoint={before.checkpoint.mode.name}   or  run.dir=ANOTHER   for a new run",
                )
            ]
        )
    if goes_back:
        _check_step(config.checkpoint.load_step, directory)
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
    if "checkpoint.load_step" in changes:  # a command that is typed, or started, again has gone back already
        _go_back(config.checkpoint.load_step, directory)
    return Frozen.continued


def _go_back(step: int, directory: RunDirectory) -> None:
    """Set the checkpoints after a step aside, so that the newest is the one to go on from."""
    for later in committed_steps(directory.checkpoints):
        if step >= 0 and later > step:
            path = step_folder(directory.checkpoints, later)
            aside = rename_aside(path, SET_ASIDE)
            logger.info(f"going back to step {step}: {path.name} is set aside as {aside.name}")
            directory.append_event("rewind", step=step, checkpoint=path.name, moved_to=aside.name)
    if step >= 0:
        directory.write_status("preempted", why=f"gone back to step {step}", step=step, saved_step=step)


def _check_step(step: int, directory: RunDirectory) -> None:
    there = committed_steps(directory.checkpoints)
    if step >= 0 and step not in there:
        raise ConfigError(
            [
                Problem(
                    f"checkpoint.load_step = {step}, but {directory.checkpoints} has no such checkpoint",
                    f"There are: {', '.join(map(str, there)) or 'none'}",
                    "checkpoint.load_step=-1   (the newest)",
                )
            ]
        )


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
