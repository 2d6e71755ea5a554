"""The cluster as the tests use it: what is typed on its login node, and what SLURM says."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.command import FAULT, Finished, Started, clean_environment, finish, start

SCRIPT = Path(__file__).resolve().parent / "cluster.sh"


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    cache: Path
    """titan's cache; all nodes share this machine's disk."""

    def start(self, *command: str, folder: Path, **variables: str) -> Started:
        """Start a command on the login node."""
        where = {"SLURM_CLUSTER_DIR": os.environ["SLURM_CLUSTER_DIR"], "PYTHONPATH": str(FAULT)}
        environment = clean_environment(self.cache, **where, **variables)
        return start(["exec", *command], folder, environment, program=str(SCRIPT))

    def run(self, *command: str, folder: Path, timeout_seconds: float = 60, **variables: str) -> Finished:
        """Run a command on the login node."""
        return finish(self.start(*command, folder=folder, **variables), timeout_seconds)

    def titan(self, *arguments: str, folder: Path, timeout_seconds: float = 240, **variables: str) -> Finished:
        """Run titan's command on the login node."""
        command = (sys.executable, "-m", "titan.train", *arguments)
        return self.run(*command, folder=folder, timeout_seconds=timeout_seconds, **variables)

    def ask(self, *command: str) -> str:
        """Return what one of SLURM's commands prints."""
        done = subprocess.run([SCRIPT, "exec", *command], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """Return what `scontrol show job` says under a name."""
        found = re.search(rf"\b{name}=(\S+)", self.ask("scontrol", "show", "job", "--oneliner", job))
        assert found, name
        return found.group(1)

    def wait_for_state(self, job: str, *states: str, timeout_seconds: float = 240) -> str:
        """Wait until a job is in one of these states."""
        deadline = time.monotonic() + timeout_seconds
        while (state := self.field(job, "JobState")) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {' or '.join(states)}"
            time.sleep(0.3)
        return state

    def power(self, verb: str, node: str) -> None:
        """Power a node off (`kill-node`) or on (`start-node`)."""
        subprocess.run([SCRIPT, verb, node], capture_output=True, timeout=60, check=True)

    @contextlib.contextmanager
    def configured(self, old: str, new: str) -> Iterator[None]:
        """Replace a word of slurm.conf for a while."""
        path = Path(os.environ["SLURM_CLUSTER_DIR"]) / "etc" / "slurm.conf"
        before = path.read_text()
        assert old in before
        try:
            path.write_text(before.replace(old, new))
            self.ask("scontrol", "reconfigure")
            yield
        finally:
            path.write_text(before)
            self.ask("scontrol", "reconfigure")

    def wait_until_idle(self, timeout_seconds: float = 120) -> None:
        """Wait until every node can take work."""
        deadline = time.monotonic() + timeout_seconds
        while set(self.ask("sinfo", "--noheader", "--partition=main", "--Node", "--format=%t").split()) != {"idle"}:
            assert time.monotonic() < deadline, self.ask("sinfo", "--Node", "--long")
            time.sleep(0.3)


def job_of(finished: Finished) -> str:
    """Return the job that a submission has printed."""
    found = re.search(r"^job +(\d+),", finished.out, re.MULTILINE)
    assert found, finished.text
    return found.group(1)
