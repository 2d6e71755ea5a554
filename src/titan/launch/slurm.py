"""Ranks as the tasks of a SLURM job, through submitit.

The job is given a module and the path of the frozen config, nothing else: editing `conf/` after submission changes
nothing, and a job that SLURM or titan puts back into the queue starts from the same file. Points of a sweep that want
the same resources become one job array.

What submitit does by itself when a job is about to end (save on rank 0 alone, inside the signal handler) cannot save a
sharded run. titan's ranks save together between two steps and exit with 75 (`titan.launch.signals`); the batch script
then puts the job back. It, and not a rank, because a rank may run in a container without SLURM's commands.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan.config.degrees import world_size
from titan.config.schema import ClusterConfig, Device, TitanConfig
from titan.errors import ConfigError, Problem, Stopped
from titan.run_directory import RunDirectory, short_path

_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "REVOKED"),
    *("NODE_FAIL", "PREEMPTED"),
)
_ACTIVE_AGAIN = ("NODE_FAIL", "PREEMPTED")
"""States that SLURM shows for up to some seconds before it puts the job back into the queue."""
_SETTLE_SECONDS = 30.0
_STATE_SECONDS = 2.0
_LOG_SECONDS = 0.2
_CLIENT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_TIME_FORMAT")
"""What says where the cluster is, and nothing about the job that this process may be in."""


class RankProgram:
    """What a task runs: a module's `main`, given the path of a frozen config. Small and plain, for it is pickled."""

    def __init__(self, config: Path, module: str = "titan.worker") -> None:
        self.config, self.module = str(config), module

    def __call__(self) -> None:
        """Run this task's rank; where it does not end well, the task ends here, with the rank's exit code."""
        code = importlib.import_module(self.module).main([self.config])
        sys.stdout.flush()
        sys.stderr.flush()
        if code:
            os._exit(code)  # no exception: submitit would make 1 of every code


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    name: str
    """PENDING, RUNNING, COMPLETED, FAILED and so on; UNKNOWN where SLURM does not say."""
    reason: str = ""
    """Why it waits, where it does."""
    exit_code: int = 0
    """As a shell has it: 128 and the signal, where one ended it."""

    @property
    def has_ended(self) -> bool:
        """Whether it is over, as far as SLURM knows at this moment."""
        return self.name in _ENDED


@dataclass
class SlurmJob:
    """A run that has been submitted."""

    id: str
    """The job's number; in an array, the array's, an underscore, and the point's."""
    config: TitanConfig
    directory: RunDirectory
    log: Path
    """The console of rank 0."""
    _read: int = field(default=0, repr=False)

    def state(self) -> JobState:
        """Return what SLURM says now."""
        shown = _ask("scontrol", "show", "job", "--oneliner", self.id)
        if shown is not None:
            found = dict(re.findall(r"(JobState|Reason|ExitCode)=(\S+)", shown.splitlines()[0]))
            reason = found.get("Reason", "").replace("None", "")
            return JobState(found.get("JobState", "UNKNOWN"), reason, _exit_code(found.get("ExitCode", "0:0")))
        # SLURM's controller forgets an ended job after minutes; its accounting does not, where there is one
        shown = _ask(
            "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={self.id}", "--format=State,ExitCode"
        )
        if shown and shown.strip():
            name, _, code = shown.splitlines()[-1].partition("|")
            return JobState(name.split()[0], "", _exit_code(code))
        return JobState("UNKNOWN")

    def new_lines(self) -> list[str]:
        """Return what rank 0 has written on its console since the last call, without submitit's own lines."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except OSError:
            return []
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        return [line for line in text.decode(errors="replace").splitlines() if not line.startswith("submitit ")]

    def exit_code(self) -> int:
        """Return the run's exit code, once the job is over: a rank's own where it has left one, else SLURM's."""
        state = self.state()
        if state.name == "COMPLETED" or self.directory.is_complete(self.config.training.steps):
            return 0
        with contextlib.suppress(OSError):
            status = (self.directory.path / "status.json").stat().st_mtime_ns
            if status > self.directory.config.stat().st_mtime_ns and (code := self.directory.read_failure()):
                return code  # what is older is of an earlier job
        return state.exit_code or 1

    def cancel(self) -> None:
        """End the job."""
        _ask("scancel", self.id)


def watch(jobs: Sequence[SlurmJob]) -> Iterator[tuple[SlurmJob, JobState | str]]:
    """Yield every new state of the jobs, and of a single one every new line of rank 0's log, until all are over."""
    left = {job.id: job for job in jobs}
    known = dict.fromkeys(left, JobState(""))
    since = dict.fromkeys(left, 0.0)
    while left:
        listed = _list_states(list(left))
        for name, job in list(left.items()):
            state = listed.get(name) or job.state()
            if (state.name, state.reason) != (known[name].name, known[name].reason):
                known[name], since[name] = state, time.monotonic()
                yield job, state
            may_change = state.name in (*_ACTIVE_AGAIN, "UNKNOWN")
            is_over = state.has_ended or state.name == "UNKNOWN"
            if is_over and (not may_change or time.monotonic() - since[name] > _SETTLE_SECONDS):
                del left[name]
        deadline = time.monotonic() + _STATE_SECONDS
        while True:
            for line in jobs[0].new_lines() if len(jobs) == 1 else ():
                yield jobs[0], line
            if not left or time.monotonic() > deadline:
                break
            time.sleep(_LOG_SECONDS)


