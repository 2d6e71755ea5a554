"""The memory of a rank, item by item.

Everything is added up as if it were there at the same moment, except that the loss and the block that is computed again
take turns. That is a little more than is ever in use at once, and what PyTorch's allocator comes to reserve: memory of
one size that is given back does not serve another.

Shapes in a comment: n tokens of a microbatch on a rank, D width, K numbers of all keys, F inner width, V words, each
over tp where tensor parallelism cuts it; a bytes of a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from titan.config.degrees import (
    accumulation_steps,
    choose_loss_chunk,
    compiles_loss,
    frees_blocks,
    has_float8_output,
    has_fsdp,
    has_ring,
    pipeline_microbatches,
)
from titan.config.schema import ActivationCheckpointMode, ContextMethod, Device, Dtype, TitanConfig
from titan.plan.assumptions import TITAN, Assumptions, System
from titan.plan.pipeline import LOOPED, Flow, flow_of
from titan.plan.rank import Shapes, Stage, stages_of

_STATISTIC = 4  # bytes of the log-sum-exp of a head, and of a norm's root, at a position


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank on its device."""

    parameters: float
    """Shards in float32, and buffers."""
    optimizer: float
    """AdamW's two moments."""
    gradients: float
    """Of the shards, in float32."""
    whole_gradients: float
    """Of weights that wait for more microbatches before they are summed over ranks."""
    activations: float
    """Kept from forward to backward, of all microbatches in hand."""
    logits: float
    """Of the loss at its peak; the block that is computed at one time, where that is more."""
    gathered: float
    """Weights that FSDP has gathered, or that were cast, and gradients on their way."""
    exchanged: float
    """What a pipeline's stages receive and hand on."""
    overhead: float
    """What the allocator reserves on top."""
    host: float = 0.0
    """In the CPU's memory instead, with cpu_offload; not in the total."""

    @property
    def total(self) -> float:
        """What PyTorch reserves at its peak: memory_gib in metrics.jsonl."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


@dataclass(frozen=True)
class Kept:
    """Bytes of a block's activations, for a microbatch."""

    saved: float
    """From forward to backward."""
    again: float
    """Of one block more, while its backward pass runs: computed again, and gradients."""


def rank_memory(
    config: TitanConfig, pp_rank: int, assumptions: Assumptions, system: System = TITAN, shapes: Shapes | None = None
) -> Memory:
    """Return what a pipeline rank holds; of its shards the first, which are the largest.

    Args:
        config: Resolved.
        pp_rank: Along `pp`.
        assumptions: For the allocator's share.
        system: What the program keeps.
        shapes: Of the config, where they are there already.
    """
    shapes = shapes or Shapes(config)
    stages = stages_of(config)[pp_rank]
    microbatches = pipeline_microbatches(config) if config.parallelism.pp > 1 else 1
    flow = flow_of(config.parallelism, microbatches, pp_rank)
    numbers = shapes.shard_numbers(stages)
    parts = {
        "parameters": 4.0 * numbers,
        "optimizer": 2.0 * shapes.moment_bytes * numbers,
        "gradients": 4.0 * numbers,
    }
    host = 0.0
    if config.parallelism.cpu_offload:
        host, parts = sum(parts.values()), dict.fromkeys(parts, 0.0)
    parts["parameters"] += _rotary_bytes(config, shapes)
    kept = {mode: block_bytes(shapes, mode, system) for mode in (True, False)}
    activations = _activations(config, shapes, stages, flow, kept)
    loss = loss_bytes(shapes, system) if any(stage.has_output for stage in stages) else 0.0
    again = max(each.again for each in kept.values())
    parts |= {
        "whole_gradients": _whole_gradients(config, shapes, stages, flow, microbatches),
        "activations": activations,
        "logits": max(loss, again),
        "gathered": _gathered(config, shapes, stages, flow),
        "exchanged": _exchanged(config, shapes, stages, flow, microbatches, system),
    }
    overhead = (assumptions.memory_overhead - 1) * sum(parts.values())
    return Memory(**parts, overhead=overhead, host=host)


