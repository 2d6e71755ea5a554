"""The command: `python -m titan.train [group=option] [group.key=value]`.

Composes a config, converts it to typed dataclasses, checks it, freezes it into the run directory and starts the
ranks. It imports no torch before there is something to start, so that `--cfg job` and every mistake answer at once.
All of Hydra's own flags work; its errors become titan's: one message, exit code 2, no traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

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
from titan.config.schema import ClusterKind, TitanConfig
from titan.errors import INTERRUPTED, ConfigError, Problem, RanksFailed, TitanError
from titan.launch.dispatch import Frozen, freeze
from titan.launch.environment import current_machine, current_rank
from titan.launch.local import launch_local
from titan.log import logger, silence, start_logging
from titan.run_directory import RunDirectory, short_path

_TOLD_TO_STOP = (INTERRUPTED, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class Outcome:
    """How one run ended."""

    overrides: list[str]
    directory: Path
    exit_code: int

    @property
    def state(self) -> str:
        """What the run says of itself, or that this point was not let into its directory."""
        if self.exit_code == ConfigError.exit_code:
            return "refused"
        return RunDirectory(self.directory).read_status().get("state", "failed")


def main() -> None:
    """Run the command line and exit with the code that `titan.errors` documents."""
    start_logging()
    register_schema()
    arguments = parse_arguments()
    try:
        outcomes = run_command(arguments)
    except TitanError as error:
        _exit_with(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `--help | head`
        silence(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    if len(outcomes) > 1:
        for line in summarise(outcomes):
            logger.info(line)
    sys.stdout.flush()
    sys.stderr.flush()
    code = next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0)
    ranks = sys.modules.get("torch.distributed")
    if code and ranks is not None and ranks.is_initialized():
        os._exit(code)  # threads of a rank that failed in this process may hang in a collective
    sys.exit(code)


def parse_arguments() -> Namespace:
    """Return the command line; flags may stand anywhere, which Hydra alone allows at its ends only."""
    arguments = get_args_parser().parse_intermixed_args()
    flags = [word for word in sys.argv[1:] if word not in arguments.overrides]
    sys.argv[1:] = arguments.overrides + flags  # in this order: --info would take an override for its value
    return arguments


def run_command(arguments: Namespace) -> list[Outcome]:
    """Let Hydra compose, and run every point of what it composed; returns how they ended.

    Raises:
        TitanError: If the command is wrong.
        SystemExit: After a flag that shows something and starts nothing.
    """
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
        if outcomes[-1].exit_code in _TOLD_TO_STOP:
            sys.exit(outcomes[-1].exit_code)  # or the next point of a sweep would start
        return RunDirectory(outcomes[-1].directory).read_status().get("loss")

    try:
        if is_sweep(arguments):
            check_points(arguments)
        # Without this, Hydra prints its errors and exits with 1 before they reach us.
        with _hydra_shows_tracebacks("1"):
            hydra.main(version_base=HYDRA_VERSION, config_path=str(conf_dir()), config_name=CONFIG_NAME)(run)()
    except SystemExit as stop:
        # what Hydra refuses by itself is a mistake in the command
        sys.exit(ConfigError.exit_code if stop.code == 1 and not is_composed else stop.code)
    except (TitanError, BrokenPipeError):
        raise
    except Exception as error:
        if is_composed:
            raise
        raise ConfigError(_explain(error, arguments.overrides, arguments)) from error
    return outcomes


def is_sweep(arguments: Namespace) -> bool:
    """Whether the command line asks for several points."""
    return arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides


def check_points(arguments: Namespace) -> None:
    """Check every point of a sweep before Hydra writes anything or the first one starts.

    Raises:
        ConfigError: With the problems of all points, each problem once.
        Exception: What Hydra and OmegaConf raise where a point does not compose.
    """
    try:
        points = points_of_sweep(arguments.overrides, arguments.config_dir)
    except HydraException:
        return  # unreadable, which Hydra will say; or a sweeper that chooses its points as it goes
    if not points:
        raise ConfigError([Problem("the sweep has no point", "A glob() or a range() in it gives nothing.")])
    found: dict[Problem, list[str]] = {}
    for overrides in points:
        try:
            composed = compose_untyped(overrides, arguments.config_dir, arguments.config_name or CONFIG_NAME)
            check_config(to_typed(composed), current_machine())
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(" ".join(overrides))
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
    is_point = settings.mode is RunMode.MULTIRUN
    if is_point:
        config = replace(config, run=replace(config.run, dir=settings.runtime.output_dir))
        varied = [text for text in overrides if text not in arguments.overrides]
        logger.info(f"\n== point {settings.job.num}: {' '.join(varied) or 'nothing varied'}")
    config = check_config(config, current_machine())
    directory = RunDirectory(Path(config.run.dir))
    try:
        code = dispatch(config, directory, overrides)
    except ConfigError as error:
        if not is_point:
            raise
        print(error, file=sys.stderr)  # the other points have directories of their own
        code = error.exit_code
    return Outcome(overrides, directory.path, code)


def dispatch(config: TitanConfig, directory: RunDirectory, overrides: list[str]) -> int:
    """Start the ranks, or be one; returns the exit code."""
    if config.cluster.kind is ClusterKind.simulated:
        from titan import simulate

        for line in simulate.describe(config, simulate.simulate(config)):
            logger.info(line)
        return 0
    from titan import worker

    rank = current_rank()
    if rank is not None:  # an outer launcher has started us as a rank
        return worker.run_started_rank(config, rank, overrides)
    if freeze(config, directory, overrides) is Frozen.complete:
        logger.info(f"{directory.path}: this run is complete (step {config.training.steps}); nothing to do")
        return 0
    logger.info(f"run        {short_path(directory.path)}")
    ranks = world_size(config.cluster)
    if ranks == 1:
        return worker.main([str(directory.config)])
    try:
        launch_local(directory, ranks)
    except TitanError as error:
        print(f"\n{error}", file=sys.stderr)
        said = directory.read_status()
        first = error.rank if isinstance(error, RanksFailed) else None
        if said.get("state") == "running" or (first is not None and said.get("rank") != first):
            directory.write_status("failed", why=str(error), rank=first, exit_code=error.exit_code)
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
                outcome.state,
                f"{last['loss']:.4f}" if last else "-",
                f"{last['tokens_per_second']:,.0f}" if last else "-",
                " ".join(text for text in outcome.overrides if text not in common) or "-",
                short_path(directory.path),
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
        is_sweep(arguments),
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


def _exit_with(error: TitanError) -> NoReturn:
    try:
        rank = current_rank()
    except ConfigError:  # which is what `error` says
        rank = None
    if rank is None or rank.rank == 0:  # all ranks of an outer launcher find the same mistake
        print(error, file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
