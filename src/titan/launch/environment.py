"""Who am I? The place that reads the environment variables by which launchers describe a rank, and those of devices.

torchrun, titan's own local launcher, Kubernetes' training operators and submitit all describe a rank with the same
few variables. RANK decides whether this process *is* a rank. SLURM's variables are translated into those, and only
where srun has started several tasks: most of them are also set in the shell of an interactive allocation.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
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
    """How often the launcher has restarted the ranks, or SLURM the job."""
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
    rank = Rank(
        rank=_number("RANK", 0),
        local_rank=_number("LOCAL_RANK", 0),
        world_size=_number("WORLD_SIZE", 1),
        local_world_size=_number("LOCAL_WORLD_SIZE", 1),
        attempt=_number("TORCHELASTIC_RESTART_COUNT", 0) + _number("SLURM_RESTART_COUNT", 0),
        has_store=True,
    )
    if not (rank.rank < rank.world_size and rank.local_rank < rank.local_world_size <= rank.world_size):
        raise ConfigError(
            [
                Problem(
                    "the launcher's variables contradict each other",
                    f"RANK={rank.rank} WORLD_SIZE={rank.world_size} "
                    f"LOCAL_RANK={rank.local_rank} LOCAL_WORLD_SIZE={rank.local_world_size}",
                    "unset RANK   to let titan start the ranks itself",
                )
            ]
        )
    return rank


def adopt_slurm_step(is_rank: bool = False) -> None:
    """Where srun has started this process as one of several tasks, describe it as torchrun would.

    Args:
        is_rank: Whether it is known to be a rank, even where it is the only task.
    """
    step = os.environ.get
    if "RANK" in os.environ or "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return
    tasks = _number("SLURM_STEP_NUM_TASKS", 1)
    if tasks == 1 and not is_rank:
        return  # a shell that srun --pty has opened, and what is typed in it
    counts = expand_counts(step("SLURM_STEP_TASKS_PER_NODE", "1"))
    nodes = step("SLURM_STEP_NODELIST") or step("SLURM_JOB_NODELIST") or "localhost"
    job = int(re.sub(r"\D", "", step("SLURM_JOB_ID", "0")) or 0)
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": step("SLURM_LOCALID", "0"),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(counts[min(_number("SLURM_NODEID", 0), len(counts) - 1)]),
        "MASTER_ADDR": first_host(nodes),
        # The same on every rank without asking, hardly ever the same for two jobs on one node, and below the ports that
        # Linux gives to outgoing connections.
        "MASTER_PORT": step("MASTER_PORT", str(15000 + (job * 7 + _number("SLURM_STEP_ID", 0)) % 15000)),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a list as SLURM writes it: rack[3-5,9]-n[01-16],login gives rack3-n01."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\]\-,]*)[^\]]*\]", r"\1", first.group() if first else nodes)


def expand_counts(text: str) -> list[int]:
    """Return SLURM's counts of each node, 2(x3),1, as [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


@functools.cache
def slurm_gpus(partition: str | None) -> int | None:
    """Return the GPUs that each node of a partition has; None where SLURM does not say, or they differ."""
    if shutil.which("sinfo") is None:
        return None
    command = ["sinfo", "--noheader", "--Node", "--format=%G %P"]
    command += [f"--partition={partition}"] if partition else []
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    # gpu:4, gpu:h100:8(S:0-1), or several with commas between; * marks the partition that is the default
    lines = [words for words in map(str.split, listed.splitlines()) if len(words) == 2]
    found = {
        sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", resources))
        for resources, name in lines
        if partition or name.endswith("*")
    }
    return found.pop() if len(found) == 1 else None


def current_machine() -> Machine:
    """Return what there is to run on, without importing torch."""
    rank = current_rank()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Machine(
        gpus=count_gpus(),
        has_bfloat16=has_bfloat16(),
        started_ranks=rank.world_size if rank else None,
        started_ranks_per_node=rank.local_world_size if rank else None,
        slurm_gpus=slurm_gpus,
        cache_dir=f"{cache}/titan",
    )


def count_gpus() -> int:
    """Return how many GPUs this process may use: CUDA_VISIBLE_DEVICES, else NVIDIA's device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])
    if visible is None or not present:
        return present
    count = 0
    for entry in map(str.strip, visible.split(",")):
        is_index = entry.isdigit() and int(entry) < present
        if not (is_index or entry.startswith(("GPU-", "MIG-"))):
            break  # CUDA stops at the first entry that names no device
        count += 1
    return count


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this machine's CPU multiplies in bfloat16, and whether oneDNN, which PyTorch calls, may use that.

    Source:
        ONEDNN_MAX_CPU_ISA: https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
    """
    highest = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    if not re.search("ALL|DEFAULT|BF16|FP16|AMX|AVX10", highest.upper()):
        return False
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:  # not Linux
        return False
    # of the first core: "flags" on x86, "Features" on ARM
    words = next((line.split(":", 1)[1].split() for line in lines if re.match(r"(flags|Features)\s*:", line)), [])
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def threads_per_rank(ranks: int) -> int:
    """Return the CPU threads for each of `ranks` processes on this machine; the user's own setting wins.

    OpenMP takes a list too, one number a nesting level, and ignores what it cannot read.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    cores = len(os.sched_getaffinity(0))
    if not wanted.isdigit() and "SLURM_STEP_ID" in os.environ:
        wanted = os.environ.get("SLURM_CPUS_PER_TASK", "")
        if cores < _number("SLURM_CPUS_ON_NODE", 0):  # this task has cores of its own
            ranks = 1
    return max(1, int(wanted) if wanted.isdigit() else cores // ranks)


def slurm_job() -> str | None:
    """Return the number of the SLURM job that this process is in, if it is in one."""
    return os.environ.get("SLURM_JOB_ID") or None


CONFIG_DIGEST = "TITAN_CONFIG_DIGEST"
"""Of the config that this process's launcher has frozen."""


def config_digest(path: Path) -> str:
    """Return a digest of a frozen config's text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def launcher_pid() -> int | None:
    """Return the process that started this rank, where that was titan's local launcher."""
    pid = os.environ.get("TITAN_LAUNCHER_PID")
    return int(pid) if pid else None


def _number(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        problem = Problem(f"{name} = {text} in the environment is not a number", suggestion=f"unset {name}")
        raise ConfigError([problem])
    return number
