"""The norm of all gradients together, whatever mesh they lie on, and clipping by it.

A sharded parameter's gradient lies in pieces; a replicated one's lies whole on every rank and must count once. So
gradients are grouped by the process groups over which they are sharded, the squares of each group are summed in its own
ranks, and the groups are added up. One small all-reduce for each kind of sharding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def global_grad_norm(
    parameters: Iterable[nn.Parameter],
    device: torch.device,
    stage_group: dist.ProcessGroup | None = None,
    copies: Sequence[nn.Parameter] = (),
) -> Tensor:
    """Return the 2-norm of all gradients, equal on every rank.

    Args:
        parameters: This rank's parameters.
        device: Where the result lies; a rank may have no gradient at all.
        stage_group: Ranks that hold other parameters (pipeline stages), if there are any.
        copies: Those of the parameters that another stage has too, and counts.

    Shape:
        (), float32.
    """
    kinds: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None and not any(parameter is copy for copy in copies):
            kinds[_sharding_groups(parameter.grad)].append(local_part(parameter.grad))
    # PyTorch's norm of a large float32 tensor on a CPU is off by up to 1e-4, depending on how it is sharded; on CUDA
    # the sum is a tree, and float64 would be slow.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    total = torch.zeros((), dtype=dtype, device=device)
    # Groups are visited in the order of the model's parameters, which is the same on all their ranks.
    for groups, gradients in kinds.items():
        gradients = [gradient for gradient in gradients if gradient.numel()]
        squares = torch.zeros((), dtype=dtype, device=device)
        if gradients:
            norms = torch._foreach_norm(gradients, 2, dtype=dtype)
            squares = torch.stack([norm.to(device) for norm in norms]).square().sum()
        for group in groups:
            dist.all_reduce(squares, group=group)
        total = total + squares
    if stage_group is not None:
        dist.all_reduce(total, group=stage_group)
    return total.sqrt().float()


def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients down so that their norm is at most `max_norm`; 0 leaves them alone."""
    divide_gradients(parameters, clip_divisor(norm, max_norm))


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor | None:
    """Return by what gradients are to be divided so that their norm is at most `max_norm`, 1 at least; None at 0.

    Shape:
        (), float32.
    """
    return ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm > 0 else None


def divide_gradients(parameters: Iterable[nn.Parameter], divisor: Tensor | None) -> None:
    """Divide all gradients, in place; None leaves them alone. Shape: ()."""
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients and divisor is not None:
        torch._foreach_div_(gradients, divisor.to(gradients[0].device))


def local_part(gradient: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _sharding_groups(gradient: Tensor) -> tuple[dist.ProcessGroup, ...]:
    if not isinstance(gradient, DTensor):
        return ()
    mesh, groups = gradient.device_mesh, []
    for axis, placement in enumerate(gradient.placements):
        if placement.is_partial():
            raise AssertionError("a gradient has to be reduced before its norm is taken")
        if hasattr(placement, "dim") and mesh.size(axis) > 1:
            groups.append(mesh.get_group(axis))
    return tuple(groups)
