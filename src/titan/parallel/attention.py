"""Which of PyTorch's kernels computes attention: chosen once, before the first step, tried, and said in the log.

    flash       FlashAttention 2 on CUDA, PyTorch's own on a CPU; 16 bits on CUDA, and no documents there
    cudnn       cuDNN's, on CUDA: 16 bits
    efficient   on CUDA; any number format, and masks
    math        plain matrix products, which materialise all scores: for comparison
    flash3      FlashAttention 3 in place of flash, on Hopper, from the package flash_attn_3
    flex        FlexAttention on CUDA, for documents that are kept apart: no mask of sequence times sequence
    cpu         titan's own, on a CPU; what is compiled takes it by itself, for it needs a C++ compiler

What cannot be done is refused in `titan.config.check` as far as the config tells; the rest shows here, on the device,
in a small trial.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from titan.config.schema import Attention, ContextMethod
from titan.errors import ConfigError, Problem
from titan.models.attention import CausalAttention, Kernel, attend, takes_flash, visible_keys
from titan.models.cpu_attention import compile_kernel
from titan.parallel.context import is_in_full

_BACKENDS = {
    Attention.flash: SDPBackend.FLASH_ATTENTION,
    Attention.flash3: SDPBackend.FLASH_ATTENTION,
    Attention.cudnn: SDPBackend.CUDNN_ATTENTION,
    Attention.efficient: SDPBackend.EFFICIENT_ATTENTION,
    Attention.math: SDPBackend.MATH,
}
_KERNEL = re.compile(r"_scaled_dot_product_(flash|efficient|cudnn|fused)_attention")
_LEAST_FLEX_HEAD = 16
_TRIED_POSITIONS = 128


@dataclass(frozen=True)
class AttentionShape:
    """What attention has to compute with."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    has_documents: bool
    """Whether documents are kept apart."""
    method: ContextMethod | None
    """How ranks that share a sequence attend; None where none do."""


def apply_attention(model: nn.Module, attention: Attention, shape: AttentionShape, device: torch.device) -> str:
    """Choose the kernel for every block of a model, in place; after context parallelism, which exchanges the modules.

    Returns:
        What was chosen, for the log.

    Raises:
        ConfigError: If the device or PyTorch cannot do what is asked.
    """
    kernel, description = choose_kernel(attention, shape, device)
    for module in model.modules():
        if isinstance(module, CausalAttention):
            module.kernel = kernel
    return f"attention: {description}"


def choose_kernel(attention: Attention, shape: AttentionShape, device: torch.device) -> tuple[Kernel, str]:
    """Return the kernel and its description.

    Raises:
        ConfigError: If the device or PyTorch cannot do what is asked.
    """
    if attention is Attention.flash3:
        _activate_flash3()
    if shape.method is ContextMethod.ring:
        return Kernel(), _describe_ring(attention, shape, device)
    if attention is Attention.cpu:
        _compile_own(shape)
        return Kernel(is_own=True), "cpu, titan's own"
    is_flex = attention is Attention.flex
    if attention is Attention.default and shape.has_documents and device.type == "cuda":
        is_flex = shape.head_size >= _LEAST_FLEX_HEAD
    if is_flex:
        return Kernel(is_flex=True), "flex, without a mask: only where documents leave something to see"
    kernel = Kernel(_order(device) if attention is Attention.default else (_BACKENDS[attention],))
    taken = _try_out(kernel, attention, shape, device)
    taken = "flash3" if attention is Attention.flash3 else taken
    if not _has_mask(kernel, shape, device):
        return kernel, taken
    return kernel, f"{taken}, with a mask of all queries and keys" + " for the documents" * shape.has_documents


