"""One rank of a cluster that is not here: `cluster=simulated cluster.nodes=64 cluster.simulated_rank=17`.

The rank is built as a real one is, on the real mesh, but under a process group that pretends: its collectives return
at once and bring nothing. So what depends on the layout alone is exact (which stage, which shards, how many bytes), and
what a rank computes by itself can be timed; what others would have sent is missing, so losses mean nothing here, and
waiting and traffic are not in the times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan.config.degrees import accumulation_steps, describe_degrees, pipeline_microbatches, world_size
from titan.config.schema import TitanConfig
from titan.data.loader import Batch
from titan.metrics.memory import peak_memory_gib, reset_peak_memory
from titan.models.decoder import Decoder
from titan.models.family import ModelFamily, load_family
from titan.optim.build import build_optimizer, state_dtype_of
from titan.parallel.apply import DTYPES, allocate
from titan.parallel.mesh import build_mesh, leave_process_group
from titan.trainer.build import update_compiler
from titan.trainer.device import device_name
from titan.trainer.model import (
    BuiltModel,
    PipelineForwardBackward,
    build_model,
    describe_modules,
    stage_shapes,
)


@dataclass(frozen=True)
class Simulated:
    """What one rank has, and what it took."""

    rank: int
    coordinates: dict[str, int]
    """Its index on every axis."""
    ranks: int
    whole_parameters: int
    """Of the model on all ranks."""
    parameters: int
    """Of this rank's shards."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    largest_gathered_bytes: int
    """The largest group of weights that FSDP gathers at once, in the compute dtype."""
    modules: list[str]
    """What this rank has of the model, each stage's parts together."""
    applied: list[str]
    build_seconds: float
    step_seconds: list[float]
    """Of every executed step, without the first."""
    peak_memory_gib: float | None
    """While executing; microbatches that a pipeline has in flight are not in it."""


def simulate(config: TitanConfig) -> Simulated:
    """Build the rank that the config names, execute its steps if asked, and return what was found.

    Args:
        config: Resolved, of cluster=simulated.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cluster = config.cluster
    executes = cluster.simulated_steps > 0
    has_gpu = executes and torch.cuda.is_available()
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    if not executes:  # nothing is computed, so nothing has to have the hardware
        config = replace(config, float8=replace(config.float8, emulate=True))
    began = time.perf_counter()
    dist.init_process_group("fake", store=FakeStore(), rank=cluster.simulated_rank, world_size=world_size(cluster))
    try:
        mesh = build_mesh(config.parallelism, device.type)
        family = load_family(config.model.family)
        model = build_model(config, family, mesh, device, _fill if executes else _leave_on_meta)
        build_seconds = time.perf_counter() - began
        parameters = [parameter for _, parameter in model.parameters]
        local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        weights = sum(p.numel() * p.element_size() for p in local)
        peak, steps = None, []
        if executes:
            reset_peak_memory(device)
            steps = _execute(config, model, device)
            peak = peak_memory_gib(device)
        return Simulated(
            rank=cluster.simulated_rank,
            coordinates=mesh.coordinates,
            ranks=world_size(cluster),
            whole_parameters=family.count_parameters(config.model),
            parameters=sum(p.numel() for p in local),
            weights_bytes=weights,
            gradients_bytes=weights,
            optimizer_bytes=_moments_bytes(config, local),
            largest_gathered_bytes=max(map(_gathered_numbers, model.parts))
            * DTYPES[config.training.param_dtype].itemsize,
            modules=[describe_modules(_modules(part)) for part in model.parts],
            applied=model.applied,
            build_seconds=build_seconds,
            step_seconds=steps,
            peak_memory_gib=peak,
        )
    finally:
        leave_process_group()


def describe(config: TitanConfig, found: Simulated) -> Iterator[str]:
    """Return what was found as lines."""
    cluster = config.cluster
    assert cluster.devices_per_node is not None, "resolved"
    training = config.training
    where = ", ".join(f"{axis} {index}" for axis, index in found.coordinates.items())
    yield f"simulated  rank {found.rank} of {found.ranks}, node {found.rank // cluster.devices_per_node}: {where}"
    yield f"mesh       {describe_degrees(config.parallelism)}, {cluster.nodes} x {cluster.devices_per_node} devices"
    yield (
        f"model      {config.model.name}, {found.whole_parameters:,} parameters, {found.parameters:,} of them here "
        f"({found.parameters / found.whole_parameters:.3%})"
    )
    for modules in found.modules:
        yield f"stage      {modules}"
    yield (
        f"memory     weights {_size(found.weights_bytes)}, gradients {_size(found.gradients_bytes)}, "
        f"optimizer {_size(found.optimizer_bytes)}; largest gathered group "
        f"{_size(found.largest_gathered_bytes)} ({training.param_dtype.name}); activations are not in it"
    )
    yield (
        f"batch      {training.global_batch_size} rows x {training.seq_len} tokens a step, "
        f"{accumulation_steps(config)} micro-batches of {training.local_batch_size} rows on each data rank"
    )
    for line in found.applied:
        yield f"applied    {line}"
    yield f"built in   {found.build_seconds:.1f} s"
    if found.step_seconds:
        yield (
            f"executed   {len(found.step_seconds)} steps after a warm-up: median "
            f"{statistics.median(found.step_seconds):.3f} s of this rank's own work on "
            f"{device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}, "
            f"peak {found.peak_memory_gib:.2f} GiB; without waiting for others or their data"
        )
    else:
        yield "executed   nothing; cluster.simulated_steps=3 times this rank's own work on this machine"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _moments_bytes(config: TitanConfig, local: list[Tensor]) -> int:
    """Return the bytes of AdamW's two moments."""
    dtype = state_dtype_of(config.optimizer)
    return 2 * sum(p.numel() * (p.element_size() if dtype is None else dtype.itemsize) for p in local)


