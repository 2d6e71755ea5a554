"""Who am I? The only place that reads the environment variables of launchers and of devices.

torchrun, titan's own local launcher, Kubernetes' training operators and submitit all describe a rank with the same
few variables. RANK decides whether this process *is* a rank; SLURM's variables do not, because they are also set in
the shell of an interactive allocation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from titan.config.degrees import Machine
from titan.errors import ConfigError, Problem


@dataclass(frozen=True)
class Rank:
    """This process's place among the ranks."""

    rank: int = 0
    """Global index."""
    local_rank: int = 0
    """Index on this machine, and of the device to use."""
    world_size: int = 1
    """Ranks in all."""
    local_world_size: int = 1
    """Ranks on this machine."""
    attempt: int = 0
    """How often the launcher has restarted the ranks."""
    has_store: bool = False
    """Whether a launcher has named a place where the ranks meet (MASTER_ADDR)."""


def current_rank() -> Rank | None:
    """Return this process's place, or None where no launcher has started it as a rank.

    Raises:
        ConfigError: If the launcher's variables are incomplete.
    """
    if "RANK" not in os.environ:
        return None
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            [
                Problem(
                    f"RANK is set in the environment, but not {' and '.join(missing)}",
                    "A launcher such as torchrun sets all of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.",
                    "unset RANK   to let titan start the ranks itself",
                )
            ]
        )
    try:
        world_size = int(os.environ["WORLD_SIZE"])
        return Rank(
            rank=int(os.environ["RANK"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            has_store=True,
        )
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and their like have to be numbers: {error}") from error


def current_machine() -> Machine:
    """Return what there is to run on, without importing torch."""
    rank = current_rank()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Machine(
        gpus=count_gpus(),
        started_ranks=rank.world_size if rank else None,
        started_ranks_per_node=rank.local_world_size if rank else None,
        cache_dir=f"{cache}/titan",
    )


def count_gpus() -> int:
    """Return how many GPUs this process may use: CUDA_VISIBLE_DEVICES, else NVIDIA's device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])
    if visible is None:
        return present
    listed = []
    for entry in visible.split(","):
        if entry.strip() in ("", "-1"):  # CUDA ignores what follows an invalid index
            break
        listed.append(entry)
    return len(listed) if present else 0


def threads_per_rank(ranks: int) -> int:
    """Return the CPU threads for each of `ranks` processes on this machine; the user's own setting wins."""
    if "OMP_NUM_THREADS" in os.environ:
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def launcher_pid() -> int | None:
    """Return the process that started this rank, where that was titan's local launcher."""
    pid = os.environ.get("TITAN_LAUNCHER_PID")
    return int(pid) if pid else None
