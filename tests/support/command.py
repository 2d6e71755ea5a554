"""titan's command as a user's shell runs it: a process of its own, in a folder of its own, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

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

    @property
    def text(self) -> str:
        """All that it wrote."""
        return f"{self.out}\n{self.err}"


def clean_environment(cache: Path, **more: str) -> dict[str, str]:
    """Return this process's environment without what describes a rank, a GPU or a terminal, and with a cache."""
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
        "XDG_CACHE_HOME": str(cache),
        "COLUMNS": "200",
        **more,
    }


def start(arguments: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_seconds: float = 120) -> Finished:
    """Wait for a process to end; one that does not is a failure, and is killed with its whole group."""
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout_seconds} s\n{out}\n{err}") from None
    return Finished(process.returncode, out, err)


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float = 60) -> None:
    """Poll until something holds, or fail."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s in vain: {what}"
        time.sleep(0.05)


def processes_with(token: str) -> dict[int, str]:
    """Return the live processes whose command line contains a token, by their ids."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if token in words:  # a zombie's is empty
                found[int(entry.name)] = words
    return found


def files_below(folder: Path) -> dict[str, float]:
    """Return everything in a folder with its time of change."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]
