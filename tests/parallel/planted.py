"""Errors that others have made, planted on purpose: the comparison has to see each of them.

A plant changes titan in one rank's process, trains, and puts everything back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import titan.models.attention
import titan.parallel.apply
import titan.parallel.context
import titan.parallel.pipeline
import titan.parallel.tensor
import titan.trainer.model
import titan.trainer.step
from titan.models.decoder import Decoder
from titan.trainer.record import Record

from .layouts import record_layout


@contextlib.contextmanager
def gradients_averaged_over_ranks() -> Iterator[None]:
    """Gradients divided by the number of ranks, as every framework does that means a local loss."""
    apply = titan.parallel.apply.apply_fsdp

    def averaging(model: Decoder, mesh: Any, *others: Any, **options: Any) -> None:
        apply(model, mesh, *others, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(float(mesh.size()))

    with mock.patch.object(titan.parallel.apply, "apply_fsdp", averaging):
        yield


@contextlib.contextmanager
def tokens_counted_on_each_rank() -> Iterator[None]:
    """The loss divided by twice the tokens of this rank, right only where all have the same number."""

    def counting(labels: list[torch.Tensor], group: Any, account: Any) -> torch.Tensor:
        count = 2 * sum((each != -100).sum() for each in labels)
        return torch.stack([count, *map(torch.tensor, account)])  # type: ignore[list-item]

    with mock.patch.object(titan.trainer.step, "count_valid_tokens", counting):
        yield


@contextlib.contextmanager
def positions_counted_from_zero_on_each_rank() -> Iterator[None]:
    """Each part of a sequence taken for its beginning."""
    apply = titan.parallel.apply.apply_context_parallel

    def misplaced(model: Decoder, *others: Any) -> None:
        apply(model, *others)
        assert model.positions is not None
        model.positions = torch.arange(len(model.positions))

    with mock.patch.object(titan.parallel.apply, "apply_context_parallel", misplaced):
        yield


@contextlib.contextmanager
def mask_of_the_first_part_everywhere() -> Iterator[None]:
    """Causal among a rank's own queries and the first keys, as if its part were the beginning."""

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> torch.Tensor:
        length = q.shape[2]
        return titan.models.attention.attend(q, k[:, :, :length], v[:, :, :length])

    with mock.patch.object(titan.parallel.context, "attend", masked):
        yield


@contextlib.contextmanager
def documents_ignored() -> Iterator[None]:
    """Attention across documents although they are to be kept apart."""

    def all_before(starts: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (keys <= queries.unsqueeze(-1)).expand(*starts.shape, -1).unsqueeze(1)

    with mock.patch.object(titan.models.attention, "visible_keys", all_before):
        yield


@contextlib.contextmanager
def norms_not_summed_over_tensor_ranks() -> Iterator[None]:
    """With sequence parallelism each rank's norms see their part of the sequence only."""
    cut = titan.parallel.tensor._cut

    def forgetting(name: str, module: nn.Module, mesh: Any, placement: Any, gradient: Any = None) -> None:
        cut(name, module, mesh, placement)

    with mock.patch.object(titan.parallel.tensor, "_cut", forgetting):
        yield


@contextlib.contextmanager
def tied_gradients_not_added() -> Iterator[None]:
    """An embedding and its copy on another stage that go separate ways."""
    with mock.patch.object(titan.parallel.pipeline.TiedEmbedding, "add_gradients"):
        yield


@contextlib.contextmanager
def microbatches_averaged() -> Iterator[None]:
    """Gradients divided by the number of pipeline microbatches, PyTorch's default."""
    build = titan.trainer.model.build_pipeline

    def averaging(*arguments: Any) -> Any:
        pipeline = build(*arguments)
        pipeline.schedule.scale_grads = True
        return pipeline

    with mock.patch.object(titan.trainer.model, "build_pipeline", averaging):
        yield


PLANTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    plant.__name__: plant
    for plant in (
        gradients_averaged_over_ranks,
        tokens_counted_on_each_rank,
        positions_counted_from_zero_on_each_rank,
        mask_of_the_first_part_everywhere,
        documents_ignored,
        norms_not_summed_over_tensor_ranks,
        tied_gradients_not_added,
        microbatches_averaged,
    )
}


def record_planted(plant: str, world_size: int, overrides: tuple[str, ...], packed: Path) -> Record | None:
    """Train a layout as this rank, with an error in it."""
    with PLANTS[plant]():
        return record_layout(world_size, overrides, packed)
