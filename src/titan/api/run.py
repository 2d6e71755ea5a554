"""A run's handle: `titan.launch` starts a run and returns it, `titan.attach` finds it again.

A local run is a process of its own, in a session of its own: interrupting a cell does not reach it, a kernel that
restarts leaves it running, and what it writes on its console goes to a file of the run directory. Everything that a
handle knows it reads from there, from the lock of the live run, and from SLURM; so a handle made from the directory
alone is as good as the one that `launch` gave.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan.api.inputs import run_directory_of
from titan.api.page import escape, page
from titan.api.table import Table, read_table
from titan.config.check import check_config
from titan.config.load import load_config, retyped
from titan.config.schema import ClusterKind, TitanConfig
from titan.errors import CommandError, ConfigError, Problem, Stopped, TitanError
from titan.launch.dispatch import Frozen, already_complete, freeze
from titan.launch.environment import CONFIG_DIGEST, config_digest, current_machine, current_rank
from titan.launch.jobs import SETTLE_SECONDS, SlurmJob
from titan.launch.lock import RunInUse, check_not_in_use, read_owner
from titan.launch.submit import Point, submit_points
from titan.log import logger
from titan.run_directory import RunDirectory, short_path, utc_now

_POLL_SECONDS = 0.1
_SLURM_POLL_SECONDS = 2.0
_ENDED = ("complete", "preempted", "failed", "lost")


@dataclass(frozen=True)
class Status:
    """What became of a run so far."""

    state: str
    """starting, pending (in SLURM's queue), running, complete, preempted, failed; lost: it runs no more."""
    why: str = ""
    """The reason, where the state has one."""
    step: int | None = None
    """The last step that it has logged, or ended with."""
    exit_code: int | None = None
    """Once it has ended; see `titan.errors`."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in _ENDED

    def __str__(self) -> str:
        step = f" at step {self.step}" if self.step is not None else ""
        code = f", exit code {self.exit_code}" if self.exit_code else ""
        return f"{self.state}{step}{code}" + (f": {self.why}" if self.why else "")


class Run:
    """A run that was started.

    Args:
        directory: The run's.
        process: Where this process has started it.
        job: The SLURM job that has it.
        since: When it was started; what was written before says nothing of it.
    """

    def __init__(
        self,
        directory: RunDirectory,
        process: subprocess.Popen[bytes] | None = None,
        job: SlurmJob | None = None,
        since: str = "",
    ) -> None:
        self._directory, self._process, self._job, self._since = directory, process, job, since

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self._directory.path

    @property
    def job(self) -> str | None:
        """The SLURM job that has it, or None."""
        return self._job.id if self._job is not None else None

    @property
    def config(self) -> TitanConfig:
        """The frozen config."""
        return load_config(self._directory.config)

    @property
    def status(self) -> Status:
        """What the run says of itself now, held against whether it is still there."""
        # first whether it lives, and then what it says: what it says last, it says before it ends
        live = self._live_state()
        code = self._process.returncode if self._process is not None else None
        said = self._said()
        state, step = said.get("state", ""), said.get("step")
        if live == "running" and (state == "running" or not state):
            rows = self.metrics()
            return Status("running" if state else "starting", step=rows[-1]["step"] if rows else step)
        if live:
            return Status(live, step=step)
        if state in ("complete", "preempted", "failed"):
            codes = {"complete": 0, "preempted": Stopped.exit_code}
            return Status(state, said.get("why", ""), step, said.get("exit_code", codes.get(state, 1)))
        if self._job is not None:
            ended = self._job.state()
            return Status("failed", f"SLURM says that job {self._job.id} is {ended.name}", step, self._job.exit_code())
        if code is not None:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            why = f"{how} before it could say more; {short_path(self._directory.console)}"
            return Status("failed", why, step, code if code >= 0 else 128 - code)
        why = (
            "status.json says that it runs, but no process has its directory" if said else "nothing has started it yet"
        )
        return Status("lost", why, step)

    def wait(self, timeout_seconds: float | None = None) -> Status:
        """Return how the run ended, once it has. Interrupting this leaves the run as it is.

        Args:
            timeout_seconds: How long to wait; None waits on.

        Raises:
            TimeoutError: If it has not ended by then.
        """
        deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        ended_at = math.inf
        while True:
            if self._live_state() is None and (status := self.status).has_ended:
                ended_at = min(ended_at, time.monotonic())
                # SLURM shows a job as over that it is about to put back into the queue
                is_settled = self._job is None or not self._job.state().may_go_on
                if is_settled or time.monotonic() > ended_at + SETTLE_SECONDS:
                    return status
            else:
                ended_at = math.inf
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.directory} has not ended after {timeout_seconds:g} s: {self.status}")
            time.sleep(_POLL_SECONDS if self._job is None else _SLURM_POLL_SECONDS)

    def metrics(self) -> Table:
        """Return what the run has logged so far."""
        return read_table(self.directory)

    def cancel(self, at_once: bool = False) -> None:
        """Ask the run to stop after the step it is in, and to save; the same config goes on from there later.

        Returns at once; `wait()` returns when it has stopped. A run that has ended stays as it is.

        Args:
            at_once: End it without saving; of a SLURM job, SLURM's KillWait is what it has in any case.

        Raises:
            TitanError: If it runs on another machine, or SLURM refuses.
        """
        if self._live_state() is None:
            return
        if self._job is not None:
            _cancel_job(self._job.id)
            return
        pid = self._process.pid if self._process is not None else _launcher(self._directory)
        number = signal.SIGKILL if at_once else signal.SIGTERM
        if pid is None:
            pid = _first_rank(self._directory)
            # it tells the others; SIGTERM could mean to it that another rank has failed
            number = signal.SIGKILL if at_once else signal.SIGUSR1
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)

    def log(self, lines: int = 20) -> str:
        """Return the last lines that the run has written on its console.

        Args:
            lines: How many.
        """
        path = self._job.log if self._job is not None else self._directory.console
        try:
            return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def __repr__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"<titan run {short_path(self.directory)}{job}: {self.status}>"

    def _repr_html_(self) -> str:
        job = f" <span class='faint'>job {escape(self.job)}</span>" if self.job else ""
        return page(f"<b>{escape(short_path(self.directory))}</b>{job}<div>{escape(self.status)}</div>")

    def _said(self) -> dict[str, Any]:
        """Return status.json, unless an earlier start of the run has written it."""
        if self._job is not None:
            return self._job.status()
        status = self._directory.read_status()
        return status if str(status.get("time", "")) >= self._since else {}

    def _live_state(self) -> str | None:
        """Return pending or running; None where no process and no job has the run any more."""
        if self._job is not None:
            state = self._job.state()
            if state.has_ended:
                return None
            return "pending" if state.name in ("PENDING", "CONFIGURING", "REQUEUED", "") else "running"
        if self._process is not None:
            return "running" if self._process.poll() is None else None
        if _launcher(self._directory) is not None:
            return "running"
        try:
            check_not_in_use(self._directory, patience_seconds=0)
        except RunInUse:
            return "running"
        return None


_children: dict[Path, tuple[subprocess.Popen[bytes], str]] = {}
"""What this process has started, and when: so that `attach` has the exit code too."""


def start(config: TitanConfig) -> Run:
    """Check and freeze a config, and start its run; see `titan.launch`."""
    if not isinstance(config, TitanConfig):
        raise TypeError(f"titan.launch takes a config, as titan.compose gives it, not {type(config).__name__}")
    if (rank := current_rank()) is not None:
        raise ConfigError(f"titan.launch starts ranks, but this process is one (RANK={rank.rank})")
    config = check_config(retyped(config), current_machine())
    directory = RunDirectory(Path(config.run.dir))
    if config.cluster.kind is ClusterKind.simulated:
        problem = "cluster=simulated builds one rank and reports on it; there is no run to start"
        raise ConfigError([Problem(problem, suggestion="python -m titan.train cluster=simulated ...")])
    if config.cluster.kind is ClusterKind.slurm:
        return _submit(config, directory)
    if freeze(config, directory, []) is Frozen.complete:
        logger.info(already_complete(config, directory))
        return Run(directory)
    directory.console.parent.mkdir(parents=True, exist_ok=True)
    digest, since = config_digest(directory.config), utc_now()
    with directory.console.open("ab") as console:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "titan.api.start", str(directory.config)],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=os.environ | {CONFIG_DIGEST: digest},
            start_new_session=True,
        )
    directory.append_event("launch", host=socket.gethostname(), pid=process.pid)
    _children[directory.path] = process, since
    threading.Thread(target=process.wait, name="titan-run", daemon=True).start()  # or it would stay as a zombie
    return Run(directory, process, since=since)


def find(run_dir: str | Path) -> Run:
    """Return the handle of a run from its directory; see `titan.attach`."""
    directory = run_directory_of(run_dir)
    if not directory.config.is_file():
        raise CommandError(f"{directory.path} is no run directory: it has no config.yaml\n  Try  the run.dir of a run")
    starts = [event for event in directory.read_new_events(0)[0] if event.get("event") in ("launch", "submit")]
    if starts and starts[-1]["event"] == "submit":
        return Run(directory, job=_job(directory, starts[-1]["job"]))
    process, since = _children.get(directory.path, (None, ""))
    if process is not None and process.poll() is not None and Run(directory).status.state == "running":
        return Run(directory)  # somebody else has started it since
    return Run(directory, process, since=since)


def _submit(config: TitanConfig, directory: RunDirectory) -> Run:
    if config.cluster.print_script:
        problem = "cluster.print_script shows the batch script and starts nothing"
        raise ConfigError([Problem(problem, "There is no run to hold.", "cluster.print_script=false")])
    # it is the handle that waits
    outcome = submit_points([Point(replace(config, cluster=replace(config.cluster, wait=False)), directory, [])], False)
    return Run(directory, job=_job(directory, outcome[0].job)) if outcome[0].job else Run(directory)


def _job(directory: RunDirectory, job: str) -> SlurmJob:
    folders = (directory.slurm, directory.path.parent / "slurm")  # the second is a sweep's
    logs = [folder / f"{job}_0_log.out" for folder in folders]
    return SlurmJob(job, load_config(directory.config), directory, next((log for log in logs if log.exists()), logs[0]))


def _launcher(directory: RunDirectory) -> int | None:
    """Return the live process of this machine that `launch` has last started for a directory, if it is one."""
    started = directory.read_events("launch")
    if not started or started[-1].get("host") != socket.gethostname():
        return None
    with contextlib.suppress(OSError):  # it has ended
        words = Path(f"/proc/{started[-1]['pid']}/cmdline").read_bytes().split(b"\0")
        if str(directory.config).encode() in words:  # and not another that has its number now
            return int(started[-1]["pid"])
    return None


def _first_rank(directory: RunDirectory) -> int:
    """Return the process of rank 0, which holds the run's lock.

    Raises:
        TitanError: If it is on another machine.
    """
    try:
        owner = json.loads(directory.lock.read_text())
    except (OSError, ValueError):
        owner = {}
    if owner.get("host") != socket.gethostname():
        raise TitanError(f"{directory.path} is run by {read_owner(directory)}; it can be ended there")
    return int(owner["pid"])


def _cancel_job(job: str) -> None:
    try:
        done = subprocess.run(["scancel", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise TitanError(f"job {job} could not be cancelled: {error}") from error
    if done.returncode:
        raise TitanError(f"job {job} could not be cancelled: {done.stderr.strip()}")
