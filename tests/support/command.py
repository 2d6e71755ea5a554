"""titan's command as a user's shell runs it: a process of its own, in a folder of its own, without a GPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
FAULT = Path(__file__).resolve().parent / "fault"
"""On PYTHONPATH, it plants what PLANTED_FAULT says, see its sitecustomize.py."""

TINY_MODEL = (
    "model.dim=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_dim=64",
    "model.vocab_size=320",
)
TINY = (*TINY_MODEL, "training.seq_len=32", "training.local_batch_size=2", "training.steps=2", "data=text")
"""A run of a second or two; data.path and run.dir are still to be said."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str
    mark: str = ""
    """For `processes_with`: finds what is left of it."""

    @property
    def text(self) -> str:
        """All that it wrote."""
        return f"{self.out}\n{self.err}"


def clean_environment(cache: Path, **more: str) -> dict[str, str]:
    """Return this process's environment without what describes a rank, a GPU or a terminal, and with a cache.

    And without the CPU's bfloat16, so that runs are the same on every machine unless they ask for it.
    """
    describing = (
        "RANK",
        "LOCAL_",
        "WORLD_SIZE",
        "MASTER_",
        "TORCHELASTIC_",
        "TITAN_",
        "HYDRA_",
        "PYTHONPATH",
        "SLURM_",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(describing)}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "XDG_CACHE_HOME": str(cache),
        "COLUMNS": "200",
        **more,
    }


class Started(subprocess.Popen[str]):
    """A running command, and the mark that it and all that it starts have in their environment."""

    mark: str = ""


def start(arguments: list[str], folder: Path, environment: dict[str, str], program: str = sys.executable) -> Started:
    """Start `python ARGUMENTS`, or another program, in a process group of its own."""
    mark = f"STARTED_AS={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    process = Started(
        [program, *arguments],
        cwd=folder,
        env=environment | {name: value},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.mark = mark
    return process


def finish(process: Started, timeout_seconds: float = 240) -> Finished:
    """Wait for a process to end; one that does not is a failure, and is killed with all that it has started."""
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout_seconds} s\n{out}\n{err}") from None
    return Finished(process.returncode, out, err, process.mark)


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float = 240) -> None:
    """Poll until something holds, or fail."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s in vain: {what}"
        time.sleep(0.05)


def kill_all(process: Started) -> None:
    """Leave nothing of a command."""
    for pid in processes_with(process.mark):
        os.kill(pid, signal.SIGKILL)


def processes_with(marker: str) -> dict[int, str]:
    """Return the live processes that have a marker in their environment, by their ids, with their command lines.

    What a process starts inherits its environment, so a marker finds all that came from one command.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if marker.encode() in (entry / "environ").read_bytes():  # a zombie's is empty
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


def free_port() -> str:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def files_below(folder: Path) -> dict[str, float]:
    """Return everything in a folder with its time of change."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(directory: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of every step's row, with all their bits."""
    rows = json_lines(directory / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def validations(directory: Path) -> list[tuple[int, float, int]]:
    """Return step, loss and tokens of every validation, with all their bits."""
    rows = json_lines(directory / "metrics.jsonl")
    return [(row["step"], row["validation_loss"], row["validation_tokens"]) for row in rows if "loss" not in row]
