"""Pipeline parallelism: every stage of the mesh has some blocks, and micro-batches flow through them.

The schedules are PyTorch's. titan decides which modules each stage has, what a stage's tensors look like, and that
the loss is divided as without a pipeline, so gradients come out the same.

Source:
    GPipe, https://arxiv.org/abs/1811.06965; 1F1B and interleaving, https://arxiv.org/abs/2104.04473; zero bubble,
    https://arxiv.org/abs/2401.10241; DualPipeV, https://arxiv.org/abs/2412.19437.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor

from titan.config.schema import PipelineSchedule
from titan.data.loader import Batch
from titan.models.decoder import Decoder

_NO_OUTPUTS = (
    {"return_outputs": False} if "return_outputs" in inspect.signature(PipelineScheduleSingle.step).parameters else {}
)
"""What a schedule is told, that the last stage's hidden states are not kept to its end; PyTorch has learned it."""


class Stage(PipelineStage):
    """PyTorch's, whose gradients are summed over ranks once a step, however often its schedule runs in it."""

    is_last_run = True
    """Whether the step's last micro-batch flows through it."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Sum them after the last micro-batch; until then they are kept whole, as between two pieces of one."""
        if self.is_last_run:
            super().perform_reduce_grad(grad_scale_factor)


@dataclass(frozen=True)
class Pipeline:
    """This rank's stages and the schedule that runs them."""

    schedule: PipelineScheduleSingle | PipelineScheduleMulti
    stages: list[Stage]
    has_first_stage: bool
    has_last_stage: bool