def _leave_on_meta(
    part: Decoder, family: ModelFamily, seed: int, device: torch.device, shard_device: torch.device
) -> None:
    part.tie_weights()


def _fill(part: Decoder, family: ModelFamily, seed: int, device: torch.device, shard_device: torch.device) -> None:
    allocate(part, device, shard_device)
    with torch.no_grad():
        for parameter in part.parameters():  # any values will do, and drawing the right ones takes longer
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.normal_(std=0.02)


def _execute(config: TitanConfig, model: BuiltModel, device: torch.device) -> list[float]:
    """Return the seconds of each step: forward, backward and optimizer."""
    optimizer = build_optimizer(model.parameters, config.optimizer, device, update_compiler(config))
    run = _stage_runner(config, model, device) if config.parallelism.pp > 1 else _whole_runner(config, model, device)
    seconds = []
    for _ in range(config.cluster.simulated_steps + 1):
        began = time.perf_counter()
        run()
        optimizer.step()
        model.weights_changed()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _rows(config: TitanConfig, rows: int, device: torch.device) -> Batch:
    shape = (rows, config.training.seq_len // config.parallelism.cp)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)
    return Batch(tokens, tokens, torch.zeros_like(tokens) if config.data.mask_documents else None)


def _valid_tokens(config: TitanConfig, device: torch.device) -> Tensor:
    return torch.tensor(float(config.training.global_batch_size * config.training.seq_len), device=device)


def _whole_runner(config: TitanConfig, model: BuiltModel, device: torch.device) -> Callable[[], object]:
    batches = [_rows(config, config.training.local_batch_size, device)] * accumulation_steps(config)
    valid = _valid_tokens(config, device)
    return lambda: model.forward_backward(batches, valid)


def _stage_runner(config: TitanConfig, model: BuiltModel, device: torch.device) -> Callable[[], object]:
    """Return what runs this rank's stages on every microbatch, one after the other.

    Not through the schedule, which asks the neighbours for the shapes of what they will send.
    """
    seam = model.forward_backward
    assert isinstance(seam, PipelineForwardBackward), "pp > 1"
    seam.valid_tokens = _valid_tokens(config, device)
    pieces = pipeline_microbatches(config)
    batch = _rows(config, config.training.local_batch_size // pieces, device)
    _, meta = stage_shapes(config, pieces)
    hidden = torch.randn(meta.shape, dtype=meta.dtype, device=device)

    def run() -> None:
        for _ in range(pieces * accumulation_steps(config)):
            for part in model.parts:
                inputs = batch.tokens if part.tok_embeddings is not None else hidden.clone().requires_grad_()
                out = part(inputs, batch.starts)
                if part.output is None:
                    out.backward(hidden)
                else:
                    seam.loss(out, batch.labels).backward()

    return run


def _gathered_numbers(part: Decoder) -> int:
    """Return the numbers of the largest group that `apply_fsdp` gathers as one: a block, or the two ends."""

    def size(parameters: Iterator[torch.nn.Parameter]) -> int:
        total = 0
        for parameter in parameters:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            names = (mesh.mesh_dim_names if mesh is not None else None) or ()
            is_cut = "tp" in names and hasattr(parameter.placements[names.index("tp")], "dim")  # type: ignore[attr-defined]
            total += parameter.numel() // (mesh["tp"].size() if mesh is not None and is_cut else 1)
        return total

    groups = [size(block.parameters()) for block in part.layers.values()]
    groups.append(sum(size(module.parameters()) for module in (part.norm, part.output) if module is not None))
    if part.tok_embeddings is not None:
        groups.append(size(part.tok_embeddings.parameters()))
    return max(groups)


def _modules(part: Decoder) -> list[str]:
    ends = [name for name in ("norm", "output") if getattr(part, name) is not None]
    return [*["tok_embeddings"] * (part.tok_embeddings is not None), *(f"layers.{name}" for name in part.layers), *ends]