def block_bytes(shapes: Shapes, is_checkpointed: bool, system: System = TITAN) -> Kept:
    """Return what is kept of a block.

    What is kept without recomputing is what the backward pass of each operation asks for: a norm's input, what a matrix
    is multiplied by, queries, keys, values and the result of attention, and the feed-forward's three products. A
    compiler computes norms, silu and products of two tensors again by itself.

    Args:
        shapes: Of the config.
        is_checkpointed: Whether activation checkpointing has wrapped it (with every_nth, not all are).
        system: The program.
    """
    config, a = shapes.config, shapes.bytes
    mode = config.activation_checkpoint.mode if is_checkpointed else ActivationCheckpointMode.none
    is_compiled, tp = config.compile.enable, config.parallelism.tp
    dim, ffn, keys = config.model.dim, config.model.ffn_dim / tp, shapes.kv_dim / tp
    own, residual = dim / tp, dim * shapes.between  # what lies inside and between the matrices
    statistics = _STATISTIC * config.model.n_heads / tp
    far = config.parallelism.cp if config.parallelism.cp > 1 else 1
    fetched = keys * far if config.parallelism.cp_method is ContextMethod.allgather else keys
    if has_ring(config.parallelism):
        fetched = own  # repeated to as many heads as the queries have
    attention = 2 * own + 2 * fetched  # queries and result, keys and values
    # a norm's result that is gathered has to be kept, for nobody gathers it again
    normed = dim if shapes.has_sequence_parallel or not is_compiled else 0
    everything = 2 * residual + 2 * normed + attention + ffn * (2 if is_compiled else 4)
    norms = 2 * _STATISTIC * shapes.between
    whole = everything * a + statistics + norms
    # gradients of the feed-forward's three products and of its input, or of attention's four
    gradients = max(3 * ffn + dim + residual, 2 * dim + attention) * a
    saved = whole
    if mode in (ActivationCheckpointMode.full, ActivationCheckpointMode.every_nth):
        saved = residual * a
    elif mode is ActivationCheckpointMode.selective:
        # the input, every second product (wq, wv, w1, w2), attention's result, and what the ranks have summed
        summed = (1 if is_compiled else 2) * residual if tp > 1 else 0
        last = 0 if is_compiled else dim  # of w2, which no backward pass asks for
        saved = (residual + 2 * own + keys + ffn + last + summed) * a + statistics
    elif mode is ActivationCheckpointMode.memory_budget:
        least = residual * a
        saved = least + config.activation_checkpoint.memory_budget * (whole - least)
    again = max(0.0, whole - saved) + gradients
    return Kept(saved * shapes.tokens, again * shapes.tokens)


def is_checkpointed(config: TitanConfig, block: int) -> bool:
    """Return whether activation checkpointing wraps a block."""
    settings = config.activation_checkpoint
    if settings.mode is ActivationCheckpointMode.every_nth:
        return block % settings.every == 0
    return settings.mode is not ActivationCheckpointMode.none


def loss_bytes(shapes: Shapes, system: System = TITAN) -> float:
    """Return what the loss of a microbatch takes at its peak, with what the output is multiplied by.

    In chunks: the logits of one chunk, whose place their gradient takes if the loss is compiled, and otherwise four
    times (the product, in float32, its softmax, rounded); what a float8 output makes of the gradient; the gradients of
    the hidden states and of the weights, those in float32 if there are several chunks. All at once: see
    `System.loss_bytes`.
    """
    config, a, tokens = shapes.config, shapes.bytes, shapes.tokens
    settings, dim = config.parallelism, config.model.dim
    is_cut = settings.tp > 1 and settings.loss_parallel
    words = shapes.words if is_cut else config.model.vocab_size
    hidden = tokens * dim * (shapes.between + 1) * a  # the norm's input and its result, gathered
    chunk = chunk_size(shapes)
    if chunk:
        each = a if compiles_loss(config.compile) else 2 * a + 8
        each += 2 if has_float8_output(config.float8) else 0
        summed = 8 + a if chunk < tokens else 2 * a
        return hidden + min(chunk, tokens) * words * each + tokens * dim * a + words * dim * summed
    each = system.parallel_loss_bytes if is_cut else system.loss_bytes
    return hidden + tokens * words * each


