"""The command: `python -m titan.train [group=option] [group.key=value]`.

Composes a config, converts it to typed dataclasses, checks it, freezes it into the run directory and starts the
ranks. It imports no torch before there is something to start, so that `--cfg job` and every mistake answer at once.
All of Hydra's own flags work; its errors become titan's: one message, exit code 2, no traceback.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from titan.api.start import run_frozen
from titan.config.check import check_config
from titan.config.explain import check_switches
from titan.config.load import (
    COMPOSITION_ERRORS,
    CONFIG_NAME,
    HYDRA_VERSION,
    Composer,
    conf_dir,
    explain_composition,
    points_of_sweep,
    register_schema,
    to_typed,
)
from titan.config.schema import ClusterKind
from titan.errors import INTERRUPTED, TERMINATED, ConfigError, Problem, Stopped, TitanError
from titan.launch.dispatch import Frozen, already_complete, freeze
from titan.launch.environment import adopt_slurm_step, current_machine, current_rank
from titan.launch.submit import Outcome, Point, submit_points
from titan.log import logger, silence, start_logging
from titan.run_directory import RunDirectory, short_path
from titan.version import __version__

_TOLD_TO_STOP = (INTERRUPTED, TERMINATED, Stopped.exit_code)
_SPEAKER_SECONDS = 5.0
"""How long the ranks of an outer launcher that have nothing to say wait for the one that speaks."""


def main() -> None:
    """Run the command line and exit with the code that `titan.errors` documents."""
    start_logging()
    register_schema()
    arguments = parse_arguments()
    try:
        adopt_slurm_step()
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
    _flush()
    code = next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0)
    ranks = sys.modules.get("torch.distributed")
    if code and ranks is not None and ranks.is_initialized():
        os._exit(code)  # threads of a rank that failed in this process may hang in a collective
    sys.exit(code)


def parse_arguments() -> Namespace:
    """Return the command line; flags may stand anywhere, which Hydra alone allows at its ends only."""
    parser = get_args_parser()
    for action in parser._actions:
        if "--version" in action.option_strings:
            action.version = f"titan {__version__}"  # type: ignore[attr-defined]  # and not Hydra's
    arguments = parser.parse_intermixed_args()
    flags = [word for word in sys.argv[1:] if word not in arguments.overrides]
    sys.argv[1:] = arguments.overrides + flags  # in this order: --info would take an override for its value
    return arguments


def run_command(arguments: Namespace) -> list[Outcome]:
    """Let Hydra compose, and run every point of what it composed; returns how they ended.

    Raises:
        TitanError: If the command is wrong.
        SystemExit: After a flag that shows something and starts nothing.
    """
    command = Command(arguments)
    try:
        if is_sweep(arguments):
            check_points(arguments)
        # Without this, Hydra prints its errors and exits with 1 before they reach us.
        with _hydra_shows_tracebacks("1"):
            hydra.main(version_base=HYDRA_VERSION, config_path=str(conf_dir()), config_name=CONFIG_NAME)(command)()
    except SystemExit as stop:
        # what Hydra refuses by itself is a mistake in the command
        sys.exit(ConfigError.exit_code if stop.code == 1 and not command.is_composed else stop.code)
    except (TitanError, BrokenPipeError):
        raise
    except Exception as error:
        if type(error).__module__.startswith("submitit."):  # a job of hydra-submitit-launcher's has failed
            raise TitanError(str(error)) from error
        if command.is_composed:
            raise
        raise ConfigError(_explain(error, arguments.overrides, arguments)) from error
    return command.outcomes


class Command:
    """What Hydra calls with what it has composed: once, or for every point of a sweep."""

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments
        self.outcomes: list[Outcome] = []
        self.is_composed = False

    def __call__(self, composed: DictConfig) -> float | None:
        """Run one point; returns its last loss, which is what Hydra's sweepers look at."""
        self.is_composed = True
        # a task of hydra-submitit-launcher's, where `main` has not run
        is_task = "SUBMITIT_EXECUTOR" in os.environ and "hydra_submitit_launcher" in str(
            HydraConfig.get().launcher._target_
        )
        requeue = signal.getsignal(signal.SIGUSR2)
        if is_task:
            start_logging()
            adopt_slurm_step(is_rank=True)
        with _hydra_shows_tracebacks(None):
            try:
                self.outcomes.append(run_point(composed, self.arguments))
            except TitanError as error:  # Hydra would announce it with a line of its own
                _exit_with(error)
        last = self.outcomes[-1]
        if is_task and last.exit_code:
            rank = current_rank()
            try:
                if last.exit_code == Stopped.exit_code and callable(requeue) and (rank is None or rank.rank == 0):
                    requeue(signal.SIGUSR2, None)  # submitit's own way to put the job back
            finally:  # It takes anything but an exit for a success, and SLURM would too.
                _flush()
                os._exit(last.exit_code)
        if last.exit_code in _TOLD_TO_STOP:
            sys.exit(last.exit_code)  # or the next point of a sweep would start
        result = _result(last, HydraConfig.get())
        if isinstance(result, TitanError):
            raise result
        return result

    def submit_points(self, points: list[DictConfig]) -> list[float | TitanError | None]:
        """Check and submit all points of a sweep, for titan's own launcher; returns last losses, or failures."""
        self.is_composed = True
        with _hydra_shows_tracebacks(None):
            try:
                wanted = [read_point(composed, self.arguments) for composed in points]
                settings = points[0].hydra
                if learns_from_losses(settings) and not wanted[0].config.cluster.wait:
                    raise ConfigError(
                        [
                            Problem(
                                f"{settings.sweeper._target_} chooses points by others' losses, which nobody waits for",
                                "cluster=slurm submits and returns.",
                                "cluster.wait=true",
                            )
                        ]
                    )
                self.outcomes += submit_points(wanted)
            except TitanError as error:
                _exit_with(error)
        return [_result(outcome, settings) for outcome in self.outcomes[-len(points) :]]


