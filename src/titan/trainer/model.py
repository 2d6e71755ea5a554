"""The model on its mesh, with initial weights, and the seam that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titan.config.degrees import has_fsdp, pipeline_microbatches, plan_stages, stages_of_ranks
from titan.config.schema import TitanConfig
from titan.data.loader import Batch
from titan.models.decoder import Decoder
from titan.models.family import ModelFamily
from titan.parallel.apply import DTYPES, apply_parallelism, init_weights, plain_parameters
from titan.parallel.compile import mark_cuda_graphs
from titan.parallel.float8 import gather_in_float8
from titan.parallel.fsdp import begin_micro_batch
from titan.parallel.mesh import Mesh
from titan.parallel.pipeline import (
    ForwardPipeline,
    Pipeline,
    TiedEmbedding,
    build_pipeline,
    run_pipeline,
    split_model,
)
from titan.trainer.step import Evaluate, ForwardBackward, build_evaluate, build_forward_backward

Fill = Callable[[Decoder, ModelFamily, int, torch.device, torch.device], None]
"""Gives a model's parameters their values: `init_weights`, or what a simulation does instead."""


@dataclass(frozen=True)
class BuiltModel:
    """What this rank has of the model."""

    parts: list[Decoder]
    """One, or this rank's stages of the pipeline."""
    forward_backward: ForwardBackward
    evaluate: Evaluate
    applied: list[str]
    """What was done to it, as lines for the log."""
    weights_changed: Callable[[], None] = lambda: None
    """To be called whenever the weights have changed: after each step, and after a checkpoint was loaded."""

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's parameters by their names in the bare model."""
        return [named for part in self.parts for named in plain_parameters(part)]

    @property
    def copies(self) -> list[nn.Parameter]:
        """Those of the parameters whose original is on another stage: a tied output without its embedding."""
        return [
            part.output.weight  # type: ignore[misc]
            for part in self.parts
            if part.config.tie_embeddings and part.output is not None and part.tok_embeddings is None
        ]


def build_model(
    config: TitanConfig, family: ModelFamily, mesh: Mesh, device: torch.device, fill: Fill = init_weights
) -> BuiltModel:
    """Return this rank's part of the model and how to run it.

    Args:
        config: Resolved.
        family: The model's.
        mesh: Of all ranks.
        device: This rank's.
        fill: Gives the parameters, which are on meta, their values.
    """
    with torch.device("meta"):
        whole = family.build(config.model, config.training.seq_len)
    if config.parallelism.pp == 1:
        applied = _finish(whole, family, config, mesh, device, fill)
        weights_changed = _gather_in_float8([whole], config, mesh, applied)
        mark = mark_cuda_graphs if config.compile.enable and config.compile.mode.has_cuda_graphs else lambda: None

        def begin(is_last: bool) -> None:
            mark()
            begin_micro_batch(whole, config.parallelism.reshard_after_forward, mesh.storage["fsdp"].size(), is_last)

        seams = build_forward_backward(whole, begin), build_evaluate(whole, mark)
        return BuiltModel([whole], *seams, applied, weights_changed)

    settings, stage_group = config.parallelism, mesh.stage_group
    assert stage_group is not None, "pp > 1"
    ranks = stages_of_ranks(settings)
    n_stages = sum(map(len, ranks))
    plan = settings.pp_modules or plan_stages(
        config.model.n_layers, n_stages, settings.pp_less_first, settings.pp_less_last
    )
    indices = ranks[mesh.coordinates["pp"]]
    parts = [split_model(whole, plan[index]) for index in indices]
    for part in parts:
        part.leaves_output = True
    applied, *_ = [_finish(part, family, config, mesh, device, fill) for part in parts]
    weights_changed = _gather_in_float8(parts, config, mesh, applied)
    microbatches = pipeline_microbatches(config)
    shapes = stage_shapes(config, microbatches)
    seam = PipelineForwardBackward(parts)
    seam.pipeline = build_pipeline(
        parts,
        indices,
        n_stages,
        settings.pp_schedule,
        settings.pp_schedule_csv,
        microbatches,
        stage_group,
        device,
        shapes,
        seam.loss,
    )
    owner = {stage: rank for rank, own in enumerate(ranks) for stage in own}
    forward = ForwardPipeline(
        dict(zip(indices, parts, strict=True)),
        [owner[stage] for stage in range(n_stages)],
        stage_group,
        microbatches,
        shapes,
    )
    if config.model.tie_embeddings:
        first, last = (next(rank for rank, own in enumerate(ranks) if stage in own) for stage in (0, n_stages - 1))
        embedding, copy = (
            next(
                (p for part in parts if (module := getattr(part, name)) is not None for p in module.parameters()), None
            )
            for name in ("tok_embeddings", "output")
        )
        other = last if mesh.coordinates["pp"] == first else first
        seam.tied = TiedEmbedding(embedding, copy, stage_group, other)
    name = settings.pp_schedule_csv or settings.pp_schedule.name
    stages = "; ".join(f"stage {index}: {describe_modules(stage)}" for index, stage in enumerate(plan))
    applied.append(f"pipeline {name}, {microbatches} microbatches, {stages}")
    return BuiltModel(parts, seam, forward.run, applied, weights_changed)


