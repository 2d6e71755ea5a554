"""This rank's device and process: threads, memory, determinism."""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import platform
import random

import numpy as np
import torch

from titan.config.schema import Device
from titan.errors import ConfigError


def select_device(kind: Device, local_rank: int, threads: int) -> torch.device:
    """Return the device of this rank, made ready.

    Raises:
        ConfigError: If the config wants a GPU that PyTorch does not see.
    """
    if kind is Device.cuda:
        if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"cluster.device = cuda, but PyTorch sees {torch.cuda.device_count()} GPUs and this is local rank "
                f"{local_rank}\n    Try  cluster.device=cpu, or a build of PyTorch that fits the driver"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(threads)
    return torch.device("cpu")


def make_deterministic() -> None:
    """Allow only operations that give the same bits every time; before the first CUDA call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def seed_generators(seed: int, place: str) -> None:
    """Seed torch's generators, Python's and NumPy's; titan draws nothing from them, a model of one's own may.

    Args:
        seed: The run's.
        place: What tells ranks apart that are to draw other numbers.
    """
    number = int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:8], "little") >> 1
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % (1 << 32))


def device_name(device: torch.device) -> str:
    """Return what the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


class GarbageCollector:
    """Collects at the steps that it is told and at no other time.

    Python collects whenever a counter runs over, which happens on each rank in another step, and every time all
    other ranks wait for the one that does.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def __enter__(self) -> GarbageCollector:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._was_enabled:
            gc.enable()

    def step(self, step: int) -> None:
        """Collect the young generations if this step's turn has come."""
        if step % self.interval == 0:
            gc.collect(1)


@functools.cache
def keep_freed_memory() -> None:
    """Give back what is free now, and from here on keep what is freed; once a process, after its first step.

    Activations are freed and allocated anew in every step. By default glibc maps and unmaps each large one, and the
    kernel clears its pages again. Before the end of the first step it would be too early: what building and compiling
    leave would lie between the activations, and those of later steps, which fit into no gap, above them all.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # another C library
        return
    malloc_trim(0)
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_arena_max, 1)
