"""titan's own attention for CPUs: cpu_attention.cpp, as operators that autograd and the compiler know.

PyTorch's kernel multiplies blocks with calls to a library, for which the heads of small models are too small, and in
bfloat16 its backward pass is no faster than in float32. This one keeps a block in registers, or in the tiles that some
CPUs have for bfloat16, skips what a query does not see, documents included, takes groups of heads as they are, and
rotates queries and keys as it reads them. `benchmarks/attention.py` measures both.

It is compiled when a model is first put together, for its head size and number format, by the compiler's own cache of
C++ libraries: about a second, once for a machine.

Shape letters: B batch, H query heads, K kv heads, Q queries, S keys, E head size.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

DTYPES = (torch.float32, torch.bfloat16)


class Span(NamedTuple):
    """The keys that each query sees, from `first` to `last`, both included. Shape: (B, Q) each, int32."""

    first: Tensor
    last: Tensor


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("batch", "head", "position")]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batches", "heads", "kv_heads", "queries", "keys")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("first", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("angles", ctypes.c_void_p),
        ("angles_batch", ctypes.c_int64),
    ]


@functools.cache
def compile_kernel(head_size: int, dtype: torch.dtype) -> ctypes.CDLL:
    """Compile for a head size and a number format, or load what was compiled before.

    Raises:
        RuntimeError: If there is no C++ compiler, or it fails; with its words.
        OSError: If what it has compiled cannot be loaded.
    """
    from torch._inductor.codecache import CppCodeCache

    is_half = dtype is torch.bfloat16
    # asks the system for leave to use tiles, as PyTorch does before its own products
    defined = {"HEAD_SIZE": head_size, "IS_BFLOAT16": is_half, "HAS_TILES": is_half and torch.cpu._init_amx()}
    lines = [f"#define {name} {int(value)}\n" for name, value in defined.items()]
    source = "".join(lines) + Path(__file__).with_suffix(".cpp").read_text()
    # Inductor forbids the C++ compiler to multiply and add in one; here that is wanted.
    return CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",))


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, visible: Span | None = None, rope: Tensor | None = None) -> Tensor:
    """Return attention; without `visible` causal, of queries that stand at the end of the keys.

    A query that sees nothing gives zeros.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        visible: The keys that each query sees.
        rope: The angles by which queries and keys are to be rotated before, as `apply_rope` does it, where that has not
            been done. It is done in float32 as they are read, so that nothing is written and read again.

    Shape:
        q: (B, H, Q, E), E a multiple of 4. k, v: (B, K, S, E), K divides H. All float32, or all bfloat16, on a CPU.
        rope: (S, E/2, 2), or (B, S, E/2, 2) where rows have positions of their own; float32. Returns (B, H, Q, E).
    """
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError(f"queries, keys and values are {q.dtype}, {k.dtype}, {v.dtype}; all float32 or all bfloat16")
    if rope is not None:
        _check_angles(rope, q, k)
    first, last = visible or (None, None)
    return torch.ops.titan.attention(q, k, v, first, last, rope)[0]


def _check_angles(rope: Tensor, q: Tensor, k: Tensor) -> None:
    """Refuse what the kernel would read as something else, or read behind."""
    wanted = (k.shape[2], k.shape[3] // 2, 2)
    if rope.shape not in (wanted, (k.shape[0], *wanted)) or rope.dtype is not torch.float32:
        raise ValueError(f"the angles are {rope.dtype}, {tuple(rope.shape)}, and not float32, {wanted}, for these keys")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"there are {q.shape[2]} queries and angles for {k.shape[2]} positions")


@torch.library.custom_op("titan::attention", mutates_args=(), device_types="cpu")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None, rope: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = _rowwise(q), _rowwise(k), _rowwise(v)
    out, sums = _results(q)
    shape, kept = _shape(q, k, first, last, rope)
    kernel = compile_kernel(q.shape[3], q.dtype)
    kernel.attention_forward(shape, *map(_view, (q, k, v, out)), ctypes.c_void_p(sums.data_ptr()))
    del kept
    return out, sums


@torch.library.custom_op("titan::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    rope: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, grad = (_rowwise(x) for x in (q, k, v, out, grad))
    grads = _gradients(q, k, v)
    shape, kept = _shape(q, k, first, last, rope)
    sums = sums.contiguous()
    kernel = compile_kernel(q.shape[3], q.dtype)
    kernel.attention_backward(
        shape, *map(_view, (q, k, v, out)), ctypes.c_void_p(sums.data_ptr()), *map(_view, (grad, *grads))
    )
    del kept
    return grads


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for the output, and for the logarithm of each query's denominator."""
    return _heads_beside_each_other(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the gradients."""
    return _heads_beside_each_other(q), _heads_beside_each_other(k), _heads_beside_each_other(v)


_attention.register_fake(lambda q, *_: _results(q))
_attention_backward.register_fake(lambda grad, q, k, v, *_: _gradients(q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_sums: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    grads = torch.ops.titan.attention_backward(grad, *ctx.saved_tensors)
    return *grads, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.titan.attention)
def _count(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """As PyTorch counts its own kernels: two products over all queries and keys. The arguments are shapes."""
    return 4 * q[0] * q[1] * q[2] * q[3] * k[2]


@register_flop_formula(torch.ops.titan.attention_backward)
def _count_backward(grad: Any, q: Any, k: Any, *_: Any, **__: Any) -> int:
    return 10 * q[0] * q[1] * q[2] * q[3] * k[2]


def _heads_beside_each_other(x: Tensor) -> Tensor:
    """Return memory for a result, laid out as the projection behind attention reads it. Shape: as x's."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _view(x: Tensor) -> Any:
    return ctypes.byref(_View(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)))


def _shape(q: Tensor, k: Tensor, first: Tensor | None, last: Tensor | None, rope: Tensor | None) -> tuple[Any, Any]:
    """Return the shape, and what has to live as long as it is used."""
    kept = [None if x is None else x.contiguous() for x in (first, last, rope)]
    batches, heads, queries, head_size = q.shape
    return ctypes.byref(
        _Shape(
            *(batches, heads, k.shape[1], queries, k.shape[2]),
            *(head_size**-0.5, torch.get_num_threads()),
            *(None if x is None else x.data_ptr() for x in kept),
            kept[2].stride(0) if kept[2] is not None and kept[2].ndim == 4 else 0,
        )
    ), kept
