"""The order in which parallelism is put around a single-device model. Each line says why it stands where it does."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from titan.config.degrees import choose_attention, compiles_loss, has_float8_output, has_fsdp, pipeline_microbatches
from titan.config.schema import ActivationCheckpointMode, ClusterKind, ContextMethod, Dtype, Float8Recipe, TitanConfig
from titan.errors import TitanError
from titan.models.decoder import Decoder
from titan.models.family import ModelFamily
from titan.models.init import Draw, draw_rows
from titan.parallel.activation_checkpoint import apply_activation_checkpoint
from titan.parallel.attention import AttentionShape, apply_attention
from titan.parallel.compile import apply_compile
from titan.parallel.context import apply_context_parallel
from titan.parallel.float8 import apply_float8, projection_of
from titan.parallel.fsdp import apply_fsdp
from titan.parallel.loss import apply_loss
from titan.parallel.mesh import Mesh
from titan.parallel.precision import apply_mixed_precision
from titan.parallel.tensor import apply_tensor_parallel

DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


def apply_parallelism(
    model: Decoder, family: ModelFamily, config: TitanConfig, mesh: Mesh, device: torch.device
) -> list[str]:
    """Make a model on meta run on a mesh, in place.

    Returns:
        What was done, as lines for the log.
    """
    done = []
    # Float8 exchanges modules, so it comes before anything that holds on to them.
    if config.float8.recipe is not Float8Recipe.none:
        result = apply_float8(model, config.float8, device, family.cut_of, config.parallelism.tp)
        done += result.describe(config.float8)
    # Context parallelism exchanges the module between a block's matrices, tensor parallelism cuts those matrices.
    settings = config.parallelism
    if mesh.cp_group is not None:
        apply_context_parallel(model, mesh.cp_group, settings.cp_method, settings.cp_head_tail)
        done.append(f"context parallel {settings.cp_method.name}{', head-tail balanced' * settings.cp_head_tail}")
    if config.cluster.kind is not ClusterKind.simulated or config.cluster.simulated_steps:
        done.append(apply_attention(model, choose_attention(config), _attention_shape(config), device))
    if settings.tp > 1:
        apply_tensor_parallel(model, family.cut_of, mesh.tp, settings.sequence_parallel, settings.loss_parallel)
        done.append(
            f"tensor parallel, sequence parallel {_on(settings.sequence_parallel)}, "
            f"loss parallel {_on(settings.loss_parallel)}"
        )
    # The loss is the output's own, so that the logits never leave it; what gathers the words of all ranks is behind it.
    if model.output is not None:
        has_words = settings.tp == 1 or settings.loss_parallel
        group = mesh.tp.get_group() if settings.tp > 1 and settings.loss_parallel else None
        project = projection_of(model.output) if has_float8_output(config.float8) else None
        chunk_size = config.training.loss_chunk_size if has_words else 0
        size = apply_loss(model, chunk_size, device.type, group, project, compiles_loss(config.compile))
        positions = config.training.local_batch_size * config.training.seq_len // settings.cp
        positions //= pipeline_microbatches(config) if settings.pp > 1 else 1
        if 0 < size < positions:
            done.append(f"loss in chunks of {size:,} of {positions:,} positions")
    # Activation checkpointing before compile, so that the compiler sees what is recomputed.
    recompute = config.activation_checkpoint
    if recompute.mode is ActivationCheckpointMode.memory_budget:
        done.append(f"activation checkpointing within {recompute.memory_budget:.0%} of the memory, by the compiler")
    elif recompute.mode is not ActivationCheckpointMode.none:
        wrapped = apply_activation_checkpoint(model, recompute.mode, recompute.every)
        done.append(f"activation checkpointing {recompute.mode.name}: {wrapped} of {len(model.layers)} blocks")
    # Compile before FSDP, so that its hooks stay outside the graphs.
    if config.compile.enable:
        has_budget = recompute.mode is ActivationCheckpointMode.memory_budget
        is_async = settings.async_tp and device.type == "cuda"
        apply_compile(
            model,
            config.compile,
            recompute.memory_budget if has_budget else 1.0,
            mesh.tp.get_group() if is_async else None,
        )
        done.append(f"compile with {config.compile.backend}{', asynchronous tensor parallel' * is_async}")
    # FSDP last: it shards what all others have left. A single rank has nobody to share with.
    param_dtype = DTYPES[config.training.param_dtype]
    if has_fsdp(settings):
        apply_fsdp(
            model,
            mesh.fsdp,
            param_dtype,
            DTYPES[config.training.reduce_dtype],
            settings.reshard_after_forward,
            has_pipeline=settings.pp > 1,
            cpu_offload=settings.cpu_offload,
        )
    else:
        apply_mixed_precision(model, param_dtype)
    if settings.cpu_offload:
        done.append("weights, gradients and optimizer in the CPU's memory")
    return done


def _attention_shape(config: TitanConfig) -> AttentionShape:
    model, settings = config.model, config.parallelism
    over_heads = settings.tp
    if settings.cp > 1 and settings.cp_method is ContextMethod.all_to_all:
        over_heads *= settings.cp
    return AttentionShape(
        heads=model.n_heads // over_heads,
        kv_heads=model.n_kv_heads // over_heads,
        head_size=model.dim // model.n_heads,
        dtype=DTYPES[config.training.param_dtype],
        has_documents=config.data.mask_documents,
        method=settings.cp_method if settings.cp > 1 else None,
    )


def init_weights(
    model: Decoder, family: ModelFamily, seed: int, device: torch.device, shard_device: torch.device
) -> None:
    """Allocate this rank's shards and draw them.

    Every value is the one that a single process would draw; see `titan.models.init`.

    Args:
        model: On meta, with everything applied.
        family: The model's.
        seed: The run's.
        device: Where the model computes.
        shard_device: Where its shards live: there too, or on the CPU with `cpu_offload`.
    """
    allocate(model, device, shard_device)
    with torch.no_grad():
        for name, parameter in plain_parameters(model):
            _init_parameter(name, parameter, seed, family.draw(name, model.config))


def allocate(model: Decoder, device: torch.device, shard_device: torch.device) -> None:
    """Give a model on meta its memory: its shards on `shard_device`, its buffers on the device that computes."""
    model.to_empty(device=shard_device)
    model.tie_weights()
    model.init_buffers(device)


def plain_parameters(model: Decoder) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters by their names in the bare, whole model.

    Wrappers add to names. And the output of a pipeline stage that is tied to an embedding on another stage is that
    embedding, in a copy of its own.
    """
    named = [
        (name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""), parameter)
        for name, parameter in model.named_parameters()
    ]
    if not model.config.tie_embeddings:
        return named
    return [(name.replace("output.", "tok_embeddings."), parameter) for name, parameter in named]


