"""What a process keeps of the memory that its steps free."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from titan.trainer.device import keep_freed_memory

def resident_mib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))

def left_of_a_step():
    before = resident_mib()
    # larger than what glibc may by itself begin to keep, 32 MiB
    block = torch.ones(32 << 20)
    del block
    return resident_mib() - before

left_of_a_step()  # PyTorch's first makes more than its memory
print(left_of_a_step())
keep_freed_memory()
print(left_of_a_step())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's allocator")
def test_freed_memory_is_kept_from_then_on() -> None:
    """Before, a step's memory goes back to the kernel; after, it stays with the process."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240, check=True)
    before, after = map(float, done.stdout.split())
    assert before < 16
    assert after > 120
