"""Pipeline parallelism: every stage of the mesh has some blocks, and micro-batches flow through them.

The schedules are PyTorch's. titan decides which modules each stage has, what a stage's tensors look like, and that
the loss is divided as without a pipeline, so gradients come out the same.

Source:
    GPipe, https://arxiv.org/abs/1811.06965; 1F1B and interleaving, https://arxiv.org/abs/2104.04473; zero bubble,
    https://arxiv.org/abs/2401.10241; DualPipeV, https://arxiv.org/abs/2412.19437.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)

from titan.config.schema import PipelineSchedule
from titan.models.llama import Llama

V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")
"""Schedules in which the first and the last stage lie on the same rank."""


@dataclass(frozen=True)
class Pipeline:
    """This rank's stages and the schedule that runs them."""

    schedule: PipelineScheduleSingle | PipelineScheduleMulti
    has_first_stage: bool
    has_last_stage: bool


def stages_of_rank(schedule: PipelineSchedule, ranks: int, rank: int, stages: int) -> list[int]:
    """Return the stages that a pipeline rank has, ascending."""
    if schedule.name in V_SCHEDULES:
        return [rank, stages - 1 - rank]
    return list(range(rank, stages, ranks))


def split_model(model: Llama, blocks: Sequence[int], is_first: bool, is_last: bool) -> Llama:
    """Return a copy of a model on meta that has some of its blocks; names of parameters stay."""
    stage = copy.deepcopy(model)
    if not is_first:
        stage.tok_embeddings = None
    if not is_last:
        stage.norm = stage.output = None
    for name in list(stage.layers):
        if int(name) not in blocks:
            del stage.layers[name]
    return stage


def build_pipeline(
    parts: Sequence[nn.Module],
    stage_indices: Sequence[int],
    n_stages: int,
    schedule: PipelineSchedule,
    microbatches: int,
    group: dist.ProcessGroup,
    device: torch.device,
    shapes: tuple[Tensor, Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Pipeline:
    """Return the schedule over this rank's stages.

    Args:
        parts: This rank's stages, parallelised.
        stage_indices: Which stages they are.
        n_stages: Of the whole pipeline.
        schedule: By PyTorch's name.
        microbatches: Into how many a micro-batch of the data is cut.
        group: The ranks of the pipeline.
        device: This rank's.
        shapes: Tokens, hidden states and logits of one pipeline microbatch, on meta.
        loss: Logits and labels in, this microbatch's share of the global mean out.
    """
    tokens, hidden, logits = shapes
    stages = []
    for part, index in zip(parts, stage_indices, strict=True):
        stages.append(
            PipelineStage(
                part,
                index,
                n_stages,
                device,
                input_args=(tokens if index == 0 else hidden,),
                output_args=(logits if index == n_stages - 1 else hidden,),
                group=group,
            )
        )
    kind = get_schedule_class(schedule.name)
    # The loss is already divided by the tokens of the whole global batch.
    built = kind(
        stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
        n_microbatches=microbatches,
        loss_fn=loss,
        scale_grads=False,
    )
    return Pipeline(built, 0 in stage_indices, n_stages - 1 in stage_indices)


def run_pipeline(pipeline: Pipeline, tokens: Tensor, labels: Tensor) -> Tensor:
    """Run forward and backward of one micro-batch; returns the loss on the rank of the last stage, zero elsewhere."""
    losses: list[Tensor] | None = [] if pipeline.has_last_stage else None
    target = labels if pipeline.has_last_stage else None
    arguments = (tokens,) if pipeline.has_first_stage else ()
    pipeline.schedule.step(*arguments, target=target, losses=losses)
    if losses:
        return torch.stack([loss.detach() for loss in losses]).sum()
    return torch.zeros((), device=tokens.device)
