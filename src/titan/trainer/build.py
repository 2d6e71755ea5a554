"""From a frozen config to everything that the loop needs, in the one order that works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan.checkpoint.state import NamedParameters
from titan.checkpoint.store import CheckpointStore
from titan.config.degrees import accumulation_steps, describe_degrees, world_size
from titan.config.schema import CheckpointMode, Dtype, SourceConfig, TitanConfig
from titan.data.feed import Feed, PreparedFeed, StreamedText, build_stream_feed, open_streams
from titan.data.held_out import HeldOutRows
from titan.data.loader import Share
from titan.data.mixture import load_rows
from titan.data.prepare import Preparation, Progress, describe_progress
from titan.data.rows import Rows
from titan.data.tokenizer import build_tokenizer
from titan.errors import ConfigError
from titan.log import logger
from titan.models.decoder import Decoder
from titan.models.family import ModelFamily, load_family
from titan.models.flops import peak_tflops
from titan.optim.build import build_optimizer
from titan.optim.guard import is_skipped_on_device
from titan.parallel.context import positions_of_rank
from titan.parallel.mesh import Mesh, build_mesh
from titan.run_directory import RunDirectory
from titan.trainer.device import device_name, seed_generators
from titan.trainer.model import build_model
from titan.trainer.state import TrainState
from titan.trainer.step import Evaluate, ForwardBackward

_NO_LIMIT_SECONDS = 10 * 365 * 24 * 3600


@dataclass
class Trainer:
    """Everything that the loop needs, built."""

    config: TitanConfig
    directory: RunDirectory
    device: torch.device
    mesh: Mesh
    family: ModelFamily
    parts: list[Decoder]
    """The model, or this rank's stages of it."""
    parameters: NamedParameters
    """By their names in the bare model."""
    copies: list[nn.Parameter]
    """Those of the parameters whose original is on another pipeline stage."""
    optimizer: torch.optim.Optimizer
    forward_backward: ForwardBackward
    evaluate: Evaluate
    data: Feed
    positions: Tensor | None
    """Which positions of every row this rank has; None for all."""
    store: CheckpointStore | None
    state: TrainState = field(default_factory=TrainState)
    resumed_step: int | None = None
    """The step of the run's own checkpoint that it goes on from, if there is one."""
    run_identity: str = ""
    """What the run's checkpoints carry."""
    held_out: HeldOutRows | None = None
    """What is validated on, if anything is."""
    defers: bool = False
    """Whether what a step gave is looked at when it is there, and waited for only where it is needed at once."""
    weights_changed: Callable[[], None] = lambda: None
    """To be called whenever the weights have changed."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.config.training.global_batch_size * self.config.training.seq_len


def build_trainer(
    config: TitanConfig, device: torch.device, data: Rows | StreamedText, held_out: Rows | None = None
) -> Trainer:
    """Return a trainer with initial weights; the default process group must be there.

    Args:
        config: Resolved.
        device: This rank's.
        data: What to train on.
        held_out: What to validate on; None never validates, whatever the config says.

    Raises:
        ConfigError: If the ranks are not as many as the config says.
    """
    if dist.get_world_size() != world_size(config.cluster):
        raise ConfigError(f"the config wants {world_size(config.cluster)} ranks, but {dist.get_world_size()} started")
    mesh = build_mesh(config.parallelism, device.type)
    # Tensor-parallel ranks work on the same tokens, and have to draw the same.
    seed_generators(config.training.seed, str({axis: at for axis, at in mesh.coordinates.items() if axis != "tp"}))
    family = load_family(config.model.family)
    model = build_model(config, family, mesh, device)
    optimizer = build_optimizer(model.parameters, config.optimizer, device, update_compiler(config))
    directory = RunDirectory(Path(config.run.dir))
    store = None
    if config.checkpoint.mode is not CheckpointMode.disabled:
        store = CheckpointStore(
            directory.checkpoints,
            config.checkpoint,
            config.fault_tolerance.save_timeout_seconds or _NO_LIMIT_SECONDS,
            directory.append_event,
        )
    trainer = Trainer(
        config,
        directory,
        device,
        mesh,
        family,
        model.parts,
        model.parameters,
        model.copies,
        optimizer,
        model.forward_backward,
        model.evaluate,
        build_feed(config, data, mesh.data_rank, mesh.data_ranks),
        held_positions(config, mesh),
        store,
        weights_changed=model.weights_changed,
    )
    # A CPU's numbers are there at once, and with offloaded weights the CPU does the update.
    trainer.defers = device.type == "cuda" and not config.parallelism.cpu_offload and is_skipped_on_device(optimizer)
    if held_out is not None:
        trainer.held_out = HeldOutRows(held_out, config.validation.rows)
    for line in describe_trainer(trainer, model.applied):
        logger.info(line)
    return trainer


def update_compiler(config: TitanConfig) -> str | None:
    """Return the backend that compiles the optimizer's update; None where it is not compiled."""
    return config.compile.backend if config.compile.enable and config.compile.optimizer else None


