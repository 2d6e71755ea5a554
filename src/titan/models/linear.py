"""A linear layer that is fast on every CPU.

PyTorch multiplies float32 matrices on a CPU with MKL, which runs its slower code on processors of other makers than
its own: on two cores of an AMD EPYC 175 GFLOP/s against oneDNN's 380, with the same rounding. oneDNN is in every
x86 build of PyTorch; only the choice is missing (`torch.backends.mkldnn.matmul` offers it for reduced precision
alone). So this layer calls oneDNN for float32 on AMD's processors with AVX-512, and is `nn.Linear` everywhere else: on
CUDA, in bfloat16, and for DTensor weights. `benchmarks/training.py` measures what it gives. On an EPYC without AVX-512
both are equally fast forward, and MKL takes 0.72 to 0.99 of oneDNN's time forward and backward; on an Intel Xeon with
AMX it takes 0.87 to 0.98 for inputs and 0.5 to 0.9 for weights, timed by hand: there it is MKL.

Where oneDNN has no code for bfloat16 (x86 without AVX-512), PyTorch multiplies it in plain loops, several times slower
than float32. There the layer widens to float32, multiplies, and rounds once, as units for bfloat16 do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_made_by_amd() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as processors:
            return "AuthenticAMD" in processors.read(1024)  # the first one tells
    except OSError:
        return False


_PREFERS_ONEDNN = _HAS_ONEDNN and torch.backends.cpu.get_cpu_capability() != "AVX2" and _is_made_by_amd()
"""Whether it is the faster one here."""

_WIDENS_BFLOAT16 = _HAS_ONEDNN and not torch.ops.mkldnn._is_mkldnn_bf16_supported()

_HALVES = (torch.bfloat16, torch.float16)
_HAS_MIXED_PRODUCTS = "dtype_out" in torch.ops.aten.addmm.overloads()
"""Whether CUDA multiplies 16 bits into a sum in float32."""


class Linear(nn.Linear):
    """`nn.Linear` without a bias. Its state and its mathematics are the same."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the transposed weight. Shape: (..., in_features) -> (..., out_features)."""
        return linear(input, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x times the transposed weight, on the fastest exact path.

    Shape:
        x: (..., I). weight: (O, I). Returns (..., O).
    """
    if _is_for_fast_path(x, weight):
        return _FastLinear.apply(x, weight)  # type: ignore[return-value]
    return F.linear(x, weight)


def _is_for_fast_path(x: Tensor, weight: Tensor) -> bool:
    # Exact types, not isinstance: a DTensor has no sharding rule for oneDNN's operator.
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return (
        plain
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and ((x.dtype == torch.float32 and _PREFERS_ONEDNN) or (x.dtype == torch.bfloat16 and _WIDENS_BFLOAT16))
        and x.ndim > 1
        and x.numel() > 0  # oneDNN has no product over nothing, which is the weight's gradient then
        and not torch.is_autocast_enabled("cpu")
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a times the transposed b, on the fastest exact path, without a derivative.

    Shape:
        a: (N, I). b: (O, I). Returns (N, O).
    """
    return _product(a, b) if _is_for_fast_path(a, b) else a @ b.t()


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Add a times the transposed b to `total`, in float32 whatever they are in, without a derivative.

    Shape:
        total: (N, O), float32, changed in place; None begins with the product. a: (N, I). b: (O, I). Returns (N, O).
    """
    if not (a.is_cuda and a.dtype in _HALVES and _HAS_MIXED_PRODUCTS):
        found = product(a, b).float()
        return found if total is None else total.add_(found)
    if total is None:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return torch.ops.aten.addmm.dtype_out(total, a, b.t(), torch.float32, out=total)


class _FastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable  # the operator has no derivative of its own, and PyTorch would silently take it for zero
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _product(grad.flatten(0, -2).t(), x.flatten(0, -2).t())
        return grad_x, grad_weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    flat = _multiply(a.flatten(0, -2), b)
    # As aten::matmul does: the result is no view to autograd, or FSDP would warn of writing into it.
    return torch.ops.aten._unsafe_view(flat, (*a.shape[:-1], b.shape[0]))


# An operator of our own around oneDNN's, so that the compiler looks no further: Inductor takes the weight of
# mkldnn::_linear_pointwise to be a constant (its lowering asserts it, 2.13), which no weight in training is.
@torch.library.custom_op("titan::multiply", mutates_args=(), device_types="cpu")
def _multiply(a: Tensor, b: Tensor) -> Tensor:
    if not _PREFERS_ONEDNN:
        return F.linear(a.float(), b.float()).to(a.dtype)
    # What comes first has to lie row by row, or is copied, by one core and nearly as slowly as it is multiplied. So the
    # product is taken the other way round where less is copied then: both factors of a weight's gradient are turned.
    copied, copied_turned = (0 if first.is_contiguous() else first.numel() for first in (a, b))
    if copied_turned + len(a) * len(b) < copied:
        return _multiply_in_onednn(b, a).t().to(a.dtype).contiguous()
    return _multiply_in_onednn(a, b).to(a.dtype)


@_multiply.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


def _multiply_in_onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a.float(), b.float(), None, "none", [], "")
