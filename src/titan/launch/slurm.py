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
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan.config.degrees import world_size
from titan.config.files import fixed_part
from titan.config.schema import ClusterConfig, Device, TitanConfig, TokenizerKind
from titan.config.sources import sources_of
from titan.errors import ConfigError, Problem, TitanError
from titan.launch.jobs import SlurmJob
from titan.launch.signals import hold_warnings
from titan.run_directory import RunDirectory, short_path

_CLIENT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_TIME_FORMAT")
"""What says where the cluster is, and nothing about the job that this process may be in."""
_ALWAYS_SAID = (
    *("SIGNAL", "REQUEUE", "NO_REQUEUE", "OPEN_MODE", "ARRAY_INX", "EXPORT", "WAIT", "JOB_NAME"),
    *("GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "GPUS_PER_SOCKET"),
)
_SAID_BY_KEY = {
    "partition": ("PARTITION",),
    "account": ("ACCOUNT",),
    "qos": ("QOS",),
    "reservation": ("RESERVATION",),
    "constraint": ("CONSTRAINT",),
    "time": ("TIMELIMIT",),
    "exclusive": ("EXCLUSIVE",),
    "cpus_per_task": ("CPUS_PER_TASK",),
    "memory": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
}
"""The SBATCH_ variables that would override what a key of the cluster says: sbatch puts them above its script."""
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

BEFORE_RANKS = "trap : TERM  # it comes to this script too, which has to outlive the ranks: they save then"
AFTER_RANKS = """\
code=$?
# 75: the ranks have saved and ask to come back; 138 and 140: they were told to before they could listen
if [ $code -eq 75 ] || [ $code -eq 138 ] || [ $code -eq 140 ]; then
    unset "${!SQUEUE_@}"
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    restart=$((${SLURM_RESTART_COUNT:-0} + 1))
    for try in 1 2 3 4 5; do  # when many jobs end at once, SLURM may not answer at once
        state=$(squeue --all --noheader --states=all --jobs="$job" --format=%T) && break
        sleep 5
    done
    case $state in
    CANCELLED | COMPLETING | COMPLETED)  # by somebody, who wants it to stay so
        echo "titan: job $job is $state, and does not come back"
        ;;
    *)
        if [ $restart -gt "$max_requeues" ]; then
            echo "titan: job $job has come back $max_requeues times, and may not again; the same command goes on"
        else
            # said first, for SLURM may end this script before scontrol itself has ended
            echo "titan: job $job goes back into the queue, restart $restart of at most $max_requeues"
            for try in 1 2 3 4 5; do
                if scontrol requeue "$job"; then
                    sleep 60  # or here
                    exit $code
                fi
                sleep 5
            done
            echo "titan: SLURM does not put job $job back; the same command goes on"
        fi
        ;;
    esac
fi
exit $code"""
"""What a batch script does before and after the ranks; launchers/slurm/titan.sbatch has the same lines."""


class RankProgram:
    """What a task runs: a module's `main`, given the path of a frozen config. Small and plain, for it is pickled."""

    def __init__(self, config: Path, module: str = "titan.worker") -> None:
        self.config, self.module = str(config), module

    def __setstate__(self, state: dict[str, str]) -> None:
        """Be read from the pickle: the first that titan hears of this process, so that warnings are held from here."""
        self.__dict__ |= state
        hold_warnings()

    def __call__(self) -> None:
        """Run this task's rank; where it does not end well, the task ends here, with the rank's exit code."""
        code = importlib.import_module(self.module).main([self.config])
        sys.stdout.flush()
        sys.stderr.flush()
        if code:
            os._exit(code)  # no exception: submitit would make 1 of every code


class SubmissionFailed(TitanError):
    """SLURM refused a job, or one of several."""

    def __init__(self, message: str, submitted: list[SlurmJob]) -> None:
        said = [line for line in message.splitlines() if line.startswith(("sbatch:", "srun:"))] or [message.strip()]
        super().__init__(
            str(Problem("SLURM refuses the job", "\n".join(said), "cluster.print_script=true   to see what it was"))
        )
        self.submitted = submitted
        """What was submitted before, and stays so."""
        self.may_be_submitted = "timed out" in message
        """Whether SLURM may have taken the job all the same."""
        self.exit_code = 1 if submitted or self.may_be_submitted else ConfigError.exit_code


@dataclass(frozen=True)
class Batch:
    """Runs that ask the same of SLURM: one job, or one array."""

    points: list[int]
    """Which of the runs."""
    folder: Path
    """Where submitit keeps its files."""
    parameters: dict[str, Any]
    """What is asked, in submitit's words."""


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


def batches(points: Sequence[tuple[TitanConfig, RunDirectory]], sweep: Path | None = None) -> list[Batch]:
    """Share runs out among jobs: those of a sweep that ask the same become an array.

    Args:
        points: The runs.
        sweep: The folder of their sweep, if they are one; its arrays keep their files there.
    """
    groups: dict[str, list[int]] = {}
    asked = [batch_parameters(config, sweep or directory.path) for config, directory in points]
    for index, parameters in enumerate(asked):
        groups.setdefault(repr(parameters) if sweep else str(index), []).append(index)
    found = []
    for members in groups.values():
        config, directory = points[members[0]]
        folder = sweep / "slurm" if sweep is not None and len(members) > 1 else directory.slurm
        found.append(Batch(members, folder, {"job_name": config.run.name, **asked[members[0]]}))
    return found


def batch_parameters(config: TitanConfig, mounted: Path) -> dict[str, Any]:
    """Return what to ask of SLURM, in submitit's words.

    Args:
        config: Of a run.
        mounted: The folder that the run, or its sweep, needs to see from inside a container.
    """
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
        "teardown": [AFTER_RANKS],
        "srun_args": _srun_arguments(cluster, config, mounted),
        "additional_parameters": {
            "requeue": True,
            **({"reservation": cluster.reservation} if cluster.reservation else {}),
            **{name.replace("-", "_"): _flag(value) or True for name, value in cluster.sbatch.items()},
        },
    }