class PipelineForwardBackward:
    """The seam for a model that runs as a pipeline. The schedule calls `loss` without telling it of the step."""

    pipeline: Pipeline

    def __init__(self, parts: Sequence[Decoder]) -> None:
        self.with_output = next((part for part in parts if part.output is not None), None)
        self.tied: TiedEmbedding | None = None
        self.valid_tokens: Tensor | None = None

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return one pipeline microbatch's share of the global mean."""
        assert self.valid_tokens is not None, "set by __call__"
        assert self.with_output is not None, "asked for on the rank of the last stage"
        return self.with_output.loss_of(hidden, labels) / self.valid_tokens

    def __call__(self, batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
        """Run all micro-batches; returns the loss on the rank of the last stage, zero elsewhere."""
        self.valid_tokens = valid_tokens
        losses = [
            run_pipeline(self.pipeline, batch.tokens, batch.labels, batch.starts, is_last=index == len(batches) - 1)
            for index, batch in enumerate(batches)
        ]
        if self.tied is not None:
            self.tied.add_gradients()
        return torch.stack(losses).sum()


def _finish(
    part: Decoder, family: ModelFamily, config: TitanConfig, mesh: Mesh, device: torch.device, fill: Fill
) -> list[str]:
    applied = apply_parallelism(part, family, config, mesh, device)
    shard_device = torch.device("cpu") if config.parallelism.cpu_offload else device
    fill(part, family, config.training.seed, device, shard_device)
    part.train()
    return applied


def _gather_in_float8(
    parts: Sequence[Decoder], config: TitanConfig, mesh: Mesh, applied: list[str]
) -> Callable[[], None]:
    """Do so if the config asks, and say so in `applied`; returns what to call when the weights have changed."""
    if not config.float8.fsdp_all_gather or not has_fsdp(config.parallelism):
        return lambda: None
    gathered = gather_in_float8(parts, mesh.storage.get_group("fsdp"))
    applied += gathered.describe(has_scales := bool(config.float8.precompute_scales))
    return gathered.compute_scales if has_scales else lambda: None


def stage_shapes(config: TitanConfig, microbatches: int) -> tuple[Tensor, Tensor]:
    """Return tokens and hidden states of one pipeline microbatch, on meta."""
    settings, dtype = config.parallelism, DTYPES[config.training.param_dtype]
    rows = config.training.local_batch_size // microbatches
    tokens = config.training.seq_len // settings.cp
    cut = settings.tp if settings.sequence_parallel else 1
    with torch.device("meta"):
        return (
            torch.empty(rows, tokens, dtype=torch.int64),
            # PyTorch's stages send gradients back for what needs them
            torch.empty(rows, tokens // cut, config.model.dim, dtype=dtype, requires_grad=True),
        )


def describe_modules(modules: list[str]) -> str:
    """Return a stage's modules, its blocks as a range."""
    blocks = [name.removeprefix("layers.") for name in modules if name.startswith("layers.")]
    ranged = [f"blocks {blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"] if blocks else []
    first = [name for name in modules if name == "tok_embeddings"]
    return ", ".join([*first, *ranged, *(name for name in modules if name in ("norm", "output"))])
