"""From what the user wrote to numbers: devices, world size, degrees of the axes, rows of a step.

Everything that may be left open in the config (`-1`, `null`, `auto`) is filled in here, once, before the config is
frozen, so that no rank has to decide anything for itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from titan.config.schedule_file import read_schedule
from titan.config.schema import (
    Attention,
    ClusterConfig,
    ClusterKind,
    CompileConfig,
    ContextMethod,
    DataConfig,
    Device,
    Dtype,
    Float8Config,
    Float8Recipe,
    ParallelismConfig,
    ReshardAfterForward,
    SourceConfig,
    TitanConfig,
    TokenizerConfig,
)
from titan.config.vocabulary import compute_fingerprint
from titan.errors import ConfigError, Problem

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The mesh's axes, outermost first."""
DATA_AXES = ("dp_replicate", "dp_shard")
"""The axes along which ranks see different rows."""
CPU_HEAD_MULTIPLE = 4
"""Heads of titan's own attention for CPUs have a multiple of so many numbers."""
_CPU_TILE = 16
_LARGEST_CPU_HEAD_WITHOUT_TILES = 64
"""In bfloat16, of heads that are no multiple of a tile; PyTorch's attention is the faster one for larger ones."""


@dataclass(frozen=True)
class Machine:
    """What there is to run on, as found by `titan.launch.environment`."""

    gpus: int = 0
    """GPUs that this machine shows to this process."""
    has_bfloat16: bool = False
    """Whether its CPU multiplies matrices in bfloat16 by itself."""
    started_ranks: int | None = None
    """World size, where an outer launcher has already started the ranks."""
    started_ranks_per_node: int | None = None
    """Ranks that the outer launcher started on this machine."""
    slurm_gpus: Callable[[str | None], int | None] = lambda partition: None
    """Returns the GPUs of each node in a partition of the SLURM cluster, or None where that cannot be told."""
    cache_dir: str = "~/.cache/titan"
    """Where this user keeps what can be made again."""


def data_degree(parallelism: ParallelismConfig) -> int:
    """Return how many ranks see different rows."""
    return parallelism.dp_replicate * parallelism.dp_shard


def world_size(cluster: ClusterConfig) -> int:
    """Return the number of ranks; the cluster must be resolved."""
    assert cluster.nodes is not None, "resolve the cluster first"
    assert cluster.devices_per_node is not None, "resolve the cluster first"
    return cluster.nodes * cluster.devices_per_node


def accumulation_steps(config: TitanConfig) -> int:
    """Return the micro-batches that one data rank runs in a step; the config must be resolved."""
    rows = config.training.local_batch_size * data_degree(config.parallelism)
    return config.training.global_batch_size // rows


def stages_of_ranks(parallelism: ParallelismConfig) -> list[list[int]]:
    """Return the stages that each pipeline rank has, ascending.

    One each; or as many as the config says, in turns; or, in the V schedules, one from the head and one from the
    tail; or as a schedule's file says.

    Raises:
        ConfigError: If the file cannot be used.
    """
    ranks, schedule = parallelism.pp, parallelism.pp_schedule.name
    if parallelism.pp_schedule_csv is not None:
        return read_schedule(parallelism.pp_schedule_csv).stages
    if schedule in ("ZBVZeroBubble", "DualPipeV"):
        return [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)]
    rounds = 1 if schedule in ("GPipe", "1F1B") else parallelism.pp_stages_per_rank
    return [list(range(rank, ranks * rounds, ranks)) for rank in range(ranks)]


def pipeline_microbatches(config: TitanConfig) -> int:
    """Return into how many pieces a pipeline cuts a micro-batch of the data."""
    pieces = config.parallelism.pp_microbatches
    return config.training.local_batch_size if pieces == -1 else pieces