def batch_script(batch: Batch, cluster: ClusterConfig) -> str:
    """Return the batch script of a job or an array, without needing SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{_python(cluster)} -u -m submitit.core._submit {shlex.quote(str(batch.folder))}"
    count = len(batch.points)
    return _make_sbatch_string(command, batch.folder, **batch.parameters, map_count=count if count > 1 else None)


def submit(points: Sequence[tuple[TitanConfig, RunDirectory]], sweep: Path | None = None) -> list[SlurmJob]:
    """Submit runs whose configs are frozen; the arguments are those of `batches`.

    Raises:
        SubmissionFailed: If SLURM refuses; what has been submitted before stays so.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    jobs: dict[int, SlurmJob] = {}
    for batch in batches(points, sweep):
        cluster = points[batch.points[0]][0].cluster
        # submitit shows what sbatch says, which is in the error too, and has remarks on its own arguments
        with _clean_environment(cluster), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                executor = submitit.SlurmExecutor(folder=batch.folder, python=_python(cluster))
                executor.update_parameters(**batch.parameters)
                with executor.batch() if len(batch.points) > 1 else contextlib.nullcontext():
                    submitted = [executor.submit(RankProgram(points[index][1].config)) for index in batch.points]
            except (FailedJobError, FailedSubmissionError, OSError) as error:
                raise SubmissionFailed(str(error), [jobs[index] for index in sorted(jobs)]) from error
        for index, job in zip(batch.points, submitted, strict=True):
            config, directory = points[index]
            jobs[index] = SlurmJob(job.job_id, config, directory, Path(job.paths.stdout))
            directory.append_event("submit", job=job.job_id)
    return [jobs[index] for index in range(len(points))]


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


def _python(cluster: ClusterConfig) -> str:
    return shlex.quote(cluster.python or sys.executable)


def _flag(value: str) -> str:
    """Return an argument's value; nothing for a bare flag, which Hydra may have written as true."""
    return "" if value in ("", "True") else value


def _gpus_per_node(cluster: ClusterConfig) -> int | None:
    # of all tasks together and not of each, or a GPU could not reach its neighbours' memory
    is_asked = any(re.match(r"gres$|gpus", name.replace("_", "-")) for name in cluster.sbatch)
    return cluster.devices_per_node if cluster.device is Device.cuda and not is_asked else None


def _setup(cluster: ClusterConfig) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    commands = ["set -e", *cluster.setup, "set +e"] if cluster.setup else []
    return [BEFORE_RANKS, f"max_requeues={cluster.max_requeues}", *exports, *commands]


def _srun_arguments(cluster: ClusterConfig, config: TitanConfig, mounted: Path) -> list[str]:
    arguments = ["--kill-on-bad-exit=1"]  # or the others would wait for a rank that has failed
    if cluster.cpus_per_task is not None:  # which srun has not taken from sbatch since SLURM 22.05
        arguments.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.container_image is not None:
        arguments.append(f"--container-image={cluster.container_image}")
        arguments.append(f"--container-mounts={','.join(_mounts(config, mounted))}")
    for name, value in cluster.srun.items():
        arguments.append(f"--{name.replace('_', '-')}" + (f"={_flag(value)}" if _flag(value) else ""))
    return arguments


def _mounts(config: TitanConfig, mounted: Path) -> list[str]:
    """Return what a container has to see: the user's own mounts, and what the config names if they do not have it."""
    given = config.cluster.container_mounts
    inside = [mount.split(":")[1 if ":" in mount else 0].rstrip("/") for mount in given]
    parts = [config.validation.data, *sources_of(config.data).values()]
    sources = [source for source in parts if source is not None]
    named = [str(mounted), config.data.cache_dir, *(fixed_part(each.path) for each in sources if each.path)]
    named += [each.dataset for each in sources if each.dataset is not None and Path(each.dataset).is_dir()]
    tokenizer = config.tokenizer.path
    if tokenizer is not None and config.tokenizer.kind is TokenizerKind.huggingface and Path(tokenizer).is_file():
        tokenizer = str(Path(tokenizer).parent)  # with the settings beside it, which count too
    named += [tokenizer, config.checkpoint.initial_load, config.parallelism.pp_schedule_csv]
    own = [path for path in filter(None, named) if not any(f"{path}/".startswith(f"{folder}/") for folder in inside)]
    return [f"{path}:{path}" for path in dict.fromkeys(own)] + given


@contextlib.contextmanager
def _clean_environment(cluster: ClusterConfig) -> Iterator[None]:
    """Hide what sbatch would take for orders, or the ranks for a description of themselves.

    That is the job that this process may be in, the place of a rank that the shell may still describe, and the
    user's SBATCH_ variables for what titan or a key of the cluster says; the others hold as ever.
    """
    said = [*_ALWAYS_SAID, *(name.upper().replace("-", "_") for name in cluster.sbatch)]
    said += [name for key, names in _SAID_BY_KEY.items() if getattr(cluster, key) for name in names]
    hidden = {*_RANK_VARIABLES, *(f"SBATCH_{name}" for name in said)}
    prefixes = ("TORCHELASTIC_", "SUBMITIT_")
    if "SLURM_JOB_ID" in os.environ:
        prefixes += ("SLURM_", "SLURMD_", "SRUN_", "PMI")
    before = dict(os.environ)
    for name in before:
        if name in hidden or (name.startswith(prefixes) and name not in _CLIENT_VARIABLES):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
