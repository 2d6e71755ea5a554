"""A frozen run, started on this machine: what the command does last, and what a program starts as a process.

    python -m titan.api.start <run.dir>/config.yaml

It imports no torch before there is a rank to start.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from titan.config.degrees import world_size
from titan.config.load import load_config
from titan.config.schema import TitanConfig
from titan.errors import ConfigError, RanksFailed, Stopped, TitanError
from titan.launch.local import launch_local
from titan.log import start_logging
from titan.run_directory import RunDirectory


def run_frozen(config: TitanConfig, directory: RunDirectory) -> int:
    """Run a frozen config in this process, or in one for each rank; returns the exit code.

    Args:
        config: What the directory has.
        directory: The run's.
    """
    from titan import worker

    ranks = world_size(config.cluster)
    if ranks == 1:
        return worker.main([str(directory.config)])
    try:
        launch_local(directory, ranks, config.cluster.grace_seconds, environment=config.cluster.environment)
    except TitanError as error:
        if not isinstance(error, Stopped):  # which rank 0 has said
            print(f"\n{error}", file=sys.stderr)
        said = directory.read_status()
        first = error.rank if isinstance(error, RanksFailed) else None
        is_refused = error.exit_code == ConfigError.exit_code  # the files may be those of another run, which has them
        if not is_refused and (said.get("state") == "running" or (first is not None and said.get("rank") != first)):
            directory.write_status("failed", why=str(error), rank=first, exit_code=error.exit_code)
        return error.exit_code
    return 0


def main() -> int:
    """Run the config on the command line; returns the exit code."""
    from titan.worker import check_is_launchers

    start_logging()
    path = Path(sys.argv[1])
    try:
        config = load_config(path)
        check_is_launchers(path)
    except TitanError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return run_frozen(config, RunDirectory(Path(config.run.dir)))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # after a failure, threads of a rank may hang in a collective
