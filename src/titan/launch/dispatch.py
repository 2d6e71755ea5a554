"""Freezing: what makes a composed config the config of a run directory.

A directory that already holds a run is resumed, but only by a config that continues it. What decides the weights or
the data must be the same; anything else may change and is listed. Where no step was trained and nothing was saved there
is nothing to continue, and any config takes the place.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from enum import Enum

import yaml

from titan.checkpoint.manifest import committed_steps, rename_aside, step_folder
from titan.config.continuation import changed_keys, refused_keys
from titan.config.keys import override
from titan.config.load import load_config, save_config
from titan.config.schema import CheckpointMode, TitanConfig
from titan.errors import ConfigError, Problem
from titan.launch.jobs import live_job
from titan.launch.lock import RunLock, check_not_in_use
from titan.log import logger
from titan.run_directory import RunDirectory, short_path, write_atomically

SET_ASIDE = "aside"
"""What the names of checkpoints begin with that a run has gone back behind."""

_SHOWN = 5
"""Settings that a message lists."""


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
        goes_back, has_config = False, directory.config.exists()
        if has_config:
            found, goes_back = _continue_run(config, directory)
        else:
            found = _begin_run(config, directory)
        if found is not Frozen.complete:
            _write(config, directory, overrides, goes_back, is_replacing=has_config and found is Frozen.new)
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


def _write(
    config: TitanConfig, directory: RunDirectory, overrides: list[str], goes_back: bool, is_replacing: bool
) -> None:
    lock = RunLock(directory)
    lock.acquire()  # or a run that is just starting would find its files changed
    try:
        if is_replacing and _holds_anything(directory):  # while the lock was waited for
            raise ConfigError(
                [
                    Problem(
                        f"run.dir = {directory.path} has been trained in by another command just now",
                        suggestion="the same command again, or  run.dir=ANOTHER   for a new run",
                    )
                ]
            )
        if goes_back:
            _go_back(config.checkpoint.load_step, directory)
        save_config(config, directory.config)
        write_atomically(directory.overrides, "".join(f"- {text!r}\n" for text in overrides) or "[]\n")
    finally:
        lock.release()


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


def _continue_run(config: TitanConfig, directory: RunDirectory) -> tuple[Frozen, bool]:
    """Hold a config against the run that the directory has; writes nothing.

    Returns:
        What was found, and whether the run is to go back to a step.
    """
    try:
        before = load_config(directory.config)
    except ConfigError as error:
        raise ConfigError(
            [Problem(problem.what, problem.why, "run.dir=ANOTHER   for a new run") for problem in error.problems]
        ) from error
    changes = changed_keys(before, config)
    is_blank = bool(changes) and not _holds_anything(directory)
    if (refused := refused_keys(changes)) and not is_blank:
        problems = [_refuse(group, refused, changes, directory) for group in _groups(refused)]
        if typed := _what_was_typed(directory):
            problems[-1] = replace(problems[-1], why=f"{problems[-1].why}\nIt was started with: {typed}")
        raise ConfigError(problems)
    # a command that is typed, or started, again has gone back already
    goes_back = "checkpoint.load_step" in changes and config.checkpoint.load_step >= 0
    if directory.is_complete(config.training.steps) and not goes_back:
        return Frozen.complete, False
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
    if is_blank:
        logger.info(f"nothing was trained in {short_path(directory.path)} yet: it begins with the new settings")
        return Frozen.new, False
    for key, (old, new) in changes.items():
        logger.info(f"resuming with {key} = {new} (was {old})")
    return Frozen.continued, goes_back


def already_complete(config: TitanConfig, directory: RunDirectory) -> str:
    """Say that there is nothing to do, and which of the settings that were asked for the run does not have."""
    done, asked = directory.read_status()["step"], config.training.steps
    steps = f"step {done}" if asked == done else f"{done} steps, {asked} asked for"
    text = f"{directory.path}: this run is complete ({steps}); nothing to do"
    changes = changed_keys(load_config(directory.config), config)
    changes.pop("training.steps", None)
    if not changes:
        return text
    shown = [f"{override(key, new)} (it had {_value(key, old)})" for key, (old, new) in changes.items()]
    listed = ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
    verb = "changes" if len(shown) == 1 else "change"
    return f"{text}\n  {listed} {verb} nothing in it; for a new run  run.dir=ANOTHER"


def _value(key: str, value: object) -> str:
    return override(key, value).removeprefix(f"{key}=")


def _holds_anything(directory: RunDirectory) -> bool:
    """Whether a step was trained in a directory, or left out, or anything was saved: the weights of step 0 count too.

    What failed attempts leave besides (status, events, logs, an identity that no checkpoint bears) commits to nothing.
    """
    saved = directory.checkpoints.iterdir() if directory.checkpoints.is_dir() else ()
    rows = (directory.rows, directory.metrics, directory.ledger)
    return (
        any(not entry.name.endswith(".tmp") for entry in saved)
        or any(file.exists() and file.stat().st_size for file in rows)
        or bool(directory.read_status().get("step") or directory.read_events("save"))
    )


def _go_back(step: int, directory: RunDirectory) -> None:
    """Set the checkpoints after a step aside, so that the newest is the one to go on from."""
    for later in committed_steps(directory.checkpoints):
        if later > step:
            path = step_folder(directory.checkpoints, later)
            aside = rename_aside(path, SET_ASIDE)
            logger.info(f"going back to step {step}: {path.name} is set aside as {aside.name}")
            directory.append_event("rewind", step=step, checkpoint=path.name, moved_to=aside.name)
    directory.write_status("preempted", why=f"gone back to step {step}", step=step, saved_step=step)


def _check_step(step: int, directory: RunDirectory) -> None:
    there = committed_steps(directory.checkpoints)
    if step not in there:
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


def _what_was_typed(directory: RunDirectory) -> str:
    """Return the overrides that the run was last started with, to be pasted; nothing where that is not known."""
    try:
        typed = yaml.safe_load(directory.overrides.read_text())
    except (OSError, yaml.YAMLError):
        return ""
    return shlex.join(map(str, typed)) if isinstance(typed, list) else ""


def _groups(keys: list[str]) -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))
