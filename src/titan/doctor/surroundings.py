"""What is around a run: memory and limits of the machine, SLURM, keys, and the hub's cache."""

from __future__ import annotations

import netrc
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from titan.doctor.finding import Finding, note, ok, problem

_GIB = 2**30
_FEW_FILES = 1024
_SMALL_SHM = 64 * 2**20
_SLURM_SECONDS = 4


def find_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Iterator[Finding]:
    """Look at memory and processors, and at what a container leaves of them."""
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    total, free = (kilobytes[name] * 1024 / _GIB for name in ("MemTotal", "MemAvailable"))
    values = {"total_gib": round(total, 2), "available_gib": round(free, 2)}
    what = f"{free:.1f} of {total:.1f} GiB available"
    try:
        limit = int((cgroup / "memory.max").read_text()) / _GIB
    except (OSError, ValueError):  # another kind of cgroup, or no limit
        limit = total
    if limit < total:
        used = int((cgroup / "memory.current").read_text()) / _GIB
        free = min(free, limit - used)
        what += f", but this container may use {limit:.1f} and uses {used:.1f}"
        values["container_gib"] = round(limit, 2)
    if free < 2:
        yield note("memory", what, "a rank takes about half a GiB before its model", **values)
    else:
        yield ok("memory", what, **values)
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    if usable < cores:
        advice = "more CPUs for the job (cluster.cpus_per_task), or taskset's mask"
        yield note("cpu", f"{usable} of {cores} cores may be used", advice, cores=cores, usable=usable)
    else:
        yield ok("cpu", f"{cores} cores", cores=cores, usable=usable)


def find_shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Look at /dev/shm, through which NCCL and data loaders exchange what they have."""
    advice = "docker run --shm-size=8g   or  --ipc=host; in Kubernetes, an emptyDir of medium Memory at /dev/shm"
    try:
        disk = shutil.disk_usage(path)
    except OSError as error:
        yield problem("shm", f"{path}: {error.strerror}", advice)
        return
    what = f"{path} has {disk.free / _GIB:.2f} of {disk.total / _GIB:.2f} GiB free"
    if disk.free < _SMALL_SHM:
        yield problem("shm", what, advice, free_gib=disk.free / _GIB)
    elif disk.free < _GIB:
        yield note("shm", f"{what}, which is little for NCCL", advice, free_gib=disk.free / _GIB)
    else:
        yield ok("shm", what, free_gib=round(disk.free / _GIB, 2))


def find_limits() -> Iterator[Finding]:
    """Look at how many files a process may have open; a rank takes all that it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    has_no_end = hard == resource.RLIM_INFINITY
    what = f"open files a process: {'as many as it wants' if has_no_end else f'at most {hard}'}"
    advice = "raise the hard limit: LimitNOFILE of the service, or nofile in /etc/security/limits.conf"
    if has_no_end or hard > _FEW_FILES:
        yield ok("files", what, soft=soft, hard=hard)
    elif hard < _FEW_FILES:
        yield problem("files", what, advice, soft=soft, hard=hard)
    else:
        yield note("files", f"{what}: little for many data files, or some hundred ranks", advice, soft=soft, hard=hard)


def find_slurm() -> Iterator[Finding]:
    """See whether jobs can be submitted from here."""
    missing = [name for name in ("sbatch", "srun", "sinfo", "squeue", "scontrol") if shutil.which(name) is None]
    if len(missing) == 5:
        yield ok("slurm", "not here; cluster=slurm works on a login node of a SLURM cluster")
        return
    if missing:
        yield problem("slurm", f"there is no {', no '.join(missing)}", "install SLURM's client commands")
        return
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %a %D %T"],
            capture_output=True,
            text=True,
            timeout=_SLURM_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield problem("slurm", f"sinfo has not answered for {_SLURM_SECONDS} s", "is slurmctld up?  scontrol ping")
        return
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield problem("slurm", f"sinfo: {said}", "scontrol ping   and  echo $SLURM_CONF")
        return
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    if not lines:
        yield problem("slurm", "sinfo lists no partition", "is this account allowed to use one?")
    elif job := os.environ.get("SLURM_JOB_ID"):
        yield note("slurm", f"this shell is inside job {job}", "cluster=local uses its devices", partitions=len(lines))
    else:
        yield ok("slurm", "; ".join(lines[:4]) + " ..." * (len(lines) > 4), partitions=len(lines))


def find_keys() -> Iterator[Finding]:
    """See which keys are there. What they are is never read further than that, nor shown."""
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    is_login = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").is_file()
    if "HF_TOKEN" in os.environ and not os.environ["HF_TOKEN"].strip():
        yield note("hf_token", "HF_TOKEN is set, and empty", "unset HF_TOKEN, or export HF_TOKEN=...")
    elif "HF_TOKEN" in os.environ and os.environ["HF_TOKEN"] != os.environ["HF_TOKEN"].strip():
        yield note("hf_token", "HF_TOKEN has blanks or line feeds around it", "export HF_TOKEN=...   without them")
    elif "HF_TOKEN" in os.environ or is_login:
        yield ok("hf_token", "HF_TOKEN is set" if "HF_TOKEN" in os.environ else "a login of hf auth login is kept")
    else:
        yield note("hf_token", "none, so nothing gated can be fetched", "export HF_TOKEN=...   or  hf auth login")
    if os.environ.get("WANDB_API_KEY") or _has_netrc("api.wandb.ai"):
        yield ok("wandb_key", "WANDB_API_KEY is set" if os.environ.get("WANDB_API_KEY") else "in ~/.netrc")
    else:
        yield note(
            "wandb_key", "none, so Weights & Biases works offline only", "export WANDB_API_KEY=... or wandb login"
        )


def find_hub_cache() -> Iterator[Finding]:
    """See that what is fetched from the Hugging Face hub can be kept."""
    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE)
    parent = next(each for each in (path, *path.parents) if each.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        yield problem("hub_cache", f"{path} cannot be written", "export HF_HOME=/path/that/can/be/written")
        return
    free = shutil.disk_usage(parent).free / _GIB
    what = f"{path}, {free:.1f} GiB free" + (", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "")
    if free < 1:
        yield note("hub_cache", what, "export HF_HOME=/path/with/space", free_gib=round(free, 2))
    else:
        yield ok("hub_cache", what, free_gib=round(free, 2))


def _has_netrc(host: str) -> bool:
    try:
        return host in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
