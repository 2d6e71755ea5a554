"""FlexAttention on a CPU, where PyTorch computes it unfused and refuses to train with it, though it can."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.nn.attention.flex_attention

import titan.parallel.apply
from titan.config.schema import Attention
from titan.trainer.record import Record

from .layouts import record_layout


def allow(*tensors: Any) -> None:
    """Take the place of the check that refuses a CPU; a plain function, which torch.compile can trace."""


@contextlib.contextmanager
def flex_on_cpu() -> Iterator[None]:
    """Let models that are built inside choose FlexAttention, as `auto` does on CUDA."""
    apply = titan.parallel.apply.apply_attention

    def choose(model: Any, attention: Attention, *others: Any) -> str:
        return apply(model, Attention.flex, *others)

    with (
        mock.patch.object(torch.nn.attention.flex_attention, "_validate_device", allow),
        mock.patch.object(torch.nn.attention.flex_attention, "_warn_once"),
        mock.patch.object(titan.parallel.apply, "apply_attention", choose),
    ):
        yield


def record_flex(world_size: int, overrides: tuple[str, ...], packed: Path) -> Record | None:
    """Train a layout as this rank, with FlexAttention."""
    with flex_on_cpu():
        return record_layout(world_size, overrides, packed)