def chunk_size(shapes: Shapes) -> int:
    """Return the positions of a chunk of the loss; 0 for all at once."""
    config = shapes.config
    has_words = config.parallelism.tp == 1 or config.parallelism.loss_parallel
    if config.training.loss_chunk_size == 0 or not has_words:
        return 0
    if config.training.loss_chunk_size > 0:
        return config.training.loss_chunk_size
    device_type = "cpu" if config.cluster.device is Device.cpu else "cuda"
    return choose_loss_chunk(config.model.vocab_size, device_type, compiles_loss(config.compile))


def is_gathered_twice(config: TitanConfig) -> bool:
    """Return whether FSDP frees a block's weights between forward and backward."""
    settings = config.parallelism
    return frees_blocks(settings.reshard_after_forward, settings.pp > 1, settings.dp_shard * settings.cp)


def _activations(
    config: TitanConfig, shapes: Shapes, stages: tuple[Stage, ...], flow: Flow, kept: dict[bool, Kept]
) -> float:
    each = [sum(kept[is_checkpointed(config, block)].saved for block in stage.blocks) for stage in stages]
    # the stages take turns, so each has its share of what is in hand
    return flow.in_hand * sum(each) / len(stages)


def _whole_gradients(
    config: TitanConfig, shapes: Shapes, stages: tuple[Stage, ...], flow: Flow, microbatches: int
) -> float:
    if microbatches * accumulation_steps(config) == 1 or not has_fsdp(config.parallelism):
        return 0.0
    numbers = sorted((shapes.whole_numbers(stage) for stage in stages), reverse=True)
    waiting = flow.stages_with_gradients if accumulation_steps(config) == 1 else len(stages)
    return float(shapes.reduce_bytes * sum(numbers[:waiting]))


def _gathered(config: TitanConfig, shapes: Shapes, stages: tuple[Stage, ...], flow: Flow) -> float:
    """The weights that are there whole: a block and the next one, or all; and the two ends.

    Without FSDP, what the blocks' matrices are cast to, from forward to backward, and the gradient of one of them.
    """
    if not has_fsdp(config.parallelism):
        casts = shapes.bytes if config.training.param_dtype is not Dtype.float32 else 0
        (stage,) = stages
        kept = sum(not is_checkpointed(config, block) for block in stage.blocks)
        return casts * (shapes.block_numbers * max(1, kept) + max(map(math.prod, shapes.matrices.values())))
    block = shapes.block_numbers * shapes.gathered_bytes
    end = shapes.words * config.model.dim * shapes.bytes
    output = end if any(stage.has_output for stage in stages) else 0.0
    # a block's gradient, and the buffer in which it is summed
    reduced = shapes.block_numbers * (shapes.bytes + shapes.reduce_bytes)
    if is_gathered_twice(config):
        return 2 * block + output + reduced
    held = sorted((len(stage.blocks) * block + end * stage.has_embedding for stage in stages), reverse=True)
    count = flow.gathered_stages if config.parallelism.pp_schedule.name in LOOPED else len(held)
    return sum(held[:count]) + output + reduced


def _exchanged(
    config: TitanConfig, shapes: Shapes, stages: tuple[Stage, ...], flow: Flow, microbatches: int, system: System
) -> float:
    """What PyTorch's stages receive into, forward and backward, and the results they keep until they are used."""
    if config.parallelism.pp == 1:
        return 0.0
    edge = shapes.tokens * config.model.dim * shapes.between * shapes.bytes
    total = flow.in_hand * edge
    for stage in stages:
        total += microbatches * edge * ((not stage.has_embedding) + (not stage.has_output))
        if stage.has_output and system.keeps_logits:
            total += microbatches * shapes.tokens * shapes.words * shapes.bytes
    return total


def _rotary_bytes(config: TitanConfig, shapes: Shapes) -> float:
    return config.training.seq_len * (config.model.dim // config.model.n_heads) * 4.0
