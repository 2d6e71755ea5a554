"""Runs that SLURM is to start: frozen, submitted together, and watched where somebody wants to.

A run here is one that is wanted and checked, alone or as a point of a sweep.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titan.config.load import load_config
from titan.config.schema import ClusterKind, TitanConfig
from titan.errors import INTERRUPTED, ConfigError, Problem
from titan.launch import slurm
from titan.launch.dispatch import Frozen, already_complete, changed_keys, freeze
from titan.launch.jobs import SlurmJob, live_job, watch
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
        ConfigError: If there is no SLURM here, or a directory holds another run or belongs to a job that has not ended.
        SubmissionFailed: If SLURM refuses a job; what was submitted before has been shown.
        SystemExit: After showing the batch script, which is all that `cluster.print_script` asks for.
    """
    cluster = points[0].config.cluster
    if any(point.config.cluster.kind is not ClusterKind.slurm for point in points):
        raise ConfigError(
            [Problem("hydra/launcher=titan_slurm submits to SLURM, but the cluster is another", "", "cluster=slurm")]
        )
    sweep = points[0].directory.path.parent if is_sweep else None
    if cluster.print_script:
        for batch in slurm.batches([(point.config, point.directory) for point in points], sweep):
            print(slurm.batch_script(batch, points[batch.points[0]].config.cluster))
        sys.exit(0)
    slurm.check_can_submit(cluster)
    with _as_before_on_failure(points):
        found = [_freeze(point, is_sweep) for point in points]
        to_do = [index for index, each in enumerate(found) if each in (Frozen.new, Frozen.continued)]
        try:
            jobs = slurm.submit([(points[index].config, points[index].directory) for index in to_do], sweep)
        except slurm.SubmissionFailed as error:
            for line in slurm.describe_jobs(error.submitted):
                logger.info(line)
            raise
    for point, each in zip(points, found, strict=True):
        if each is Frozen.complete:
            logger.info(already_complete(point.config, point.directory))
        elif isinstance(each, str):
            logger.info(f"{short_path(point.directory.path)}: job {each} has it already, and has not ended")
    if jobs:
        logger.info(f"run        {short_path(sweep or jobs[0].directory.path)}")
    for line in slurm.describe_jobs(jobs):
        logger.info(line)
    job_of = dict(zip(to_do, jobs, strict=True))
    codes = dict(zip(job_of, wait_for(jobs), strict=True)) if jobs and cluster.wait else {}
    outcomes = []
    for index, (point, each) in enumerate(zip(points, found, strict=True)):
        has_it = each if isinstance(each, str) else job_of[index].id if index in job_of and not codes else ""
        outcomes.append(Outcome(point.overrides, point.directory.path, codes.get(index, 0), has_it))
    return outcomes


def _freeze(point: Point, is_sweep: bool) -> Frozen | str:
    """Freeze a point's config; returns the job that has it instead, where a point of a sweep was submitted before."""
    job = live_job(point.directory) if is_sweep else None
    if job is not None and not changed_keys(load_config(point.directory.config), point.config):
        return job
    return freeze(point.config, point.directory, point.overrides)


def wait_for(jobs: list[SlurmJob]) -> list[int]:
    """Show how jobs fare until all are over; returns their exit codes.

    One job's log is shown as it is written. Of several, every change of state.
    """
    try:
        for job, event in watch(jobs):
            if isinstance(event, str):
                logger.info(event)
            else:
                logger.info(f"job {job.id}: {event.name}" + (f" ({event.reason})" if event.reason else ""))
    except KeyboardInterrupt:
        ids = " ".join(dict.fromkeys(job.id.partition("_")[0] for job in jobs))
        print(f"\nno longer waiting; the job goes on. To end it:  scancel {ids}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    codes = [job.exit_code() for job in jobs]
    for job, code in zip(jobs, codes, strict=True):
        status = job.status()
        if code and status.get("state", "running") == "running":  # its ranks had no time to say anything
            job.directory.write_status("failed", f"SLURM says that job {job.id} is {job.state().name}", exit_code=code)
            status = job.directory.read_status()
        if code and len(jobs) == 1:
            where = ""
            if (rank := status.get("rank")) is not None:
                where = f"\n  log: {short_path(job.directory.log(rank, status.get('attempt', 0)))}"
            print(f"\njob {job.id} ended with exit code {code}: {status['why']}{where}", file=sys.stderr)
    return codes


@contextlib.contextmanager
def _as_before_on_failure(points: list[Point]) -> Iterator[None]:
    """Put the configs of run directories back, and take new directories away, where nothing was submitted."""
    before = []
    for directory in (point.directory for point in points):
        files = [file for file in (directory.config, directory.overrides) if file.exists()]
        kept = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
        before.append((directory, directory.path.exists(), kept, len(directory.read_events("submit"))))
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, slurm.SubmissionFailed) and error.may_be_submitted):
            for directory, was_there, kept, submitted in before:
                if len(directory.read_events("submit")) > submitted:
                    continue
                if not was_there:
                    shutil.rmtree(directory.path, ignore_errors=True)
                    continue
                for file in (directory.config, directory.overrides):
                    file.unlink(missing_ok=True)
                for file, (text, written) in kept.items():
                    file.write_bytes(text)
                    os.utime(file, ns=(written, written))  # what is newer than the config is of its run
        raise