class TiedEmbedding:
    """An embedding on the first stage and its copy, as the output projection, on the last.

    Both start from the same weights. After each backward pass their gradients are added up, in the same order on both
    sides, so that the optimizer moves both alike.

    Args:
        embedding: The parameter on the first stage; None on a rank without that stage.
        copy: The parameter on the last stage; None on a rank without that stage.
        group: The ranks of the pipeline.
        other: The pipeline rank that has the other of the two.
    """

    def __init__(
        self, embedding: nn.Parameter | None, copy: nn.Parameter | None, group: dist.ProcessGroup, other: int
    ) -> None:
        self.embedding, self.copy, self.group, self.other = embedding, copy, group, other

    def add_gradients(self) -> None:
        """Give both the sum of both gradients."""
        if self.embedding is not None and self.copy is not None:
            mine, theirs = _local_gradient(self.embedding), _local_gradient(self.copy)
            mine.add_(theirs)
            theirs.copy_(mine)
            return
        parameter = self.embedding if self.embedding is not None else self.copy
        if parameter is None:
            return
        mine = _local_gradient(parameter)
        if not mine.numel():  # a shard without rows is without rows on the other stage too
            return
        theirs = torch.empty_like(mine)
        peer = dist.get_global_rank(self.group, self.other)
        exchange = [
            dist.P2POp(dist.isend, mine.contiguous(), peer, self.group),
            dist.P2POp(dist.irecv, theirs, peer, self.group),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        mine.add_(theirs)  # of two numbers: the same bits in either order


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "after a backward pass"
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def split_model(model: Decoder, modules: Sequence[str]) -> Decoder:
    """Return a copy of a model on meta that has some of its modules; names of parameters stay."""
    stage = copy.deepcopy(model)
    for name in ("tok_embeddings", "norm", "output"):
        if name not in modules:
            setattr(stage, name, None)
    for name in list(stage.layers):
        if f"layers.{name}" not in modules:
            del stage.layers[name]
    return stage


def build_pipeline(
    parts: Sequence[nn.Module],
    stage_indices: Sequence[int],
    n_stages: int,
    schedule: PipelineSchedule,
    schedule_csv: str | None,
    microbatches: int,
    group: dist.ProcessGroup,
    device: torch.device,
    shapes: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Pipeline:
    """Return the schedule over this rank's stages.

    Args:
        parts: This rank's stages, parallelised.
        stage_indices: Which stages they are.
        n_stages: Of the whole pipeline.
        schedule: By PyTorch's name.
        schedule_csv: A file with another one, see `titan.config.schedule_file`.
        microbatches: Into how many a micro-batch of the data is cut.
        group: The ranks of the pipeline.
        device: This rank's.
        shapes: Tokens and hidden states of one pipeline microbatch, on meta.
        loss: What the last stage hands out and labels in, this microbatch's share of the global mean out.
    """
    tokens, hidden = shapes
    stages = []
    for part, index in zip(parts, stage_indices, strict=True):
        stages.append(
            Stage(
                part,
                index,
                n_stages,
                device,
                input_args=(tokens if index == 0 else hidden,),
                output_args=(hidden,),
                group=group,
            )
        )
    kind = get_schedule_class(schedule.name) if schedule_csv is None else _PipelineScheduleRuntime
    # The loss is already divided by the tokens of the whole global batch.
    built = kind(
        stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
        n_microbatches=microbatches,
        loss_fn=loss,
        scale_grads=False,
    )
    if schedule_csv is not None:
        built._load_csv(schedule_csv)
    return Pipeline(built, stages, 0 in stage_indices, n_stages - 1 in stage_indices)


def run_pipeline(
    pipeline: Pipeline, tokens: Tensor, labels: Tensor, starts: Tensor | None = None, is_last: bool = True
) -> Tensor:
    """Run forward and backward of one micro-batch; returns the loss on the rank of the last stage, zero elsewhere.

    Gradients are there when the last one of a step has run.
    """
    for stage in pipeline.stages:
        stage.is_last_run = is_last
    losses: list[Tensor] | None = [] if pipeline.has_last_stage else None
    target = labels if pipeline.has_last_stage else None
    arguments = (tokens,) if pipeline.has_first_stage else ()
    # Every stage needs to know where documents begin, and every rank does: it has the same rows.
    options: dict[str, Any] = dict(_NO_OUTPUTS) if starts is None else {"starts": starts, **_NO_OUTPUTS}
    pipeline.schedule.step(*arguments, target=target, losses=losses, **options)
    if losses:
        return torch.stack([loss.detach() for loss in losses]).sum()
    return torch.zeros((), device=tokens.device)


@dataclass(frozen=True)
class ForwardPipeline:
    """This rank's stages, to be run without a backward pass, whatever the schedule of training is.

    Not through PyTorch's schedules, whose `eval` makes the stages agree anew on what they send, at every change from
    training to it and back (2.13), and whose orders are made for a backward pass. Here all stages work in step: in
    each tick every stage passes a microbatch through, and then all hand on what they have, in one exchange.
    """

    parts: dict[int, Decoder]
    """This rank's, by the number of the stage, ascending."""
    owners: list[int]
    """The pipeline rank that has each stage."""
    group: dist.ProcessGroup
    """The ranks of the pipeline."""
    microbatches: int
    """Into how many a micro-batch of the data is cut."""
    shapes: tuple[Tensor, Tensor]
    """Tokens of one pipeline microbatch and what stages hand on of it, on meta; rows may also be shorter."""

    @torch.no_grad()
    def run(self, batches: Sequence[Batch]) -> Tensor:
        """Return the sum of these micro-batches' losses on the rank of the last stage, zero elsewhere. Shape: ()."""
        pieces = [piece for batch in batches for piece in batch.chunk(self.microbatches)]
        device, last = batches[0].tokens.device, len(self.owners) - 1
        total = torch.zeros((), dtype=torch.float64, device=device)
        arrived: dict[int, Tensor] = {}
        for tick in range(len(pieces) + last):
            arriving: dict[int, Tensor] = {}
            exchange: list[dist.P2POp] = []
            for stage, part in self.parts.items():
                if not 0 <= tick - stage < len(pieces):
                    continue
                piece = pieces[tick - stage]
                out = part(piece.tokens if stage == 0 else arrived[stage], piece.starts)
                if stage == last:
                    total += part.loss_of(out, piece.labels)
                elif stage + 1 in self.parts:
                    arriving[stage + 1] = out
                else:
                    exchange.append(self._exchange(dist.isend, out.contiguous(), stage + 1))
            for stage in self.parts:
                if stage and stage - 1 not in self.parts and 0 <= tick + 1 - stage < len(pieces):
                    arriving[stage] = self._hidden(pieces[tick + 1 - stage].tokens)
                    exchange.append(self._exchange(dist.irecv, arriving[stage], stage - 1))
            for work in dist.batch_isend_irecv(exchange) if exchange else ():
                work.wait()
            arrived = arriving
        return total

    def _hidden(self, tokens: Tensor) -> Tensor:
        whole, hidden = self.shapes
        positions = tokens.shape[1] * hidden.shape[1] // whole.shape[1]  # fewer where tensor parallelism cuts them
        return torch.empty(len(tokens), positions, hidden.shape[2], dtype=hidden.dtype, device=tokens.device)

    def _exchange(self, what: Callable[..., Any], tensor: Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(what, tensor, dist.get_global_rank(self.group, self.owners[stage]), self.group)
