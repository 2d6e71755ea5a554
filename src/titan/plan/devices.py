"""The devices that a plan can be made for, from their data sheets.

A data sheet states what a device could do; what a training run gets of that is in `titan.plan.assumptions`. Memory is
what PyTorch shows of it, which is less than the name says.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

from titan.errors import CommandError, Problem
from titan.models.flops import PEAK_TFLOPS


@dataclass(frozen=True)
class Accelerator:
    """What a device could do; bandwidths in GB/s and in one direction."""

    name: str
    """As `--device` takes it."""
    peak_tflops: float | None
    """Dense bfloat16, TFLOP/s; None where nobody knows."""
    float32_tflops: float | None
    """Dense float32 without TF32."""
    has_float8: bool
    """Whether it multiplies float8, at twice the peak of bfloat16."""
    has_hopper_attention: bool
    """Whether cuDNN's and the third FlashAttention's kernels are made for it."""
    memory_gib: float
    """What PyTorch finds."""
    memory_bandwidth: float
    """Between the device and its own memory."""
    node_bandwidth: float
    """To the other devices of its node."""
    network_bandwidth: float
    """To other nodes, its share."""
    host_bandwidth: float
    """To the CPU's memory."""
    note: str = ""
    """What else is to be known."""
    is_peak_known: bool = True
    """Whether the peak is one, and no mere unit of what was measured."""


_SXM = "SXM, NVLink, 400 Gb/s of network for each"
DEVICES = {
    device.name: device
    for device in (
        Accelerator("h100", PEAK_TFLOPS["H100"], 67, True, True, 79.1, 3350, 450, 50, 64, f"80 GB HBM3, {_SXM}"),
        Accelerator(
            "h100_96gb", PEAK_TFLOPS["H100"], 67, True, True, 95.0, 2400, 450, 50, 64,
            f"96 GB HBM2e at 500 W, {_SXM}: the machines of TorchTitan's tables",
        ),
        Accelerator("h200", PEAK_TFLOPS["H200"], 67, True, True, 139.8, 4800, 450, 50, 64, f"141 GB HBM3e, {_SXM}"),
        Accelerator("a100", PEAK_TFLOPS["A100"], 19.5, False, False, 79.1, 2039, 300, 25, 32, "80 GB, SXM, 200 Gb/s"),
        Accelerator("a100_40gb", PEAK_TFLOPS["A100"], 19.5, False, False, 39.4, 1555, 300, 25, 32, "SXM, 200 Gb/s"),
        Accelerator("b200", PEAK_TFLOPS["B200"], 75, True, True, 178.4, 7700, 900, 50, 64, f"180 GB HBM3e, {_SXM}"),
        Accelerator("cpu", None, None, False, False, 0, 20, 5, 1.25, 20, "peak unknown: calibrate, or --peak-tflops"),
    )
}  # fmt: skip
"""By name. From NVIDIA's data sheets of the SXM versions; the CPU's bandwidths are guesses."""


def find_device(name: str) -> Accelerator:
    """Return a device of the table.

    Raises:
        CommandError: If there is none of that name.
    """
    key = name.lower().replace("-", "_").replace(" ", "_")
    found = DEVICES.get(key)
    if found is None:
        near = difflib.get_close_matches(key, DEVICES, n=1, cutoff=0.3) or ["h100"]
        problem = Problem(
            f"--device {name} is no device of the table",
            f"There are: {', '.join(DEVICES)}.\nAnother one: the nearest, and --peak-tflops, --memory-gib, "
            "--memory-bandwidth, --node-bandwidth, --network-bandwidth.",
            f"--device {near[0]}",
        )
        raise CommandError(str(problem))
    return found if found.name != "cpu" else replace(found, memory_gib=machine_memory_gib())


def present_device(folder: Path = Path("/proc/driver/nvidia/gpus")) -> str | None:
    """Return the table's name of this machine's GPU; None where there is none, or the table has it not."""
    for file in sorted(folder.glob("*/information")):
        try:
            words = file.read_text().upper()
        except OSError:
            continue
        for part, name in (("H200", "h200"), ("H100", "h100"), ("A100-SXM4-40", "a100_40gb"), ("A100", "a100")):
            if part in words:
                return name
        return "b200" if "B200" in words and "GB200" not in words else None
    return None


def machine_memory_gib(path: Path = Path("/proc/meminfo")) -> float:
    """Return the memory of this machine."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemTotal:")), 0.0)