def held_positions(config: TitanConfig, mesh: Mesh) -> Tensor | None:
    """Return which positions of every row this rank has; None for all."""
    ranks = config.parallelism.cp
    if ranks == 1:
        return None
    return positions_of_rank(config.training.seq_len, ranks, mesh.coordinates["cp"], config.parallelism.cp_head_tail)


def load_data(config: TitanConfig, is_writer: bool) -> Rows | StreamedText:
    """Return the data: tokenised, or open; before the process group is there, so that no collective waits for it."""
    if config.data.streaming:
        return open_streams(config.data, build_tokenizer(config.tokenizer))
    return _load_rows(config, config.data, is_writer)


def _load_rows(config: TitanConfig, source: SourceConfig, is_writer: bool) -> Rows:
    assert config.data.cache_dir is not None, "resolved before the config was frozen"
    preparation = Preparation(
        build_tokenizer(config.tokenizer),
        config.data.cache_dir,
        is_writer,
        config.cluster.timeout_seconds,
        config.data.prepare_workers,
        _report,
    )
    return load_rows(source, config.training.seq_len, preparation, config.data.packing, config.data.mask_documents)


def _report(component: str, progress: Progress) -> None:
    logger.info(f"{'tokenise':<10} {describe_progress(progress, component)}")


def build_feed(config: TitanConfig, data: Rows | StreamedText, data_rank: int, data_ranks: int) -> Feed:
    """Return what a data rank is fed with.

    Args:
        config: Resolved.
        data: From `load_data`.
        data_rank: This rank's share of the rows.
        data_ranks: How many shares there are.
    """
    training = config.training
    share = Share(training.global_batch_size, training.local_batch_size, data_rank, data_ranks)
    if isinstance(data, StreamedText):
        return build_stream_feed(data, share, training.seq_len, training.seed)
    order = data.order(training.global_batch_size, training.seed)
    padding = build_tokenizer(config.tokenizer).eos
    return PreparedFeed(data, order, share, padding, config.data.num_workers, config.data.prefetch)


def load_held_out(config: TitanConfig, is_writer: bool) -> Rows | None:
    """Return the rows to validate on, if the config validates: made as those to train on are, and tokenised before."""
    settings = config.validation
    if not settings.interval or settings.data is None:
        return None
    return _load_rows(config, settings.data, is_writer)


def describe_trainer(trainer: Trainer, applied: list[str]) -> list[str]:
    """Return what a person wants to know before the first step, as lines."""
    config, training = trainer.config, trainer.config.training
    ranks = world_size(config.cluster)
    peak = peak_tflops(device_name(trainer.device), training.param_dtype)
    micro = accumulation_steps(config)
    lines = [
        (
            "model",
            f"{config.model.name}, {trainer.family.count_parameters(config.model):,} parameters, "
            f"{trainer.family.flops_per_token(config.model, training.seq_len) / 1e6:,.0f} MFLOP a token",
        ),
        ("mesh", f"{describe_degrees(config.parallelism)} = {ranks} rank{'s' * (ranks != 1)}"),
        (
            "device",
            f"{device_name(trainer.device)}, " + (f"peak {peak:,.0f} TFLOP/s" if peak else "peak unknown: no MFU"),
        ),
        (
            "precision",
            f"compute {training.param_dtype.name}, gradients summed in {training.reduce_dtype.name}"
            + ", moments kept in bfloat16" * (config.optimizer.state_dtype is Dtype.bfloat16),
        ),
        (
            "batch",
            f"{training.global_batch_size} rows x {training.seq_len} = {trainer.tokens_per_step:,} tokens a step"
            + (f", in {micro} micro-batches a rank" if micro > 1 else ""),
        ),
    ]
    lines += [("data", line) for line in trainer.data.describe(training.steps)]
    if trainer.held_out is not None:
        count, whole = len(trainer.held_out), len(trainer.held_out.rows)
        lines.append(
            (
                "validation",
                f"{count:,} row{'s' * (count != 1)}{f' of {whole:,}' * (count < whole)}, every "
                f"{config.validation.interval:,} steps and after the last",
            )
        )
    lines += [("applied", line) for line in applied]
    if update_compiler(config) is not None:
        lines.append(("applied", f"optimizer's update compiled with {config.compile.backend}"))
    absent = [
        name
        for name, is_on in (
            ("compile", config.compile.enable),
            ("float8", config.float8.recipe.name != "none"),
            ("activation checkpointing", config.activation_checkpoint.mode.name != "none"),
            ("checkpoints", trainer.store is not None),
            ("validation", trainer.held_out is not None),
            ("deterministic algorithms", training.deterministic),
        )
        if not is_on
    ]
    if absent:
        lines.append(("off", ", ".join(absent)))
    return [f"{title:<10} {text}" for title, text in lines]
