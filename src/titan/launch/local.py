"""Ranks as processes of this machine, through PyTorch's elastic agent.

The agent starts one `python -m titan.worker` for every device, watches them, and ends them all when one fails. It is
given a command and not a function: nothing is pickled, so it works from a notebook too, and a rank started here is
started as on any cluster.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from titan.errors import ConfigError, PeerLost, RanksFailed, StepHung, Stopped, TitanError
from titan.launch.environment import CONFIG_DIGEST, config_digest, threads_per_rank
from titan.launch.signals import Forwarder
from titan.run_directory import RunDirectory, short_path

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


class Interrupted(TitanError):
    """The launcher was told to stop by a signal; its ranks have been stopped."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; all ranks have ended")
        self.exit_code = 128 + number


def launch_local(
    directory: RunDirectory,
    ranks: int,
    grace_seconds: float,
    command: Sequence[str] = ("titan.worker",),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Start ranks and wait for them.

    Args:
        directory: The run's; its config must be frozen.
        ranks: How many.
        grace_seconds: How long the ranks may take to save and end, once this process is told to stop.
        command: The module that each rank runs, and its arguments before the path of the config.
        environment: More variables for the ranks.

    Raises:
        RanksFailed: If a rank failed; names the first that did, and carries its exit code.
        Stopped: If this process was told to stop, and the ranks have saved and ended.
        Interrupted: If it was told to stop at once (a second Ctrl-C, or one before the first step), or the ranks did
            not end within the grace.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    notes = tempfile.TemporaryDirectory(prefix="titan_", ignore_cleanup_errors=True)  # the agent would leave its own
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=directory.path.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=notes.name),
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are the forwarder's
    )
    before = dict(os.environ)
    os.environ |= environment or {}
    os.environ["OMP_NUM_THREADS"] = str(threads_per_rank(ranks))
    os.environ["TITAN_LAUNCHER_PID"] = str(os.getpid())
    os.environ[CONFIG_DIGEST] = config_digest(directory.config)
    before_run = directory.read_status()

    def is_training() -> bool:
        status = directory.read_status()
        return status != before_run and status.get("state") == "running" and "step" in status

    def interrupt(number: signal.Signals) -> NoReturn:
        raise SignalException(f"interrupted: the ranks get {number.name}", number)

    forwarder = Forwarder(grace_seconds, is_training, interrupt)
    try:
        with forwarder:
            elastic_launch(agent, entrypoint=sys.executable)("-u", "-m", *command, str(directory.config))
    except ChildFailedError as error:
        status = directory.read_status()
        if status != before_run and status.get("state") == "preempted":
            raise Stopped(status["signal"], status["step"], status["saved_step"]) from None
        if status != before_run and status.get("exit_code") == StepHung.exit_code:
            # the first to end is one that has waited; who hangs, all ranks have found out together
            why = status["why"].removeprefix(f"{StepHung.__name__}: ")
            raise RanksFailed(why, status["rank"], StepHung.exit_code) from None
        raise _explain(error, directory) from None
    except SignalException as error:
        raise Interrupted(forwarder.told or int(error.sigval)) from None
    finally:
        os.environ.clear()
        os.environ.update(before)
        notes.cleanup()


def _explain(error: ChildFailedError, directory: RunDirectory) -> RanksFailed:
    rank, failure = min(error.failures.items(), key=lambda item: _precedence(item[1]))
    message = _exception_of(failure)
    if failure.exitcode == ConfigError.exit_code and not message:
        return RanksFailed(f"rank {rank} was refused, as it says above", rank, failure.exitcode)
    if not message:
        number = failure.exitcode
        message = f"ended by {signal.Signals(-number).name}" if number < 0 else f"exit code {number}, no exception"
    code = failure.exitcode if failure.exitcode > 0 else 1
    return RanksFailed(f"rank {rank} failed first: {message}\n  log: {short_path(directory.log(rank, 0))}", rank, code)


def _precedence(failure: ProcessFailure) -> tuple[int, float]:
    """Order failures by cause and time.

    One rank's end makes others fail within milliseconds. The agent itself goes by whole seconds, and knows of a rank
    that was killed only when it looks.
    """
    message = _exception_of(failure)
    if message:
        kind = 2 if message.startswith(PeerLost.__name__) else 0
        return kind, os.stat(failure.error_file).st_mtime
    return 3 if failure.exitcode == -signal.SIGTERM else 1, failure.timestamp  # SIGTERM is how the agent ends the rest


def _exception_of(failure: ProcessFailure) -> str:
    """Return the exception that a rank has left for the agent, or nothing."""
    if not os.path.isfile(failure.error_file) or not isinstance(failure.error_file_data, dict):
        return ""
    message = failure.error_file_data.get("message", "")
    return str(message.get("message", "")) if isinstance(message, dict) else str(message)
