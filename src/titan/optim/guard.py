"""An update that a number on the device can call off, so that the host does not have to know it first."""

from __future__ import annotations

import torch
from torch import Tensor


def step_unless(optimizer: torch.optim.Optimizer, is_left_out: Tensor) -> None:
    """Do an optimizer step, or leave every weight and every state as it is.

    PyTorch's fused optimizers look at `found_inf`, which is there for gradient scaling, on the device; the count of
    steps goes back too (2.11 to 2.13, CPU and CUDA). For any other optimizer the host has to know, and waits.

    Args:
        optimizer: Any.
        is_left_out: 1 leaves the step out, 0 does it.

    Shape:
        is_left_out: ().
    """
    if not is_skipped_on_device(optimizer):
        if not is_left_out.item():
            optimizer.step()
        return
    device = optimizer.param_groups[0]["params"][0].device
    # not `non_blocking`: with offloaded weights the CPU would look before the number is there
    optimizer.found_inf = is_left_out.to(device, torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def is_skipped_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this optimizer looks at `found_inf` by itself."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
