"""The model on its mesh, with initial weights, and the seam that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from titan.config.degrees import plan_stages, stages_per_rank
from titan.config.schema import TitanConfig
from titan.data.loader import Batch
from titan.models.llama import Llama
from titan.parallel.apply import DTYPES, apply_parallelism, init_weights, plain_name
from titan.parallel.mesh import Mesh
from titan.parallel.pipeline import Pipeline, build_pipeline, run_pipeline, split_model, stages_of_rank
from titan.parallel.tensor import vocab_parallel_cross_entropy
from titan.trainer.loss import LossSum, cross_entropy_sum, loss_share
from titan.trainer.step import ForwardBackward, build_forward_backward


@dataclass(frozen=True)
class BuiltModel:
    """What this rank has of the model."""

    parts: list[Llama]
    """One, or this rank's stages of the pipeline."""
    forward_backward: ForwardBackward
    applied: list[str]
    """What was done to it, as lines for the log."""

    @property
    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters by their names in the bare model."""
        return [(plain_name(name), p) for part in self.parts for name, p in part.named_parameters()]


def build_model(config: TitanConfig, mesh: Mesh, device: torch.device) -> BuiltModel:
    """Return this rank's part of the model, initialised, and how to run it."""
    with torch.device("meta"):
        whole = Llama(config.model, config.training.seq_len)
    loss_sum: LossSum = cross_entropy_sum
    if config.parallelism.tp > 1 and config.parallelism.loss_parallel:
        loss_sum = partial(vocab_parallel_cross_entropy, group=mesh.group("tp"))
    if config.parallelism.pp == 1:
        applied = _finish(whole, config, mesh, device)
        return BuiltModel([whole], build_forward_backward(whole, loss_sum), applied)

    settings = config.parallelism
    n_stages = settings.pp * stages_per_rank(settings)
    plan = plan_stages(config.model.n_layers, n_stages, settings.pp_less_first, settings.pp_less_last)
    indices = stages_of_rank(settings.pp_schedule, settings.pp, mesh.coordinate("pp"), n_stages)
    parts = [split_model(whole, plan[i], i == 0, i == n_stages - 1) for i in indices]
    applied, *_ = [_finish(part, config, mesh, device) for part in parts]
    microbatches = config.training.local_batch_size if settings.pp_microbatches == -1 else settings.pp_microbatches
    seam = PipelineForwardBackward(loss_sum)
    seam.pipeline = build_pipeline(
        parts,
        indices,
        n_stages,
        settings.pp_schedule,
        microbatches,
        mesh.group("pp"),
        device,
        _stage_shapes(config, microbatches),
        seam.loss,
    )
    blocks = "; ".join(f"stage {i}: {_listed(stage)}" for i, stage in enumerate(plan))
    applied.append(f"pipeline {settings.pp_schedule.name}, {microbatches} microbatches, blocks {blocks}")
    return BuiltModel(parts, seam, applied)


class PipelineForwardBackward:
    """The seam for a model that runs as a pipeline. The schedule calls `loss` without telling it of the step."""

    pipeline: Pipeline

    def __init__(self, loss_sum: LossSum) -> None:
        self.loss_sum = loss_sum
        self._valid_tokens: Tensor | None = None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return one pipeline microbatch's share of the global mean."""
        assert self._valid_tokens is not None, "set by __call__"
        return loss_share(logits, labels, self._valid_tokens, self.loss_sum)

    def __call__(self, batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
        """Run all micro-batches; returns the loss on the rank of the last stage, zero elsewhere."""
        self._valid_tokens = valid_tokens
        return torch.stack([run_pipeline(self.pipeline, batch.tokens, batch.labels) for batch in batches]).sum()


def _finish(part: Llama, config: TitanConfig, mesh: Mesh, device: torch.device) -> list[str]:
    applied = apply_parallelism(part, config, mesh, device)
    init_weights(part, config.training.seed, device)
    part.train()
    return applied


def _stage_shapes(config: TitanConfig, microbatches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, hidden states and logits of one pipeline microbatch, on meta."""
    settings, dtype = config.parallelism, DTYPES[config.training.param_dtype]
    rows = config.training.local_batch_size // microbatches
    tokens = config.training.seq_len // settings.cp
    words = config.model.vocab_size // (settings.tp if settings.loss_parallel else 1)
    cut = settings.tp if settings.sequence_parallel else 1
    with torch.device("meta"):
        return (
            torch.empty(rows, tokens, dtype=torch.int64),
            # PyTorch's stages send gradients back for what needs them
            torch.empty(rows, tokens // cut, config.model.dim, dtype=dtype, requires_grad=True),
            torch.empty(rows, tokens, words, dtype=dtype, requires_grad=True),
        )


def _listed(blocks: list[int]) -> str:
    return f"{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])
