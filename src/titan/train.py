"""The command: `python -m titan.train [group=option] [group.key=value]`.

Composes a config, converts it to typed dataclasses, checks it, freezes it into the run directory and starts the
ranks. It imports no torch before there is something to start, so that `--cfg job` and every mistake answer at once.
All of Hydra's own flags work; its errors become titan's: one message, exit code 2, no traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from titan.config.check import check_config
from titan.config.degrees import world_size
from titan.config.load import (
    COMPOSITION_ERRORS,
    CONFIG_NAME,
    conf_dir,
    explain_composition,
    register_schema,
    to_typed,
)
from titan.config.schema import TitanConfig
from titan.errors import ConfigError, TitanError
from titan.launch.dispatch import Frozen, freeze
from titan.launch.environment import current_machine, current_rank
from titan.launch.local import launch_local
from titan.log import logger, start_logging
from titan.run_directory import RunDirectory


@dataclass(frozen=True)
class Outcome:
    """How one run ended."""

    overrides: list[str]
    directory: Path
    exit_code: int


def main() -> None:
    """Run the command line and exit with the code that `titan.errors` documents."""
    start_logging()
    outcomes: list[Outcome] = []

    def run(composed: DictConfig) -> float | None:
        with _hydra_shows_tracebacks(None):
            try:
                outcomes.append(run_point(composed))
            except TitanError as error:  # Hydra would announce it with a line of its own
                _exit_with(error)
        return RunDirectory(outcomes[-1].directory).read_status().get("loss")

    register_schema()
    arguments = get_args_parser().parse_args()
    try:
        # Without this, Hydra prints its errors and exits with 1 before they reach us.
        with _hydra_shows_tracebacks("1"):
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=CONFIG_NAME)(run)()
    except TitanError as error:
        _exit_with(error)
    except COMPOSITION_ERRORS as error:
        problems = explain_composition(
            error,
            arguments.overrides,
            arguments.config_dir,
            arguments.config_name or CONFIG_NAME,
            current_machine(),
        )
        _exit_with(ConfigError(list(problems)))
    if len(outcomes) > 1:
        for line in summarise(outcomes):
            logger.info(line)
    sys.stdout.flush()
    sys.stderr.flush()
    code = next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0)
    if code and "torch" in sys.modules:
        os._exit(code)  # threads of a rank that failed in this process may hang in a collective
    sys.exit(code)


def run_point(composed: DictConfig) -> Outcome:
    """Check, freeze and run one composed config; returns how it ended.

    Raises:
        ConfigError: If the config is wrong; nothing was started or changed.
    """
    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    try:
        config = to_typed(composed)
    except COMPOSITION_ERRORS as error:
        raise ConfigError(list(explain_composition(error, overrides, machine=current_machine()))) from error
    if settings.mode is RunMode.MULTIRUN:
        config = replace(config, run=replace(config.run, dir=settings.runtime.output_dir))
        logger.info(f"\n== point {settings.job.num}: {' '.join(overrides) or 'no overrides'}")
    config = check_config(config, current_machine())
    directory = RunDirectory(Path(config.run.dir))
    return Outcome(overrides, directory.path, dispatch(config, directory, overrides))


def dispatch(config: TitanConfig, directory: RunDirectory, overrides: list[str]) -> int:
    """Start the ranks, or be one; returns the exit code."""
    from titan import worker

    rank = current_rank()
    if rank is not None:  # an outer launcher has started us as a rank
        return worker.run_started_rank(config, rank, overrides)
    if freeze(config, directory, overrides) is Frozen.complete:
        logger.info(f"{directory.path}: this run is complete (step {config.training.steps}); nothing to do")
        return 0
    logger.info(f"run        {_shown(directory.path)}")
    ranks = world_size(config.cluster)
    if ranks == 1:
        return worker.main([str(directory.config)])
    try:
        launch_local(directory, ranks)
    except TitanError as error:
        print(f"\n{error}", file=sys.stderr)
        if directory.read_status().get("state") == "running":
            directory.write_status("failed", why=str(error), exit_code=error.exit_code)
        return error.exit_code
    return 0


def summarise(outcomes: list[Outcome]) -> Iterator[str]:
    """Return a sweep's points as lines: status, last loss, tokens/s, what was varied, directory."""
    yield "\npoint  status    loss      tok/s  overrides"
    for number, outcome in enumerate(outcomes):
        directory = RunDirectory(outcome.directory)
        status = directory.read_status()
        row = _last_row(directory)
        loss = f"{row['loss']:.4f}" if row else "-"
        speed = f"{row['tokens_per_second']:,.0f}" if row else "-"
        state = status.get("state", "failed")
        yield f"{number:>5}  {state:<8}  {loss:>6}  {speed:>9}  {' '.join(outcome.overrides)}  {_shown(directory.path)}"


def _last_row(directory: RunDirectory) -> dict[str, Any] | None:
    import json

    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads(directory.metrics.read_text().splitlines()[-1])
    return None


@contextlib.contextmanager
def _hydra_shows_tracebacks(value: str | None) -> Iterator[None]:
    before = os.environ.pop("HYDRA_FULL_ERROR", None)
    if value is not None:
        os.environ["HYDRA_FULL_ERROR"] = value
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _exit_with(error: TitanError) -> None:
    rank = current_rank()
    if rank is None or rank.rank == 0:  # all ranks of an outer launcher find the same mistake
        print(error, file=sys.stderr)
    sys.exit(error.exit_code)


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    main()
