"""Runs that SLURM is to start: frozen, submitted together, and watched where somebody wants to.

A run here is one that is wanted and checked, alone or as a point of a sweep.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titan.config.schema import TitanConfig
from titan.errors import INTERRUPTED, ConfigError, Problem
from titan.launch import slurm
from titan.launch.dispatch import Frozen, freeze
from titan.log import logger
from titan.run_directory import RunDirectory, short_path


@dataclass(frozen=True)
class Point:
    """A run that is wanted: all there is to know before anything is started."""

    config: TitanConfig
    """Checked."""
    directory: RunDirectory
    overrides: list[str]
    """What was typed for it."""


@dataclass(frozen=True)
class Outcome:
    """How one run ended, or that it was submitted."""

    overrides: list[str]
    directory: Path
    exit_code: int
    job: str = ""
    """The SLURM job that has it, where nobody waits for its end."""

    @property
    def state(self) -> str:
        """What the run says of itself, or that this point was not let into its directory."""
        if self.exit_code == ConfigError.exit_code:
            return "refused"
        if self.job:
            return f"job {self.job}"
        return RunDirectory(self.directory).read_status().get("state", "failed")


def submit_points(points: list[Point], is_sweep: bool = True) -> list[Outcome]:
    """Freeze and submit runs; with `cluster.wait`, stay until they have ended.

    Raises:
        ConfigError: If there is no SLURM here, it refuses, or a directory holds another run.
        SystemExit: After showing the batch script, which is all that `cluster.print_script` asks for.
    """
    cluster = points[0].config.cluster
    sweep = points[0].directory.path.parent if is_sweep else None
    if cluster.print_script:
        for group in slurm.group_by_resources([point.config for point in points]):
            first, is_array = points[group[0]], sweep is not None and len(group) > 1
            folder = slurm.folder_of_array(sweep) if sweep is not None and is_array else first.directory.slurm
            print(slurm.batch_script(first.config, folder, len(group)))
        sys.exit(0)
    slurm.check_can_submit(cluster)
    with _unfrozen_on_failure(points):
        for point in points:
            if (job := slurm.live_job(point.directory)) is not None:
                raise ConfigError(
                    [
                        Problem(
                            f"run.dir = {point.directory.path} belongs to job {job}, which has not ended",
                            "Two jobs would write to the same files.",
                            f"scancel {job}   or  run.dir=ANOTHER   for a new run",
                        )
                    ]
                )
        found = [freeze(point.config, point.directory, point.overrides) for point in points]
        to_do = [index for index, each in enumerate(found) if each is not Frozen.complete]
        jobs = slurm.submit([(points[index].config, points[index].directory) for index in to_do], sweep)
    for index in set(range(len(points))) - set(to_do):
        logger.info(already_complete(points[index]))
    job_of = dict(zip(to_do, jobs, strict=True))
    if jobs:
        logger.info(f"run        {short_path(sweep or jobs[0].directory.path)}")
    for line in slurm.describe_jobs(jobs):
        logger.info(line)
    codes = dict.fromkeys(job_of, 0)
    is_waiting = bool(jobs) and cluster.wait
    if is_waiting:
        codes = dict(zip(job_of, wait_for(jobs), strict=True))
    return [
        Outcome(
            point.overrides,
            point.directory.path,
            codes.get(index, 0),
            job="" if is_waiting or index not in job_of else job_of[index].id,
        )
        for index, point in enumerate(points)
    ]


def wait_for(jobs: list[slurm.SlurmJob]) -> list[int]:
    """Show how jobs fare until all are over; returns their exit codes.

    One job's log is shown as it is written. Of several, every change of state.
    """
    try:
        for job, event in slurm.watch(jobs):
            if isinstance(event, str):
                logger.info(event)
            else:
                logger.info(f"job {job.id}: {event.name}" + (f" ({event.reason})" if event.reason else ""))
    except KeyboardInterrupt:
        ids = " ".join(job.id for job in jobs)
        print(f"\nno longer waiting; the job goes on. To end it:  scancel {ids}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    codes = [job.exit_code() for job in jobs]
    for job, code in zip(jobs, codes, strict=True):
        status = job.directory.read_status()
        if code and len(jobs) == 1:
            why = status.get("why") or f"SLURM says {job.state().name}"
            rank = status.get("rank")
            where = f"\n  log: {short_path(job.directory.log(rank, 0))}" if rank is not None else ""
            print(f"\njob {job.id} ended with exit code {code}: {why}{where}", file=sys.stderr)
    return codes


def already_complete(point: Point) -> str:
    """Say that there is nothing to do."""
    return f"{point.directory.path}: this run is complete (step {point.config.training.steps}); nothing to do"


@contextlib.contextmanager
def _unfrozen_on_failure(points: list[Point]) -> Iterator[None]:
    """Leave run directories as they were, where nothing was submitted."""
    files = [file for point in points for file in (point.directory.config, point.directory.overrides)]
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    try:
        yield
    except ConfigError:
        for file, text in before.items():
            if file.parent.is_dir() and not RunDirectory(file.parent).read_events("submit"):
                file.unlink(missing_ok=True) if text is None else file.write_bytes(text)
        raise
