"""Mixed precision on a rank that shares its weights with no other.

FSDP casts what it gathers. Where there is nothing to gather it would copy every weight and every gradient several
times for that alone, and keep the copies of the whole model. Here a weight is cast where it is used: a module that asks
itself for one of its parameters gets it in `param_dtype`, and autograd brings the gradient back in float32.

The numbers are those of FSDP, to the bit, but for two: an embedding that is also the output has its two gradients added
in float32; and float8 that is compiled takes its weights from float32 at once, as it does where they are gathered in
float8.

Parameters themselves, and what goes through them (optimizer, checkpoints, `named_parameters`), stay as they are.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


def apply_mixed_precision(model: nn.Module, param_dtype: torch.dtype) -> None:
    """Let every module of a model compute with its parameters in `param_dtype`, in place.

    Args:
        model: On meta or on a device; everything else is applied.
        param_dtype: What activations are computed in; with the parameters' own nothing changes.
    """
    for module in model.modules():
        names = tuple(name for name, own in module._parameters.items() if own is not None and own.dtype != param_dtype)
        if names:
            module.__class__ = _casting(type(module), names, param_dtype)


@functools.cache  # one class for all modules of a kind, or the compiler would take each block for another one
def _casting(own: type[nn.Module], names: tuple[str, ...], dtype: torch.dtype) -> type[nn.Module]:
    return type(own.__name__, (own,), {name: _cast(name, dtype) for name in names})


def _cast(name: str, dtype: torch.dtype) -> property:
    def cast(module: nn.Module) -> Tensor:
        parameter = module._parameters[name]
        assert parameter is not None, "it was there when precision was applied"
        if torch.compiler.is_compiling() and parameter.ndim < 2:
            return _round(parameter, dtype)
        return parameter.to(dtype)

    return property(cast)


# An operator of our own, so that the compiler rounds: in what it makes one pass of, as of a norm, it leaves a cast out
# that the next operation takes back, and would compute with the weight itself, as no rank with FSDP does.
@torch.library.custom_op("titan::round", mutates_args=())
def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


@_round.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


_round.register_autograd(  # both ways, or a gradient would come back as it was before it was rounded
    lambda ctx, grad: (_round(grad, ctx.dtype), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "dtype", inputs[0].dtype),
)