def _order(device: torch.device) -> tuple[SDPBackend, ...]:
    """Return of what `default` takes the first that can; on a CPU PyTorch's own order is right."""
    if device.type != "cuda":
        return ()
    flash, rest = SDPBackend.FLASH_ATTENTION, (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    # On Hopper and later cuDNN uses instructions of the tensor cores that FlashAttention 2 knows nothing of.
    capability = torch.cuda.get_device_capability(device)
    if capability >= (9, 0):
        return (SDPBackend.CUDNN_ATTENTION, flash, *rest)
    return (flash, *rest) if capability >= (8, 0) else rest


def _has_mask(kernel: Kernel, shape: AttentionShape, device: torch.device) -> bool:
    if shape.has_documents:
        return True
    is_part = shape.method is ContextMethod.allgather  # its queries do not begin where the keys do
    return is_part and not takes_flash(torch.empty(0, shape.head_size, dtype=shape.dtype, device=device), kernel)


class _Watch(TorchDispatchMode):
    """Notes which kernel of SDPA runs; math is the one that is made of others."""

    taken = "math"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if found := _KERNEL.search(str(func)):
            self.taken = found[1]
        return func(*args, **(kwargs or {}))


def _try_out(kernel: Kernel, attention: Attention, shape: AttentionShape, device: torch.device) -> str:
    """Attend forward and backward over a few positions; returns what PyTorch calls the kernel that it took.

    Raises:
        ConfigError: With PyTorch's reasons, if the kernel that was asked for cannot.
    """
    queries = _TRIED_POSITIONS // 2 if shape.method is ContextMethod.allgather else _TRIED_POSITIONS
    positions = torch.arange(_TRIED_POSITIONS, device=device)
    visible = None
    if shape.has_documents:
        visible = visible_keys(
            torch.zeros(1, queries, dtype=torch.int64, device=device), positions[-queries:], positions
        )
    q, k = (
        # as a block makes them: the heads of a position beside each other
        torch.zeros(1, length, heads, shape.head_size, dtype=shape.dtype, device=device).transpose(1, 2)
        for length, heads in ((queries, shape.heads), (_TRIED_POSITIONS, shape.kv_heads))
    )
    watch = _Watch()
    with warnings.catch_warnings(record=True) as reasons, torch.enable_grad():
        warnings.simplefilter("always")
        try:
            with watch:
                out = attend(q.requires_grad_(), k.requires_grad_(), k, visible, kernel)
            out.sum().backward()
        except RuntimeError as error:
            said = [str(reason.message).split(" (Triggered")[0] for reason in reasons]
            why = " ".join(dict.fromkeys(said)) or str(error).splitlines()[0]
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            what = f"training.attention = {attention.name} cannot do this on {name}"
            raise ConfigError([Problem(what, f"PyTorch says: {why}", "training.attention=default")]) from error
    return watch.taken


def _compile_own(shape: AttentionShape) -> None:
    try:
        compile_kernel(shape.head_size, shape.dtype)
    except (RuntimeError, OSError) as error:  # OSError: nothing may be loaded from where it was compiled to
        what = "titan's attention for CPUs does not compile here"
        raise ConfigError([Problem(what, str(error), "training.attention=flash")]) from error


def _activate_flash3() -> None:
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (AttributeError, ImportError, RuntimeError, ValueError) as error:  # AttributeError: before 2.11
        raise ConfigError(
            [
                Problem(
                    "training.attention = flash3, but PyTorch cannot activate FlashAttention 3",
                    f"{type(error).__name__}: {error}. It needs PyTorch 2.11 and the package flash_attn_3.",
                    "training.attention=default",
                )
            ]
        ) from error


def _describe_ring(attention: Attention, shape: AttentionShape, device: torch.device) -> str:
    if device.type == "cuda" and is_in_full(shape.dtype, shape.has_documents):
        what = "documents" if shape.has_documents else "float32"
        return f"math, from rank to rank: the ring's kernel, flash, takes no {what}"
    return f"{Attention.flash3.name if attention is Attention.flash3 else Attention.flash.name}, from rank to rank"
