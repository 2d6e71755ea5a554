"""A small Llama, small data, and what a rank does with them. Everything here runs inside a pool's ranks too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.schema import TitanConfig
from titan.data.prepared import open_prepared, write_documents
from titan.data.rows import PreparedRows
from titan.trainer.record import Record, record_run

SMALL = (
    "model.dim=32",
    "model.n_layers=4",
    "model.n_heads=8",
    "model.n_kv_heads=4",
    "model.ffn_dim=64",
    "model.vocab_size=320",
    "training.steps=2",
    "training.seq_len=32",
    "training.local_batch_size=2",
    "training.global_batch_size=8",
    "optimizer.lr=5e-3",
    "lr_scheduler.warmup_steps=2",
    "checkpoint=disabled",
    "validation.rows=7",
    "run.dir=unused",
)
"""Fewer kv heads than heads; a global batch that every data degree up to 4 divides, and rows to validate on that none
does."""

TOKENS = 20_011
"""No multiple of the row length, so that the last row is padded."""


def make_packed(path: Path, vocab_size: int = 258, count: int = TOKENS) -> Path:
    """Write tokens that a model can learn something from: noisy counting, in documents of about 12 tokens."""
    generator = np.random.default_rng(0)
    tokens = np.cumsum(generator.integers(1, 4, count)) % (vocab_size - 2)
    tokens[generator.random(count) < 1 / 12] = vocab_size - 2  # tokenizer=bytes begins documents with 256
    starts = np.flatnonzero(tokens == vocab_size - 2)
    write_documents(path, np.split(tokens, starts[starts > 0]), vocab_size)
    return path


def open_packed(path: Path, config: TitanConfig, vocab_size: int = 258) -> PreparedRows:
    """Return the rows of the tokens that `make_packed` wrote."""
    mask = config.data.mask_documents
    return PreparedRows(open_prepared(path), config.training.seq_len, vocab_size - 1, mask_documents=mask)


def layout_config(world_size: int, overrides: tuple[str, ...]) -> TitanConfig:
    """Compose, check and resolve the small config for a layout: of two micro-batches a step, if it does not say.

    Where several ranks ask for it, one does it for all: each would need as long as for the layout's steps.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return _layout_config(world_size, overrides)
    made = [_layout_config(world_size, overrides) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    assert made[0] is not None, "sent"
    return made[0]


def _layout_config(world_size: int, overrides: tuple[str, ...]) -> TitanConfig:
    config = compose([*SMALL, f"cluster.devices_per_node={world_size}", *overrides])
    if not any(text.startswith("training.local_batch_size=") for text in overrides):
        settings = config.parallelism
        data_ranks = world_size // (settings.pp * settings.cp * settings.tp)
        rows = max(config.training.global_batch_size // data_ranks // 2, 2 if settings.pp > 1 else 1)
        config = replace(config, training=replace(config.training, local_batch_size=rows))
    return check_config(config, Machine())


def record_layout(world_size: int, overrides: tuple[str, ...], packed: Path, validates: bool = True) -> Record | None:
    """Train a layout as this rank; validates after the first and the last step, if not told otherwise."""
    config = layout_config(world_size, overrides)
    data = open_packed(packed, config)
    return record_run(config, torch.device("cpu"), data, held_out=data if validates else None)