def choose_loss_chunk(words: int, device_type: str, is_compiled: bool = False) -> int:
    """Return the positions whose logits are there at a time, where the config leaves them open.

    256 MiB of logits in float32 on a CPU, 1 GiB in bfloat16 on CUDA: every chunk adds to a gradient as large as the
    output's weights, and on CUDA small chunks spend more time on that than on their products. Four times as many on
    CUDA where the loss is compiled: its logits become their own gradient, where otherwise there are copies of them in
    float32, and where one chunk is enough, no gradient of the weights is added up in float32.
    """
    if device_type != "cuda":
        return max(256, (1 << 26) // words)
    return max(256, (1 << 31 if is_compiled else 1 << 29) // words)


def compiles_loss(settings: CompileConfig) -> bool:
    """Return whether what is done with a chunk's logits is compiled."""
    return settings.enable and settings.loss


def compiles_for_cpu(config: TitanConfig) -> bool:
    """Return whether blocks are compiled to code for a CPU, for which there has to be a C++ compiler."""
    settings = config.compile
    return settings.enable and settings.backend == "inductor" and config.cluster.device is Device.cpu


def has_ring(parallelism: ParallelismConfig) -> bool:
    """Return whether keys and values travel from rank to rank while attention is computed."""
    return parallelism.cp > 1 and parallelism.cp_method is ContextMethod.ring


def choose_attention(config: TitanConfig) -> Attention:
    """Return what is to compute attention; `default` leaves it to PyTorch, or to what the device turns out to be.

    What is compiled for a CPU takes titan's own kernel, which needs a compiler; PyTorch's is what it is compared with.
    """
    head_size = config.model.dim // config.model.n_heads
    takes_own = (
        config.training.attention is Attention.default
        and compiles_for_cpu(config)
        and head_size % CPU_HEAD_MULTIPLE == 0
        and (
            config.training.param_dtype is Dtype.float32
            or head_size % _CPU_TILE == 0
            or head_size <= _LARGEST_CPU_HEAD_WITHOUT_TILES
        )
        and not has_ring(config.parallelism)
    )
    return Attention.cpu if takes_own else config.training.attention


def has_float8_output(settings: Float8Config) -> bool:
    """Return whether the projection to words is asked for in float8."""
    return settings.convert_output and settings.recipe is not Float8Recipe.none


def has_fsdp(parallelism: ParallelismConfig) -> bool:
    """Return whether FSDP is applied: unless one rank does everything, with its weights where it computes."""
    return parallelism.cpu_offload or any(getattr(parallelism, axis) > 1 for axis in AXES)


def frees_blocks(setting: ReshardAfterForward, has_pipeline: bool, ranks: int) -> bool:
    """Return whether FSDP frees a block's weights between forward and backward.

    Args:
        setting: The config's.
        has_pipeline: Whether forward runs once a microbatch.
        ranks: How many share out the weights.
    """
    if setting is ReshardAfterForward.default:
        return not has_pipeline and ranks > 1
    return setting is ReshardAfterForward.always


def model_modules(n_layers: int) -> list[str]:
    """Return the modules that a pipeline shares out, in the order in which a token passes them."""
    return ["tok_embeddings", *(f"layers.{index}" for index in range(n_layers)), "norm", "output"]


def plan_stages(n_layers: int, stages: int, less_first: int = 1, less_last: int = 1) -> list[list[str]]:
    """Share the modules out so that the stages cost as nearly the same as can be.

    Args:
        n_layers: Blocks of the model.
        stages: How many to share them among.
        less_first: Blocks that the embedding counts for.
        less_last: Blocks that the last norm and the output count for.

    Returns:
        The modules of every stage.

    Raises:
        ValueError: If a stage would have no block.
    """
    weight = n_layers + less_first + less_last
    sizes = [weight // stages + (index < weight % stages) for index in range(stages)]
    sizes[0] -= less_first
    sizes[-1] -= less_last
    if min(sizes) < 1:
        raise ValueError(f"{n_layers} blocks do not fill {stages} stages")
    sizes[0] += 1
    sizes[-1] += 2
    modules = iter(model_modules(n_layers))
    return [[next(modules) for _ in range(size)] for size in sizes]


def describe_degrees(parallelism: ParallelismConfig) -> str:
    """Return the degrees as text: pp 1 x dp_replicate 1 x ..."""
    return " x ".join(f"{axis} {getattr(parallelism, axis)}" for axis in AXES)


def resolve_config(config: TitanConfig, machine: Machine) -> tuple[TitanConfig, list[Problem]]:
    """Fill in what was left open.

    Returns:
        A new config with every open value filled in, as far as that is possible, and the problems met on the way.
    """
    cluster, problems = resolve_cluster(config.cluster, machine)
    parallelism = config.parallelism
    if not problems:
        parallelism, problems = resolve_degrees(config.parallelism, cluster)
    training = config.training
    if training.param_dtype is Dtype.auto:
        is_fast = cluster.device is Device.cuda or machine.has_bfloat16
        dtype = Dtype.bfloat16 if is_fast else Dtype.float32
        training = replace(training, param_dtype=dtype)
    if training.reduce_dtype is Dtype.auto:
        training = replace(training, reduce_dtype=Dtype.float32)
    if training.global_batch_size == -1 and not problems:
        rows = training.local_batch_size * data_degree(parallelism)
        training = replace(training, global_batch_size=rows)
    checkpoint = replace(config.checkpoint, initial_load=_absolute(config.checkpoint.initial_load))
    if checkpoint.last_dtype is Dtype.auto:
        checkpoint = replace(checkpoint, last_dtype=Dtype.float32)
    optimizer = config.optimizer
    if optimizer.state_dtype is Dtype.auto:
        optimizer = replace(optimizer, state_dtype=Dtype.float32)
    cache = config.data.cache_dir or machine.cache_dir
    validation = config.validation
    if validation.data is not None:
        validation = replace(validation, data=replace(validation.data, **_absolute_paths(validation.data)))
    return replace(
        config,
        run=replace(config.run, dir=_absolute(config.run.dir)),
        cluster=cluster,
        parallelism=replace(parallelism, pp_schedule_csv=_absolute(parallelism.pp_schedule_csv)),
        training=training,
        float8=resolve_float8(config.float8, parallelism),
        data=resolve_data(config.data, cache),
        tokenizer=resolve_tokenizer(config.tokenizer),
        validation=validation,
        optimizer=optimizer,
        checkpoint=checkpoint,
    ), problems


def resolve_float8(float8: Float8Config, parallelism: ParallelismConfig) -> Float8Config:
    """Say whether weights are gathered in float8: where one scale a tensor allows it, and there are others' shards."""
    gathers = float8.fsdp_all_gather
    if gathers is None:
        has_shards = parallelism.dp_shard * parallelism.cp > 1 and not parallelism.cpu_offload
        gathers = float8.recipe is Float8Recipe.tensorwise and has_shards
    precomputes = gathers if float8.precompute_scales is None else float8.precompute_scales
    return replace(float8, fsdp_all_gather=gathers, precompute_scales=precomputes)


def resolve_tokenizer(tokenizer: TokenizerConfig) -> TokenizerConfig:
    """Say which tokenizer it is, where it can be read; what is wrong with it is for the rules to say."""
    tokenizer = replace(tokenizer, path=_absolute(tokenizer.path))
    if tokenizer.fingerprint is None:
        with contextlib.suppress(ConfigError):
            tokenizer = replace(tokenizer, fingerprint=compute_fingerprint(tokenizer))
    return tokenizer


def resolve_data(data: DataConfig, cache_dir: str) -> DataConfig:
    """Make every path absolute, those of a mixture's components too, so that a rank may be started anywhere."""
    components = {name: replace(part, **_absolute_paths(part)) for name, part in data.components.items()}
    return replace(data, **_absolute_paths(data), components=components, cache_dir=_absolute(cache_dir))


def _absolute_paths(source: SourceConfig) -> dict[str, str | None]:
    is_folder = source.dataset is not None and Path(source.dataset).expanduser().is_dir()
    return {
        "path": _absolute(source.path),
        "dataset": _absolute(source.dataset) if is_folder else source.dataset,
    }


def resolve_cluster(cluster: ClusterConfig, machine: Machine) -> tuple[ClusterConfig, list[Problem]]:
    """Settle the device, the number of machines and the ranks of each."""
    problems = []
    is_real = cluster.kind is not ClusterKind.simulated
    is_started = is_real and machine.started_ranks is not None
    # Submitted ranks run on other machines. What is only built is built as for the GPUs of the cluster it stands for.
    is_elsewhere = cluster.kind is ClusterKind.slurm and not is_started
    is_elsewhere |= not is_real and not cluster.simulated_steps
    device = cluster.device
    if device is Device.auto:
        device = Device.cuda if machine.gpus or is_elsewhere else Device.cpu
    if device is Device.cuda and not machine.gpus and not is_elsewhere:
        problems.append(
            Problem("cluster.device = cuda, but this machine shows no GPU", suggestion="cluster.device=cpu")
        )
    nodes, per_node = cluster.nodes, cluster.devices_per_node
    if is_real and machine.started_ranks is not None and machine.started_ranks_per_node is not None:
        found_nodes, uneven = divmod(machine.started_ranks, machine.started_ranks_per_node)
        if uneven:
            problems.append(
                Problem(
                    f"the outer launcher started {machine.started_ranks} ranks, "
                    f"{machine.started_ranks_per_node} of them on this machine",
                    "Every machine has to have the same number of ranks.",
                    "the same --nproc-per-node on every machine",
                )
            )
        for key, wanted, found in (
            ("nodes", nodes, found_nodes),
            ("devices_per_node", per_node, machine.started_ranks_per_node),
        ):
            if wanted is not None and wanted != found:
                problems.append(
                    Problem(
                        f"cluster.{key} = {wanted}, but the outer launcher started {found}",
                        f"There are {machine.started_ranks} ranks, {machine.started_ranks_per_node} on this machine.",
                        f"cluster.{key}={found}   (or leave it out)",
                    )
                )
        nodes, per_node = found_nodes, machine.started_ranks_per_node
    else:
        nodes = 1 if nodes is None else nodes
        if nodes != 1 and cluster.kind is ClusterKind.local:
            problems.append(
                Problem(
                    f"cluster.nodes = {nodes}, but cluster=local is this machine alone",
                    "For several machines, submit to SLURM, or start torchrun on each with this command behind it.",
                    f"cluster=slurm   or  cluster.nodes=1 cluster.devices_per_node={max(nodes, 1) * (per_node or 1)}",
                )
            )
        if per_node is None:
            per_node, unknown = _devices_of_node(cluster, device, machine)
            problems += unknown
    if per_node < 1 or nodes < 1:
        key, value = ("devices_per_node", per_node) if per_node < 1 else ("nodes", nodes)
        problems.append(Problem(f"cluster.{key} = {value} is not positive", suggestion=f"cluster.{key}=1"))
    elif cluster.kind is ClusterKind.local and device is Device.cuda and 0 < machine.gpus < per_node:
        problems.append(
            Problem(
                f"cluster.devices_per_node = {per_node}, but this machine has {machine.gpus} GPUs",
                suggestion=f"cluster.devices_per_node={machine.gpus}",
            )
        )
    return replace(cluster, device=device, nodes=nodes, devices_per_node=per_node), problems


def _devices_of_node(cluster: ClusterConfig, device: Device, machine: Machine) -> tuple[int, list[Problem]]:
    """Return how many ranks fill a node, where the user has not said it."""
    if device is Device.cpu:
        return 1, []
    if cluster.kind is not ClusterKind.slurm:
        return max(machine.gpus, 1), []
    found = machine.slurm_gpus(cluster.partition)
    if found:
        return found, []
    where = f"partition {cluster.partition}" if cluster.partition else "the default partition"
    problem = Problem(
        "cluster.devices_per_node is not set",
        f"SLURM does not say how many GPUs every node of {where} has (sinfo -o %G).",
        "cluster.devices_per_node=8   or  cluster.device=cpu",
    )
    return 1, [problem]


def resolve_degrees(parallelism: ParallelismConfig, cluster: ClusterConfig) -> tuple[ParallelismConfig, list[Problem]]:
    """Fill in the degree that is -1 and hold the product against the world size."""
    degrees = {axis: getattr(parallelism, axis) for axis in AXES}
    open_axes = [axis for axis, degree in degrees.items() if degree == -1]
    problems = []
    for axis, degree in degrees.items():
        if degree == -1 and axis not in DATA_AXES:
            problems.append(
                Problem(
                    f"parallelism.{axis} = -1 is not allowed",
                    "Only dp_replicate and dp_shard can take what is left.",
                    f"parallelism.{axis}=1",
                )
            )
        elif degree < 1 and degree != -1:
            problems.append(
                Problem(f"parallelism.{axis} = {degree} is not positive", suggestion=f"parallelism.{axis}=1")
            )
    if len(open_axes) > 1 and not problems:
        names = " and ".join(f"parallelism.{axis}" for axis in open_axes)
        problems.append(
            Problem(
                f"{names} are both -1",
                "Only one axis can take what is left.",
                f"parallelism.{open_axes[0]}=1",
            )
        )
    if problems:
        return parallelism, problems

    ranks = world_size(cluster)
    given = math.prod(degree for degree in degrees.values() if degree != -1)
    where = f"{_counted(cluster.nodes, 'node')} x {cluster.devices_per_node} = {_counted(ranks, 'rank')}"
    if open_axes and ranks % given == 0:
        return replace(parallelism, **{open_axes[0]: ranks // given}), []
    if open_axes:
        factors = [f"{axis} {degree}" for axis, degree in degrees.items() if degree not in (-1, 1)]
        product = " x ".join(factors) + (f" = {given}" if len(factors) > 1 else "")
        problem = Problem(
            f"{product} does not divide the world size: {where}",
            f"parallelism.{open_axes[0]} = -1 takes what is left, which has to be a whole number.",
            f"cluster.devices_per_node={given * max(1, ranks // given)}",
        )
        return parallelism, [problem]
    if given != ranks:
        hint = f"cluster.devices_per_node={given}" if cluster.nodes == 1 else "parallelism.dp_shard=-1"
        without_shard = given // degrees["dp_shard"]
        if ranks % without_shard == 0:
            hint += "   or  parallelism.dp_shard=-1   (takes what is left)" if cluster.nodes == 1 else ""
        problem = Problem(
            f"{describe_degrees(parallelism)} = {given} ranks, but the cluster has {where}",
            f"cluster={cluster.kind.name} gives one rank to every device.",
            hint,
        )
        return parallelism, [problem]
    return parallelism, []


def _counted(number: int | None, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _absolute(path: str | None) -> str:
    # typed as str, for the fields that must be set; None and "" pass through as what they are: not set
    return str(Path(path).expanduser().absolute()) if path else path  # type: ignore[return-value]
