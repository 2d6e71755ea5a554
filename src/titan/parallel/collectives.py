"""Collectives with a backward pass, on plain tensors.

Tensor parallelism is made of four of them. Each is the other's backward: what was gathered is scattered, what was
summed is copied. They are autograd functions over PyTorch's functional collectives, which torch.compile can trace
and overlap, and which run alike on NCCL and gloo.

Source:
    Megatron-LM, https://arxiv.org/abs/1909.08053 (f and g), and sequence parallelism,
    https://arxiv.org/abs/2205.05198 (g and its conjugate).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

# The names are new in torch 2.13; the old ones warn there, and are all that 2.11 has.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' parts along `dim`; backward sums over ranks and keeps this rank's part."""
    return _Gather.apply(x, dim, group)  # type: ignore[return-value]


def scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks and keep this rank's part along `dim`; backward concatenates."""
    return _ScatterSum.apply(x, dim, group)  # type: ignore[return-value]


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return x, which is the same on every rank; backward sums over ranks."""
    return _Copy.apply(x, group)  # type: ignore[return-value]


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks; backward hands the gradient, which is the same on every rank, through."""
    return _Sum.apply(x, group)  # type: ignore[return-value]


def gather_same_use(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate parts that all ranks then use in the same way; backward keeps this rank's part and sums nothing."""
    return _GatherSameUse.apply(x, dim, group)  # type: ignore[return-value]


def all_gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate along `dim`, without a backward pass."""
    return _wait(_all_gather(x.contiguous(), dim, group))


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Sum and keep a part along `dim`, without a backward pass."""
    return _wait(_reduce_scatter(x.contiguous(), "sum", dim, group))


def all_reduce(x: Tensor, group: dist.ProcessGroup, operation: str = "sum") -> Tensor:
    """Reduce over ranks, without a backward pass."""
    return _wait(funcol.all_reduce(x.contiguous(), operation, group))


def _wait(x: Tensor) -> Tensor:
    # While compiling it has been waited for already; a second wait in the graph would keep the compiler from
    # overlapping the exchange with the matrix product next to it.
    return x.wait() if isinstance(x, funcol.AsyncCollectiveTensor) else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return reduce_scatter(grad, ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return all_gather(grad, ctx.dim, ctx.group), None, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_reduce(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _GatherSameUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        size = grad.shape[ctx.dim] // ctx.group.size()
        return grad.narrow(ctx.dim, ctx.group.rank() * size, size).contiguous(), None, None