def check_can_submit(cluster: ClusterConfig) -> None:
    """See that a job can be submitted from here.

    Raises:
        ConfigError: If there is no SLURM, or this is inside a job.
    """
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            [
                Problem(
                    f"cluster=slurm, but there is no {' and no '.join(missing)} here",
                    "Jobs are submitted from a login node of a SLURM cluster.",
                    "cluster.print_script=true   to see the batch script, or  cluster=local",
                )
            ]
        )
    job = os.environ.get("SLURM_JOB_ID")
    if job and not cluster.inside_job:
        raise ConfigError(
            [
                Problem(
                    f"this shell is inside SLURM job {job}, and cluster=slurm would submit another one",
                    "cluster=local uses the devices that this job has on this node.",
                    "cluster=local   or  cluster.inside_job=true",
                )
            ]
        )


def live_job(directory: RunDirectory) -> str | None:
    """Return the job that was last submitted for a run directory, if it waits or runs still."""
    submitted = directory.read_events("submit")
    if not submitted:
        return None
    job = submitted[-1]["job"]
    shown = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    return job if shown and shown.strip() else None


def batch_parameters(config: TitanConfig) -> dict[str, Any]:
    """Return what to ask of SLURM, in submitit's words; points of a sweep that agree in it share an array."""
    cluster = config.cluster
    return {
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.devices_per_node,
        "gpus_per_node": _gpus_per_node(cluster),
        "cpus_per_task": cluster.cpus_per_task,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": cluster.time,
        "mem": cluster.memory,
        "exclusive": True if cluster.exclusive else None,
        "signal_delay_s": cluster.grace_seconds,
        "wckey": None,  # submitit's own is refused by clusters without such keys
        "stderr_to_stdout": True,
        "array_parallelism": cluster.array_parallelism,
        "setup": _setup(cluster),
        "teardown": _teardown(cluster),
        "srun_args": _srun_arguments(cluster, config),
        "additional_parameters": {
            "requeue": True,
            **({"reservation": cluster.reservation} if cluster.reservation else {}),
            **{name: True if value in ("", "True") else value for name, value in cluster.sbatch.items()},
        },
    }


def batch_script(config: TitanConfig, folder: Path, points: int = 1) -> str:
    """Return the batch script of a run, or of an array of several, without needing SLURM.

    Args:
        config: Of the run, or of one of them.
        folder: Where submitit keeps its files.
        points: How many runs.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{_python(config.cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    parameters: dict[str, Any] = batch_parameters(config) | {"job_name": config.run.name}
    return _make_sbatch_string(command, folder, **parameters, map_count=points if points > 1 else None)


def submit(points: Sequence[tuple[TitanConfig, RunDirectory]], sweep: Path | None = None) -> list[SlurmJob]:
    """Submit runs whose configs are frozen: each by itself, or with `sweep`, as few job arrays as possible.

    Args:
        points: The runs.
        sweep: The folder of a sweep; its arrays keep their files in it.

    Raises:
        SubmissionFailed: If SLURM refuses; what has been submitted before stays so.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    jobs: dict[int, SlurmJob] = {}
    for group in group_by_resources([config for config, _ in points]):
        config, directory = points[group[0]]
        is_array = sweep is not None and len(group) > 1
        folder = folder_of_array(sweep) if sweep is not None and is_array else directory.slurm
        # submitit shows what sbatch says, which is in the error too, and has remarks on its own arguments
        with _outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            executor = submitit.SlurmExecutor(folder=folder, python=_python(config.cluster))
            executor.update_parameters(job_name=config.run.name, **batch_parameters(config))
            programs = [RankProgram(points[index][1].config) for index in group]
            try:
                with executor.batch() if is_array else contextlib.nullcontext():
                    submitted = [executor.submit(program) for program in programs]
            except FailedJobError as error:
                raise SubmissionFailed(str(error), [jobs[index].id for index in sorted(jobs)]) from error
        for index, job in zip(group, submitted, strict=True):
            config, directory = points[index]
            jobs[index] = SlurmJob(job.job_id, config, directory, Path(job.paths.stdout))
            directory.append_event("submit", job=job.job_id)
    return [jobs[index] for index in range(len(points))]


def group_by_resources(configs: Sequence[TitanConfig]) -> list[list[int]]:
    """Return the indices of runs that ask the same of SLURM, together and in order."""
    groups: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        groups.setdefault(repr(batch_parameters(config)), []).append(index)
    return list(groups.values())


def folder_of_array(sweep: Path) -> Path:
    """Return where the arrays of a sweep keep their files."""
    return sweep / "slurm"


