"""Peak memory of this process."""

from __future__ import annotations

import torch

GIB = 1 << 30


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this rank has held, in GiB.

    On CUDA what PyTorch has reserved on the device since `reset_peak_memory`; on a CPU the process's resident set
    since it was started, which includes PyTorch itself.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GIB
    return float("nan")


def device_memory_gib(device: torch.device) -> float | None:
    """Return how much memory a GPU has, in GiB; None for a CPU, whose memory is not a rank's alone."""
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Start to look for a new peak, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
