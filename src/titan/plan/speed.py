"""The time of a step: every kind of work by its own roofline, then the pipeline's idle time.

    products     operations / (peak x matmul_efficiency), those of float8 at its own peak
    attention    operations / (the same x attention's efficiency); half of the square, for the mask is causal
    elementwise  bytes / (memory bandwidth x efficiency): norms, rotary positions, residuals, silu, the loss, casts
    exchanges    bytes / bandwidth of the slowest link of the ranks concerned
    FSDP         only what a block's computation does not hide

The work of a microbatch on a rank's stages, times the microbatches plus the idle time of the schedule, is the step;
FSDP's exchange and the optimizer come on top. The slowest rank of the pipeline sets the pace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from titan.config.degrees import accumulation_steps, compiles_loss, has_float8_output, has_ring, pipeline_microbatches
from titan.config.schema import (
    ActivationCheckpointMode,
    Attention,
    ContextMethod,
    Dtype,
    Float8Recipe,
    TitanConfig,
)
from titan.plan.assumptions import TITAN, Assumptions, System
from titan.plan.devices import Accelerator
from titan.plan.memory import is_checkpointed, is_gathered_twice
from titan.plan.pipeline import flow_of
from titan.plan.rank import Shapes, Stage, stages_of

_OPTIMIZER_BYTES = 28  # read weight, gradient, two moments; write weight, two moments, in float32
_KERNELS = 45  # operations of a block forward, not compiled


@dataclass(frozen=True)
class Timing:
    """Seconds of a step on the slowest rank, by what they go into; and what it sends."""

    products: float
    attention: float
    elementwise: float
    loss: float
    tensor_parallel: float
    """Exchanges of tp that nothing hides."""
    context_parallel: float
    """Exchanges of cp that nothing hides."""
    fsdp: float
    """Gathering weights and summing gradients, as far as nothing hides it."""
    pipeline: float
    """Handing on between stages."""
    idle: float
    """The pipeline's bubble."""
    host: float
    """Waiting for operations to be handed out."""
    optimizer: float
    traffic: dict[str, float] = field(default_factory=dict)
    """Bytes that a rank receives in a step, by axis."""

    @property
    def step(self) -> float:
        """Of the whole step."""
        return sum(value for name, value in vars(self).items() if name != "traffic")

    @property
    def bubble(self) -> float:
        """Idle time as a share of the step."""
        return self.idle / self.step if self.step else 0.0


@dataclass(frozen=True)
class _Rates:
    """What the device and its links do in a second."""

    product: float
    float8: float
    attention: float
    memory: float
    host: float
    links: dict[str, float]


@dataclass(frozen=True)
class _Work:
    """Of one microbatch on a rank's stages, in seconds."""

    forward: float
    products: float
    attention: float
    elementwise: float
    loss: float
    tensor_parallel: float
    context_parallel: float
    pipeline: float
    host: float

    @property
    def total(self) -> float:
        return sum(value for name, value in vars(self).items() if name != "forward")


