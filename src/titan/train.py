"""The command: `python -m titan.train [group=option] [group.key=value]`.

Composes a config, converts it to typed dataclasses, checks it, freezes it into the run directory and starts the
ranks. It imports no torch before there is something to start, so that `--cfg job` and every mistake answer at once.
All of Hydra's own flags work; its errors become titan's: one message, exit code 2, no traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from titan.config.check import check_config
from titan.config.degrees import world_size
from titan.config.load import (
    COMPOSITION_ERRORS,
    CONFIG_NAME,
    HYDRA_VERSION,
    compose_untyped,
    conf_dir,
    explain_composition,
    points_of_sweep,
    register_schema,
    to_typed,
)
from titan.config.schema import TitanConfig
from titan.errors import INTERRUPTED, ConfigError, Problem, TitanError
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
    is_composed = False

    def run(composed: DictConfig) -> float | None:
        nonlocal is_composed
        is_composed = True
        with _hydra_shows_tracebacks(None):
            try:
                outcomes.append(run_point(composed, arguments))
            except TitanError as error:  # Hydra would announce it with a line of its own
                _exit_with(error)
        return RunDirectory(outcomes[-1].directory).read_status().get("loss")

    register_schema()
    arguments = get_args_parser().parse_args()
    try:
        if arguments.multirun:
            check_points(arguments)
        # Without this, Hydra prints its errors and exits with 1 before they reach us.
        with _hydra_shows_tracebacks("1"):
            hydra.main(version_base=HYDRA_VERSION, config_path=str(conf_dir()), config_name=CONFIG_NAME)(run)()
    except TitanError as error:
        _exit_with(error)
    except SystemExit as stop:
        # what Hydra refuses by itself is a mistake in the command
        sys.exit(ConfigError.exit_code if stop.code == 1 and not is_composed else stop.code)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if is_composed:
            raise
        _exit_with(ConfigError(_explain(error, arguments.overrides, arguments)))
    if len(outcomes) > 1:
        for line in summarise(outcomes):
            logger.info(line)
    sys.stdout.flush()
    sys.stderr.flush()
    code = next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0)
    if code and "torch" in sys.modules:
        os._exit(code)  # threads of a rank that failed in this process may hang in a collective
    sys.exit(code)


def check_points(arguments: Namespace) -> None:
    """Check every point of a sweep before the first one starts.

    Raises:
        ConfigError: With the problems of all points, each problem once.
    """
    try:
        points = points_of_sweep(arguments.overrides, arguments.config_dir)
    except HydraException:
        return  # unreadable, which Hydra will say; or a sweeper that chooses its points as it goes
    found: dict[Problem, list[str]] = {}
    for overrides in points:
        try:
            composed = compose_untyped(overrides, arguments.config_dir, arguments.config_name or CONFIG_NAME)
            check_config(to_typed(composed), current_machine())
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(" ".join(overrides))
        except COMPOSITION_ERRORS:
            return  # Hydra meets it too, and it is explained there
    if found:
        raise ConfigError(
            replace(problem, what=f"{problem.what}   (at {len(where)} of {len(points)} points: {where[0]})")
            if len(where) < len(points)
            else problem
            for problem, where in found.items()
        )


def run_point(composed: DictConfig, arguments: Namespace) -> Outcome:
    """Check, freeze and run one composed config; returns how it ended.

    Raises:
        ConfigError: If the config is wrong; nothing was started or changed.
    """
    settings = HydraConfig.get()
    # not resolved: an override may refer to a key that only the whole config has
    overrides = [str(text) for text in OmegaConf.to_container(settings.overrides.task, resolve=False) or ()]
    try:
        config = to_typed(composed)
    except (ConfigError, *COMPOSITION_ERRORS) as error:
        raise ConfigError(_explain(error, overrides, arguments)) from error
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
    common = set.intersection(*(set(outcome.overrides) for outcome in outcomes))
    rows = [("point", "status", "loss", "tok/s", "varied", "directory")]
    for number, outcome in enumerate(outcomes):
        directory = RunDirectory(outcome.directory)
        last = _last_row(directory)
        rows.append(
            (
                str(number),
                directory.read_status().get("state", "failed"),
                f"{last['loss']:.4f}" if last else "-",
                f"{last['tokens_per_second']:,.0f}" if last else "-",
                " ".join(text for text in outcome.overrides if text not in common) or "-",
                _shown(directory.path),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield ""
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _explain(error: Exception, overrides: list[str], arguments: Namespace) -> list[Problem]:
    return explain_composition(
        error,
        overrides,
        arguments.config_dir,
        arguments.config_name or CONFIG_NAME,
        current_machine(),
        arguments.multirun,
    )


def _last_row(directory: RunDirectory) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
        return next((row for row in reversed(rows) if "loss" in row), None)
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