def is_sweep(arguments: Namespace) -> bool:
    """Whether the command line asks for several points."""
    return arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides


def learns_from_losses(settings: DictConfig | HydraConf) -> bool:
    """Whether Hydra's sweeper is one that chooses points by what came of others."""
    return "BasicSweeper" not in str(settings.sweeper._target_)


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
    composed = map(Composer(arguments.config_dir, arguments.config_name or CONFIG_NAME), points)
    for overrides, each in zip(points, composed, strict=True):
        try:
            check_config(to_typed(each), current_machine())
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


def read_point(composed: DictConfig, arguments: Namespace) -> Point:
    """Convert and check one composed config.

    Raises:
        ConfigError: If the config is wrong.
    """
    settings = composed.hydra if "hydra" in composed else HydraConfig.get()
    # not resolved: an override may refer to a key that only the whole config has
    overrides = [str(text) for text in OmegaConf.to_container(settings.overrides.task, resolve=False) or ()]
    try:
        config = to_typed(composed)
    except (ConfigError, *COMPOSITION_ERRORS) as error:
        raise ConfigError(_explain(error, overrides, arguments)) from error
    check_switches(overrides)
    if settings.mode is RunMode.MULTIRUN:
        config = replace(config, run=replace(config.run, dir=settings.runtime.output_dir))
    config = check_config(config, current_machine())
    return Point(config, RunDirectory(Path(config.run.dir)), overrides)


def run_point(composed: DictConfig, arguments: Namespace) -> Outcome:
    """Check, freeze and run one composed config; returns how it ended.

    Raises:
        ConfigError: If the config is wrong; nothing was started or changed.
    """
    point = read_point(composed, arguments)
    settings = HydraConfig.get()
    is_point = settings.mode is RunMode.MULTIRUN
    if is_point:
        varied = [text for text in point.overrides if text not in arguments.overrides]
        logger.info(f"\n== point {settings.job.num}: {' '.join(varied) or 'nothing varied'}")
    try:
        return dispatch(point)
    except ConfigError as error:
        if not is_point:
            raise
        print(error, file=sys.stderr)  # the other points have directories of their own
        return Outcome(point.overrides, point.directory.path, error.exit_code)


def dispatch(point: Point) -> Outcome:
    """Start the ranks, or be one, or have SLURM start them; returns how that ended."""
    config, directory, overrides = point.config, point.directory, point.overrides

    def ended(code: int) -> Outcome:
        return Outcome(overrides, directory.path, code)

    if config.cluster.kind is ClusterKind.simulated:
        from titan import simulate

        for line in simulate.describe(config, simulate.simulate(config)):
            logger.info(line)
        return ended(0)
    from titan import worker

    rank = current_rank()
    if rank is not None:  # an outer launcher has started us as a rank
        return ended(worker.run_started_rank(config, rank, overrides))
    if config.cluster.kind is ClusterKind.slurm:
        return submit_points([point], is_sweep=False)[0]
    if freeze(config, directory, overrides) is Frozen.complete:
        logger.info(already_complete(config, directory))
        return ended(0)
    logger.info(f"run        {short_path(directory.path)}")
    return ended(run_frozen(config, directory))


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


def _result(outcome: Outcome, settings: DictConfig | HydraConf) -> float | TitanError | None:
    """Return what Hydra's sweeper is to know of a point: its last loss; or its failure, if it would learn from it."""
    if outcome.exit_code and learns_from_losses(settings):
        return TitanError(f"{outcome.directory} ended with exit code {outcome.exit_code}")
    return RunDirectory(outcome.directory).read_status().get("loss")


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


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _exit_with(error: TitanError) -> NoReturn:
    try:
        rank = current_rank()
    except ConfigError:  # which is what `error` says
        rank = None
    if rank is None or rank.rank == 0:  # all ranks of an outer launcher find the same mistake
        print(error, file=sys.stderr)
        _flush()
    else:  # the first to end makes the launcher end the others, rank 0 before it has spoken
        time.sleep(_SPEAKER_SECONDS)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    gc.disable()  # composing and importing make a million objects that stay; until a rank trains
    main()