def describe_jobs(jobs: Sequence[SlurmJob]) -> list[str]:
    """Return what a person wants to know after submission, as lines: of single jobs, or of arrays."""
    arrays: dict[str, list[SlurmJob]] = {}
    for job in jobs:
        arrays.setdefault(job.id.partition("_")[0], []).append(job)
    lines = []
    for number, members in arrays.items():
        log = short_path(members[0].log)
        if len(members) > 1:
            log = log.replace(f"{number}_0_", f"{number}_*_")
        points = f"{len(members)} points, each " if len(members) > 1 else ""
        lines += [
            f"job        {number}, {points}{_describe_size(members[0].config.cluster)}",
            f"log        {log}",
            f"cancel     scancel {number}",
        ]
    return lines


def _describe_size(cluster: ClusterConfig) -> str:
    ranks = world_size(cluster)
    asked = [f"{name} {getattr(cluster, name)}" for name in ("partition", "time") if getattr(cluster, name)]
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes != 1)} x {cluster.devices_per_node}"
    size = f"{nodes} = {ranks} rank{'s' * (ranks != 1)}"
    return ", ".join([size, *asked])


class SubmissionFailed(ConfigError):
    """SLURM refused a job."""

    def __init__(self, message: str, submitted: list[str]) -> None:
        said = [line for line in message.splitlines() if line.startswith(("sbatch:", "srun:"))] or [message.strip()]
        before = f"\nSubmitted before it: {' '.join(submitted)}" if submitted else ""
        super().__init__(
            [
                Problem(
                    "SLURM refuses the job", "\n".join(said) + before, "cluster.print_script=true   to see what it was"
                )
            ]
        )


def _python(cluster: ClusterConfig) -> str:
    return shlex.quote(cluster.python or sys.executable)


def _gpus_per_node(cluster: ClusterConfig) -> int | None:
    # of all tasks together and not of each, or a GPU could not reach its neighbours' memory
    is_asked = any(re.match(r"gres$|gpus", name.replace("_", "-")) for name in cluster.sbatch)
    return cluster.devices_per_node if cluster.device is Device.cuda and not is_asked else None


def _setup(cluster: ClusterConfig) -> list[str]:
    # A site's SIGTERM reaches the script too; it has to outlive the ranks, which save then.
    return ["trap : TERM"] + (["set -e", *cluster.setup, "set +e"] if cluster.setup else [])


def _teardown(cluster: ClusterConfig) -> list[str]:
    """Return what the batch script does after the ranks have ended: put the job back where they ask for it."""
    most = cluster.max_requeues
    return [
        "code=$?",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        "requeues=${SLURM_RESTART_COUNT:-0}",
        # cancelled, it says CANCELLED or COMPLETING here, and must not come back
        f'if [ $code -eq {Stopped.exit_code} ] && [ "$(squeue --noheader --jobs=$job --format=%T)" = RUNNING ]; then',
        f"    if [ $requeues -lt {most} ]; then",
        f'        echo "titan: job $job goes back into the queue, restart $((requeues + 1)) of at most {most}"',
        "        scontrol requeue $job && sleep 60  # SLURM ends this script while it sleeps",
        "    else",
        f'        echo "titan: job $job has restarted $requeues times, and cluster.max_requeues={most};'
        ' the same command goes on from the checkpoint"',
        "    fi",
        "fi",
        "exit $code",
    ]


def _srun_arguments(cluster: ClusterConfig, config: TitanConfig) -> list[str]:
    arguments = ["--kill-on-bad-exit=1"]  # or the others would wait for a rank that has failed
    if cluster.cpus_per_task is not None:  # which srun has not taken from sbatch since SLURM 22.05
        arguments.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.container_image is not None:
        own = sorted({config.run.dir, *([config.data.cache_dir] if config.data.cache_dir else [])})
        mounts = [f"{path}:{path}" for path in own] + cluster.container_mounts
        arguments += [f"--container-image={cluster.container_image}", f"--container-mounts={','.join(mounts)}"]
    for name, value in cluster.srun.items():
        arguments.append(f"--{name.replace('_', '-')}" + (f"={value}" if value not in ("", "True") else ""))
    return arguments


def _list_states(jobs: list[str]) -> dict[str, JobState]:
    """Ask for many jobs at once; those that SLURM lists no longer are left out."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i %T %r"]
    lines = [line.split(maxsplit=2) for line in (_ask(*command) or "").splitlines()]
    return {words[0]: JobState(words[1], words[2].replace("None", "")) for words in lines if len(words) == 3}


def _exit_code(text: str) -> int:
    code, _, number = text.partition(":")
    return int(code or 0) or (128 + int(number) if number.isdigit() and int(number) else 0)


def _ask(*command: str) -> str | None:
    """Return what one of SLURM's commands prints, or None where it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout if done.returncode == 0 else None
    return None


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the job that this process is in, if it is in one: sbatch would take what describes it for orders."""
    before = dict(os.environ)
    if "SLURM_JOB_ID" in os.environ:
        for name in before:
            if name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI")) and name not in _CLIENT_VARIABLES:
                del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
