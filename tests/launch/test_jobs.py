"""What SLURM says of a job, and above all what it does not say: no answer is never taken for an answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.load import save_config
from titan.errors import ConfigError
from titan.launch import jobs
from titan.launch.dispatch import Frozen, freeze
from titan.launch.jobs import SlurmJob, live_job, watch
from titan.run_directory import RunDirectory

SILENT = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
INVALID = "slurm_load_jobs error: Invalid job id specified"

Says = Callable[..., None]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """A SLURM that gives one answer after the other, and the last for ever: a state, with a code where it has ended."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, seconds in {"_STATE_SECONDS": 0.0, "_LOG_SECONDS": 0.0, "SETTLE_SECONDS": 0.3}.items():
        monkeypatch.setattr(jobs, name, seconds)

    def write(*answers: str, accounting: str = "") -> None:
        turns = tmp_path / "turns"
        turns.write_text("0")
        lines = "\n".join(f"{index}) answer='{answer}';;" for index, answer in enumerate(answers[:-1]))
        choose = f'turn=$(cat {turns}); case $turn in\n{lines}\n*) answer="{answers[-1]}";; esac'
        fail = f'[ "$answer" = silent ] && {{ echo "{SILENT}" >&2; exit 1; }}\n'
        fail += f'[ "$answer" = invalid ] && {{ echo "{INVALID}" >&2; exit 1; }}\n'
        split = "set -- $answer; state=$1 code=${2:-0:0}"
        for name, text in {
            # asked once a turn, so that it goes on to the next
            "squeue": f"echo $((turn + 1)) > {turns}\n{fail}{split}\necho 7 $state None",
            "scontrol": f"{fail}{split}\necho JobId=7 JobState=$state Reason=None ExitCode=$code",
            "sacct": f"echo '{accounting}'",
        }.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{choose}\n{text}\n")
            (tmp_path / name).chmod(0o755)

    return write


@pytest.fixture
def job(tmp_path: Path) -> SlurmJob:
    """A job whose config is frozen."""
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    config = check_config(compose(["cluster=slurm", "cluster.device=cpu", f"run.dir={directory.path}"]), Machine())
    save_config(config, directory.config)
    directory.append_event("submit", job="7")
    return SlurmJob("7", config, directory, tmp_path / "log")


def seen(job: SlurmJob) -> list[str]:
    """Watch a job to its end; returns its states."""
    events = [event.name for _, event in itertools.islice(watch([job]), 50) if not isinstance(event, str)]
    assert len(events) < 50
    return events


@pytest.mark.parametrize(
    ("answers", "states", "code"),
    [
        (("PENDING", "RUNNING", "COMPLETED 0:0"), ["PENDING", "RUNNING", "COMPLETED"], 0),
        (("RUNNING", "silent", "silent", "silent", "COMPLETED 0:0"), ["RUNNING", "COMPLETED"], 0),
        (("RUNNING", "NODE_FAIL", "PENDING", "COMPLETED 0:0"), ["RUNNING", "NODE_FAIL", "PENDING", "COMPLETED"], 0),
        (("RUNNING", "FAILED 71:0"), ["RUNNING", "FAILED"], 71),
        (("RUNNING", "CANCELLED 0:15"), ["RUNNING", "CANCELLED"], 143),
        (("RUNNING", "TIMEOUT 0:0"), ["RUNNING", "TIMEOUT"], 1),
        (("RUNNING", "NODE_FAIL 0:0"), ["RUNNING", "NODE_FAIL"], 1),
        (("RUNNING", "invalid"), ["RUNNING", "UNKNOWN"], 1),
    ],
)
def test_a_job_is_over_when_slurm_says_so(
    says: Says, job: SlurmJob, answers: tuple[str, ...], states: list[str], code: int
) -> None:
    """Not while the controller is silent, nor in the moment between a lost node and the requeue."""
    says(*answers)
    assert seen(job) == states
    assert job.exit_code() == code


def test_accounting_knows_what_the_controller_has_forgotten(says: Says, job: SlurmJob) -> None:
    """Minutes after its end only sacct has a job."""
    says("RUNNING", "invalid", accounting="FAILED|65:0")
    assert seen(job) == ["RUNNING", "FAILED"]
    assert job.exit_code() == 65


def test_a_ranks_own_exit_code_counts_if_it_is_of_this_job(says: Says, job: SlurmJob) -> None:
    """What an earlier job of the same run has left in status.json says nothing of this one."""
    says("FAILED 143:0")
    job.directory.write_status("failed", why="this one", exit_code=71)
    assert job.exit_code() == 71
    save_config(job.config, job.directory.config)  # submitted again
    assert job.status() == {}
    assert job.exit_code() == 143


def test_only_new_and_whole_lines_are_shown(job: SlurmJob) -> None:
    """The log is shown as it grows, without what submitit says."""
    assert job.new_lines() == []
    job.log.write_text("submitit INFO starting\none\ntw")
    assert job.new_lines() == ["one"]
    with job.log.open("a") as file:
        file.write("o\nthree\n")
    assert job.new_lines() == ["two", "three"]


@pytest.mark.parametrize(("answer", "expected"), [("RUNNING", "7"), ("PENDING", "7"), ("invalid", None)])
def test_a_directory_belongs_to_the_job_that_has_not_ended(
    says: Says, job: SlurmJob, answer: str, expected: str | None
) -> None:
    """While a job waits or runs nothing else may freeze a config there, on whichever cluster."""
    says(answer)
    assert live_job(job.directory) == expected
    another = replace(job.config, training=replace(job.config.training, seed=7))
    if expected is None:
        assert freeze(another, job.directory, []) is Frozen.new, "it has trained nothing"
        return
    for config in (job.config, another):
        with pytest.raises(ConfigError, match="belongs to job 7, which has not ended"):
            freeze(config, job.directory, [])


def test_a_silent_slurm_is_no_permission(says: Says, job: SlurmJob) -> None:
    """Where SLURM does not answer, the job may live."""
    says("silent")
    with pytest.raises(ConfigError, match="SLURM does not answer"):
        freeze(job.config, job.directory, [])


def test_files_that_were_copied_from_a_cluster_can_be_resumed(
    job: SlurmJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no SLURM at all, no job can have the directory."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert live_job(job.directory) is None