def time_step(
    config: TitanConfig,
    device: Accelerator,
    assumptions: Assumptions,
    system: System = TITAN,
    shapes: Shapes | None = None,
) -> Timing | None:
    """Return the time of a step; None where the device's peak is not known.

    Args:
        config: Resolved.
        device: Of every rank.
        assumptions: What it reaches.
        system: The program.
        shapes: Of the config, where they are there already.
    """
    rates = _rates(config, device, assumptions)
    if rates is None:
        return None
    shapes = shapes or Shapes(config)
    settings = config.parallelism
    pieces = pipeline_microbatches(config) if settings.pp > 1 else 1
    runs = accumulation_steps(config)
    ranks = stages_of(config)
    candidates = range(len(ranks)) if len(ranks) <= 4 else {0, 1, len(ranks) // 2, len(ranks) - 1}
    work = {rank: _work_of(config, shapes, ranks[rank], rates, assumptions, system) for rank in candidates}
    slowest = max(work, key=lambda rank: work[rank].total)
    own, count = work[slowest], pieces * runs
    idle = flow_of(settings, pieces, slowest).idle * runs * own.total
    fsdp, traffic = _fsdp(config, shapes, ranks[slowest], rates, assumptions, own, count)
    numbers = max(shapes.shard_numbers(stages) for stages in ranks)
    memory = rates.memory if not settings.cpu_offload else rates.host
    update = numbers * (_OPTIMIZER_BYTES - 4 * (4 - shapes.moment_bytes)) / memory
    traffic |= _activation_traffic(config, shapes, ranks[slowest], count, system)
    return Timing(
        **{name: getattr(own, name) * count for name in vars(own) if name != "forward"},
        fsdp=fsdp,
        idle=idle,
        optimizer=update,
        traffic=traffic,
    )


def link_bandwidth(config: TitanConfig, device: Accelerator, assumptions: Assumptions, axis: str) -> float:
    """Return the bytes a second at which a rank receives in a collective along an axis.

    Ranks lie on the nodes in the mesh's order, tp innermost. Inside a node that is its own link. A group over several
    nodes is held up by the network; of a group that has g ranks in each node, g together bring in what all g need.
    """
    settings = config.parallelism
    inner = {"tp": 1, "cp": settings.tp, "fsdp": settings.tp}
    inner["dp_replicate"] = settings.tp * settings.cp * settings.dp_shard
    inner["pp"] = inner["dp_replicate"] * settings.dp_replicate
    size = {"tp": settings.tp, "cp": settings.cp, "fsdp": settings.dp_shard * settings.cp}
    size |= {"dp_replicate": settings.dp_replicate, "pp": settings.pp}
    per_node = config.cluster.devices_per_node or 1
    node = device.node_bandwidth * assumptions.node_efficiency * 1e9
    if inner[axis] * size[axis] <= per_node:
        return node
    together = max(1, per_node // inner[axis]) if axis != "pp" else 1
    return min(node, together * device.network_bandwidth * assumptions.network_efficiency * 1e9)


def _rates(config: TitanConfig, device: Accelerator, assumptions: Assumptions) -> _Rates | None:
    is_wide = config.training.param_dtype is Dtype.float32
    peak = device.float32_tflops if is_wide and device.float32_tflops else device.peak_tflops
    if peak is None:
        return None
    product = peak * 1e12 * assumptions.matmul_efficiency
    recipe = config.float8.recipe
    float8 = assumptions.float8_efficiency if recipe is Float8Recipe.tensorwise else assumptions.rowwise_efficiency
    links = {
        axis: link_bandwidth(config, device, assumptions, axis) for axis in ("tp", "cp", "fsdp", "dp_replicate", "pp")
    }
    return _Rates(
        product,
        2 * product * float8 if device.has_float8 and recipe is not Float8Recipe.none else product,
        product * attention_efficiency(config, device, assumptions),
        device.memory_bandwidth * 1e9 * assumptions.memory_bandwidth_efficiency,
        device.host_bandwidth * 1e9 * assumptions.node_efficiency,
        links,
    )


def attention_efficiency(config: TitanConfig, device: Accelerator, assumptions: Assumptions) -> float:
    """Return what attention's kernel reaches of what products reach."""
    attention = config.training.attention
    is_new = attention in (Attention.cudnn, Attention.flash3)
    is_new |= attention is Attention.default and not has_ring(config.parallelism)
    if device.has_hopper_attention and is_new and not config.data.mask_documents:
        return assumptions.hopper_attention_efficiency
    return assumptions.attention_efficiency


def _work_of(
    config: TitanConfig,
    shapes: Shapes,
    stages: tuple[Stage, ...],
    rates: _Rates,
    assumptions: Assumptions,
    system: System,
) -> _Work:
    """Return the time of one microbatch, forward and backward, through all stages of a rank."""
    blocks = [block for stage in stages for block in stage.blocks]
    wrapped = sum(is_checkpointed(config, block) for block in blocks)
    parts = [
        (wrapped, _block_work(config, shapes, rates, assumptions, system, True)),
        (len(blocks) - wrapped, _block_work(config, shapes, rates, assumptions, system, False)),
    ]
    sums = {name: sum(count * part[name] for count, part in parts) for name in parts[0][1]}
    outputs = sum(stage.has_output for stage in stages)
    products, loss = _output_work(shapes, rates, system)
    edge = shapes.tokens * config.model.dim * shapes.between * shapes.bytes
    handed = sum((not stage.has_embedding) + (not stage.has_output) for stage in stages)
    host = 0.0
    if not config.compile.enable:
        busy = sum(sums[name] for name in ("products", "attention", "elementwise"))
        host = max(0.0, len(blocks) * 3 * _KERNELS * assumptions.kernel_seconds - busy)
    return _Work(
        forward=sums["forward"],
        products=sums["products"] + outputs * products,
        attention=sums["attention"],
        elementwise=sums["elementwise"],
        loss=outputs * loss,
        tensor_parallel=sums["tensor_parallel"],
        context_parallel=sums["context_parallel"],
        pipeline=handed * (edge / rates.links["pp"] + assumptions.latency_seconds),
        host=host,
    )


def _block_work(
    config: TitanConfig,
    shapes: Shapes,
    rates: _Rates,
    assumptions: Assumptions,
    system: System,
    is_wrapped: bool,
) -> dict[str, float]:
    """Return the seconds of one block for a microbatch."""
    mode = config.activation_checkpoint.mode if is_wrapped else ActivationCheckpointMode.none
    again = {"none": 0.0, "selective": 1.0, "memory_budget": 1 - config.activation_checkpoint.memory_budget}
    repeated = again.get(mode.name, 1.0)
    numbers = sum(map(math.prod, shapes.matrices.values()))
    twice = repeated
    if mode is ActivationCheckpointMode.selective:  # every second product is kept; the last is asked for by nobody
        twice = sum(math.prod(shapes.matrices[name]) for name in ("wk", "wo", "w3")) / numbers
    forward = 2.0 * numbers * shapes.tokens
    share = shapes.float8_share
    slowness = share / rates.float8 + (1 - share) / rates.product
    attended = _attention_operations(config, shapes)
    attention = attended * (1 + (0.0 if mode.name == "selective" else repeated)) / rates.attention
    attention += 2.5 * attended / (rates.attention * assumptions.attention_backward_efficiency)
    passes = 3 + repeated  # backward reads and writes about twice what forward does
    moved = _elementwise_bytes(config, shapes, system) * passes + _cast_bytes(config, shapes) * (2.5 + repeated)
    tensor = _tensor_seconds(config, shapes, rates, assumptions, system, mode)
    context = _context_seconds(config, shapes, rates, assumptions, repeated, attention)
    return {
        "forward": forward * slowness + attended / rates.attention,
        "products": forward * (3 + twice) * slowness,
        "attention": attention,
        "elementwise": moved / rates.memory,
        "tensor_parallel": tensor,
        "context_parallel": context,
    }


def _attention_operations(config: TitanConfig, shapes: Shapes) -> float:
    """Forward, of what a causal mask leaves; the rank with the most of it."""
    settings = config.parallelism
    operations = 2.0 * shapes.tokens * config.training.seq_len * config.model.dim / settings.tp
    if settings.cp > 1 and not settings.cp_head_tail and settings.cp_method is not ContextMethod.all_to_all:
        operations *= 2 - 1 / settings.cp
    return operations


def _elementwise_bytes(config: TitanConfig, shapes: Shapes, system: System) -> float:
    """Read and written by what is no product, in a forward pass.

    Compiled: a norm with the residual before it reads two tensors and writes two, rotary positions read and write once,
    silu and product are one. Not compiled: every operation by itself.
    """
    tp, dim = config.parallelism.tp, config.model.dim
    residual, turned, ffn = dim * shapes.between, (dim + shapes.kv_dim) / tp, config.model.ffn_dim / tp
    if config.compile.enable:
        units = 2 * 4 * residual + 2 * turned + 3 * ffn
    else:
        units = (2 * system.norm_passes + 2 * 3) * residual + system.rope_passes * turned + 5 * ffn
    return units * shapes.bytes * shapes.tokens


def _cast_bytes(config: TitanConfig, shapes: Shapes) -> float:
    """Read and written by casts to float8, in a forward pass.

    Read twice, for the largest number and then all, and written in two orders.
    """
    if not shapes.float8_share:
        return 0.0
    tp, dim = config.parallelism.tp, config.model.dim
    numbers = 2 * dim + (dim + config.model.ffn_dim) / tp
    weights = 0 if config.float8.fsdp_all_gather else shapes.block_numbers
    return (numbers * shapes.tokens + weights) * (2 * shapes.bytes + 2) * shapes.float8_share


def _output_work(shapes: Shapes, rates: _Rates, system: System) -> tuple[float, float]:
    """Return the seconds of the projection to words, and of the loss of what it gives."""
    config = shapes.config
    is_cut = config.parallelism.tp > 1 and config.parallelism.loss_parallel
    words = shapes.words if is_cut else config.model.vocab_size
    operations = 6.0 * shapes.tokens * config.model.dim * shapes.words
    # written, cast, its softmax read twice and written, two gradients, cast back
    moved = shapes.tokens * words * (24.0 if compiles_loss(config.compile) else 40.0)
    return operations / (rates.float8 if has_float8_output(config.float8) else rates.product), moved / rates.memory


def _tensor_seconds(
    config: TitanConfig,
    shapes: Shapes,
    rates: _Rates,
    assumptions: Assumptions,
    system: System,
    mode: ActivationCheckpointMode,
) -> float:
    tp = config.parallelism.tp
    if tp == 1:
        return 0.0
    whole = shapes.tokens * config.model.dim * shapes.bytes * (tp - 1) / tp
    gathered = whole / shapes.bytes if system.gathers_float8 and shapes.float8_share else whole
    gathers, sums = _tensor_exchanges(mode)
    seconds = (gathers * gathered + sums * whole) / rates.links["tp"]
    hidden = assumptions.async_tp_hidden if config.parallelism.async_tp else 0.0
    return seconds * (1 - hidden) + (gathers + sums) * assumptions.latency_seconds


def _tensor_exchanges(mode: ActivationCheckpointMode) -> tuple[int, int]:
    """Return a block's gathers of activations, and the other exchanges: two and two in each pass.

    What is computed again gathers again; the last sum of a block nobody asks for, and selective keeps the other.
    """
    again = {"none": (0, 0), "memory_budget": (2, 0), "selective": (2, 0)}.get(mode.name, (2, 1))
    return 2 + again[0], 2 + 4 + again[1]


def _context_bytes(config: TitanConfig, shapes: Shapes, repeated: float) -> float:
    """Bytes that a rank receives in a block, for a microbatch."""
    settings = config.parallelism
    if settings.cp == 1:
        return 0.0
    tp, dim = settings.tp, config.model.dim
    if settings.cp_method is ContextMethod.all_to_all:
        numbers = 2 * (dim + shapes.kv_dim) / tp * (settings.cp - 1) / settings.cp
        return numbers * shapes.tokens * shapes.bytes * (2 + repeated)
    per_pass = 2 * shapes.kv_dim / tp * shapes.tokens * (settings.cp - 1)
    if settings.cp_method is ContextMethod.ring:
        repeats = config.model.n_heads // config.model.n_kv_heads
        return per_pass * repeats * (shapes.bytes * (2 + repeated) + 4)  # gradients travel too, in float32
    return per_pass * shapes.bytes * (2 + repeated)


def _context_seconds(
    config: TitanConfig,
    shapes: Shapes,
    rates: _Rates,
    assumptions: Assumptions,
    repeated: float,
    attention: float,
) -> float:
    moved = _context_bytes(config, shapes, repeated)
    if not moved:
        return 0.0
    seconds = moved / rates.links["cp"]
    if config.parallelism.cp_method is ContextMethod.ring:  # travels while attention is computed
        seconds = max(0.0, seconds - assumptions.overlap * attention)
    return seconds + 4 * config.parallelism.cp * assumptions.latency_seconds


def _fsdp(
    config: TitanConfig,
    shapes: Shapes,
    stages: tuple[Stage, ...],
    rates: _Rates,
    assumptions: Assumptions,
    own: _Work,
    count: int,
) -> tuple[float, dict[str, float]]:
    """Return the seconds that a step waits for FSDP, and the bytes a rank receives for it."""
    settings, dim = config.parallelism, config.model.dim
    ranks, replicas = shapes.fsdp, settings.dp_replicate
    blocks = sum(len(stage.blocks) for stage in stages)
    ends = sum(stage.has_embedding + stage.has_output for stage in stages) * shapes.words * dim
    part = (ranks - 1) / ranks
    gathered = (blocks * shapes.block_numbers * shapes.gathered_bytes + ends * shapes.bytes) * part
    whole = (blocks * shapes.block_numbers + ends) * shapes.reduce_bytes
    reduced, replicated = whole * part, 2 * whole / ranks * (replicas - 1) / replicas
    gather = gathered / rates.links["fsdp"]
    reduce = reduced / rates.links["fsdp"] + replicated / rates.links["dp_replicate"]
    forward, backward = (seconds * assumptions.overlap for seconds in (own.forward, own.total - own.forward))
    is_freed = is_gathered_twice(config)
    forwards, backwards = (count, count) if is_freed else (1, 0)
    seconds = forwards * max(0.0, gather - forward) + max(0, backwards - 1) * max(0.0, gather - backward)
    # the last backward pass has the gradients to sum beside
    seconds += max(0.0, gather * is_freed + reduce - backward)
    # nothing hides the first block's weights, nor the last one's gradients
    groups = blocks + 2
    if ranks * replicas > 1:
        seconds += (gather + reduce) / groups + 2 * assumptions.latency_seconds
    if settings.cpu_offload:  # weights come from the CPU's memory, and gradients go there
        seconds += 4.0 * shapes.shard_numbers(stages) * (forwards + backwards + 1) / rates.host
    traffic = {"fsdp": gathered * (forwards + backwards) + reduced, "dp_replicate": replicated}
    return seconds, traffic


def _activation_traffic(
    config: TitanConfig, shapes: Shapes, stages: tuple[Stage, ...], count: int, system: System
) -> dict[str, float]:
    """Return the bytes that a rank receives for activations and their gradients in a step."""
    settings, mode = config.parallelism, config.activation_checkpoint.mode
    blocks = sum(len(stage.blocks) for stage in stages)
    whole = shapes.tokens * config.model.dim * shapes.bytes
    gathers, sums = _tensor_exchanges(mode)
    gathered = 1 / shapes.bytes if system.gathers_float8 and shapes.float8_share else 1.0
    tensor = blocks * (gathers * gathered + sums) * whole * (settings.tp - 1) / settings.tp
    repeated = 0.0 if mode is ActivationCheckpointMode.none else 1.0
    edges = sum((not stage.has_embedding) + (not stage.has_output) for stage in stages)
    return {
        "tp": count * tensor,
        "cp": count * blocks * _context_bytes(config, shapes, repeated),
        "pp": count * edges * whole * shapes.between if settings.pp > 1 else 0.0,
    }
