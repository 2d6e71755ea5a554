"""An update that numbers on the device clip or call off, so that the host does not have to know them first.

PyTorch's fused optimizers take both into their kernel, which is there for gradient scaling: they divide each gradient
by `grad_scale` while they read it, where a pass of its own would read and write all gradients once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titan.optim.clip import divide_gradients


def step_unless(optimizer: torch.optim.Optimizer, is_left_out: Tensor, divisor: Tensor | None = None) -> None:
    """Do an optimizer step, or leave every weight and every state as it is.

    What is in the gradients afterwards is not defined: some optimizers divide them in place.

    PyTorch's fused optimizers look at `found_inf`, which is there for gradient scaling, on the device; the count of
    steps goes back too (2.11 to 2.13, CPU and CUDA). For any other optimizer the host has to know, and waits.

    Args:
        optimizer: Any.
        is_left_out: 1 leaves the step out, 0 does it.
        divisor: What every gradient is divided by, see `titan.optim.clip.clip_divisor`; None leaves them.

    Shape:
        is_left_out, divisor: ().
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not is_skipped_on_device(optimizer):
        if not is_left_out.item():
            divide_gradients(parameters, divisor)
            optimizer.step()
        return
    device = parameters[0].device
    # not `non_blocking`: with offloaded weights the CPU would look before the number is there
    optimizer.found_inf = is_left_out.to(device, torch.float32)  # type: ignore[attr-defined]
    optimizer.grad_scale = None if divisor is None else divisor.to(device, torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]


def is_skipped_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this optimizer looks at `found_inf` by itself."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
