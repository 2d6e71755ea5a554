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
from collections.abc import Sequence
from pathlib import Path

from titan.errors import RanksFailed, TitanError
from titan.launch.environment import threads_per_rank
from titan.run_directory import RunDirectory


class Interrupted(TitanError):
    """The launcher was told to stop by a signal; its ranks have been stopped."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; all ranks have ended")
        self.exit_code = 128 + number


def launch_local(directory: RunDirectory, ranks: int, command: Sequence[str] = ("titan.worker",)) -> None:
    """Start ranks and wait for them.

    Args:
        directory: The run's; its config must be frozen.
        ranks: How many.
        command: The module that each rank runs, and its arguments before the path of the config.

    Raises:
        RanksFailed: If a rank failed; names the first that did, and carries its exit code.
        Interrupted: If this process was told to stop.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=directory.path.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads_per_rank(ranks))
    os.environ["TITAN_LAUNCHER_PID"] = str(os.getpid())
    try:
        elastic_launch(agent, entrypoint=sys.executable)("-u", "-m", *command, str(directory.config))
    except ChildFailedError as error:
        raise _explain(error, directory) from None
    except SignalException as error:
        raise Interrupted(int(error.sigval)) from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def _explain(error, directory: RunDirectory) -> RanksFailed:
    rank, failure = error.get_first_failure()
    log = directory.log(rank, 0)
    details = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    message = details.get("message") if isinstance(details, dict) else details
    if not message or message == "<NONE>":
        message = f"ended by {signal.Signals(-failure.exitcode).name}" if failure.exitcode < 0 else "no exception"
    code = failure.exitcode if failure.exitcode > 0 else 1
    return RanksFailed(f"rank {rank} failed first: {message}\n  log: {_relative(log)}", code)


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