def _init_parameter(name: str, parameter: nn.Parameter, seed: int, draw: Draw | None) -> None:
    rows, columns = local_indices(parameter)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    drawn = draw_rows(name, parameter.shape, rows, seed, draw)
    drawn = drawn[:, columns.start : columns.stop] if parameter.ndim > 1 else drawn
    if drawn.shape != local.shape:
        raise TitanError(f"{name}: this rank holds {tuple(local.shape)}, but its mesh says {tuple(drawn.shape)}")
    local.copy_(drawn)


def local_indices(parameter: nn.Parameter) -> tuple[range, range]:
    """Return which rows and columns of a parameter this rank holds.

    FSDP shards what tensor parallelism has left of a tensor, so the axes count from the innermost outwards,
    whatever their order on the mesh.
    """
    indices = [range(size) for size in (*parameter.shape, 1)[:2]]
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        coordinates = mesh.get_coordinate()
        assert coordinates is not None, "this rank is not on the parameter's mesh"
        for axis in reversed(range(mesh.ndim)):
            dim = getattr(parameter.placements[axis], "dim", None)
            if dim is not None:
                indices[dim] = _chunk(indices[dim], mesh.size(axis), coordinates[axis])
    return indices[0], indices[1]


def _on(is_on: bool) -> str:
    return "on" if is_on else "off"


def _chunk(whole: range, parts: int, index: int) -> range:
    size = -(-len(whole) // parts)  # as torch.chunk cuts: the last ones may be short or empty
    return whole[min(index * size, len(whole)) : min((index + 1) * size, len(whole))]
