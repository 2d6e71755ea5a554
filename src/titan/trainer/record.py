"""What a run did, in numbers that another layout must reproduce: losses, gradients, weights.

`record_run` trains some steps on whatever mesh the config describes and brings everything together on rank 0;
`compare_records` says by how much two records differ, over *every* parameter and not on average.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan.checkpoint.canonical import tensor_digest
from titan.checkpoint.manifest import Manifest
from titan.checkpoint.state import optimizer_state, weights_state
from titan.checkpoint.store import CheckpointStore
from titan.config.schema import CheckpointConfig, CheckpointMode, TitanConfig
from titan.data.feed import StreamedText
from titan.data.loader import Batch
from titan.data.rows import Rows
from titan.errors import StorageError
from titan.trainer.build import Trainer, build_trainer
from titan.trainer.loop import build_meter, run_step, steps_of_batches
from titan.trainer.saving import data_state
from titan.trainer.validation import validate


@dataclass(frozen=True)
class Record:
    """What some steps did."""

    losses: list[float]
    """Of every step, in nats a token."""
    grad_norms: list[float]
    """Of every step, before clipping."""
    gradients: dict[str, Tensor]
    """Of the first step, whole and before clipping, by the parameter's name."""
    weights: dict[str, Tensor]
    """After the last step, whole."""
    validation_losses: list[float] = field(default_factory=list)
    """After the first and the last step, in nats a token; empty where there was nothing to validate on."""

    def save(self, path: Path) -> None:
        """Write to a file."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read from a file; nothing in it is executed."""
        return cls(**torch.load(path, weights_only=True))


@dataclass(frozen=True)
class Difference:
    """The largest differences of a record from a reference."""

    loss: float
    """Relative, over all steps."""
    grad_norm: float
    """Relative, over all steps."""
    gradient: float
    """The norm of a parameter's gradient difference over the norm of its gradient; the worst of all parameters."""
    gradient_of: str
    """Which parameter that is."""
    weight: float
    """The same for the weights after the last step."""
    weight_of: str
    """Which parameter that is."""


def record_run(
    config: TitanConfig,
    device: torch.device,
    data: Rows | StreamedText,
    steps: int | None = None,
    held_out: Rows | None = None,
) -> Record | None:
    """Train some steps of a config and return what they did, on rank 0; None on all other ranks.

    Args:
        config: Resolved.
        device: This rank's.
        data: What to train on.
        steps: How many; None for all.
        held_out: What to validate on, whatever interval the config says.
    """
    trainer = build_trainer(config, device, data, held_out)
    batches = steps_of_batches(trainer, build_meter(trainer))
    losses: list[float] = []
    norms: list[float] = []
    gradients: dict[str, Tensor] = {}
    validation_losses: list[float] = []
    steps = config.training.steps if steps is None else steps

    def keep_gradients() -> None:
        if not losses:
            gradients.update(_gather({name: p.grad for name, p in trainer.parameters if p.grad is not None}))

    for step in range(steps):
        result = run_step(trainer, next(batches), keep_gradients).result.read()
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if trainer.held_out is not None and step in (0, steps - 1):
            validation_losses.append(validate(trainer, trainer.held_out).loss)
    weights = _gather({name: p.detach() for name, p in trainer.parameters})
    return Record(losses, norms, gradients, weights, validation_losses) if dist.get_rank() == 0 else None


def save_copy(trainer: Trainer, folder: Path) -> None:
    """Save what a trainer has just loaded once more, in another folder.

    Raises:
        StorageError: If that cannot be written.
    """
    settings = CheckpointConfig(mode=CheckpointMode["sync"], keep_latest=0)
    store = CheckpointStore(folder, settings)
    state = weights_state(trainer.parameters) | optimizer_state(trainer.parameters, trainer.optimizer)
    state |= data_state(trainer)
    store.save(Manifest(trainer.state.step, 0, "all", "", {}), state, "", in_background=False)
    outcome = store.result()
    store.close()
    if isinstance(outcome, StorageError):
        raise outcome


@contextlib.contextmanager
def note_rows(trainer: Trainer, path: Path) -> Iterator[None]:
    """Append the digest of every step's rows to a file, as the ranks are given them and in the order of the data.

    Every rank says what it has: which rows of which micro-batch, and which positions of each. So a digest is of the
    global batch, whatever the layout, and a rank that was given other rows than its layout says would change it.
    """
    run = trainer.forward_backward

    def noting(batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
        mine = [batch.tokens.cpu() for batch in batches]
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (trainer.mesh.data_rank, trainer.positions, mine))
        if dist.get_rank() == 0:
            rows = _global_rows(parts, trainer.mesh.data_ranks, trainer.config.training.seq_len)
            with path.open("a") as file:
                file.write(json.dumps({"step": trainer.state.step + 1, "digest": tensor_digest(rows)}) + "\n")
        return run(batches, valid_tokens)

    trainer.forward_backward = noting
    try:
        yield
    finally:
        trainer.forward_backward = run


def _global_rows(parts: list[tuple[int, Tensor | None, list[Tensor]]], data_ranks: int, seq_len: int) -> Tensor:
    """Put the ranks' micro-batches together. Shape: (G, S) int64; -1 where no rank had a position."""
    micro, rows = len(parts[0][2]), parts[0][2][0].shape[0]
    out = torch.full((data_ranks, micro, rows, seq_len), -1, dtype=torch.int64)
    for data_rank, positions, batches in parts:
        where = torch.arange(seq_len) if positions is None else positions.cpu()
        for index, tokens in enumerate(batches):
            before = out[data_rank, index][:, where]
            if not ((before == -1) | (before == tokens)).all():
                raise ValueError(f"ranks that share data rank {data_rank} were given different rows")
            out[data_rank, index][:, where] = tokens
    return out.flatten(0, 2)


def compare_records(record: Record, reference: Record) -> Difference:
    """Return the largest differences of a record from a reference.

    Raises:
        ValueError: If they do not hold the same parameters.
    """
    for kind, mine, theirs in (
        ("gradients", record.gradients, reference.gradients),
        ("weights", record.weights, reference.weights),
    ):
        if mine.keys() != theirs.keys():
            raise ValueError(f"{kind} of different parameters: {sorted(mine.keys() ^ theirs.keys())}")
    for kind, mine, theirs in (
        ("losses", record.losses, reference.losses),
        ("gradient norms", record.grad_norms, reference.grad_norms),
    ):
        if len(mine) != len(theirs):
            raise ValueError(f"{len(mine)} {kind} beside {len(theirs)}")
    gradient_of, gradient = _worst(record.gradients, reference.gradients)
    weight_of, weight = _worst(record.weights, reference.weights)
    return Difference(
        loss=max(map(apart, record.losses, reference.losses)),
        grad_norm=max(map(apart, record.grad_norms, reference.grad_norms)),
        gradient=gradient,
        gradient_of=gradient_of,
        weight=weight,
        weight_of=weight_of,
    )


def _gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = {name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu() for name, t in tensors.items()}
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object({name: t.clone() for name, t in whole.items()}, parts)
    merged: dict[str, Tensor] = {}
    for part in parts or []:
        merged |= part or {}
    return merged


def apart(value: float, reference: float) -> float:
    """Return the difference over the size of the reference; infinity where one of them is no number."""
    found = abs(value - reference) / max(abs(reference), 1e-30)
    return found if found < math.inf else math.inf  # so that the largest of several is never hidden behind a NaN


def tensors_apart(mine: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm; 0 only for equal tensors, and infinity for no number."""
    if mine.equal(reference):
        return 0.0
    mine, reference = mine.double(), reference.double()
    found = (mine - reference).norm().item() / (reference.norm().item() or 1.0)
    return found if 0 < found < math.inf else math.inf


def _worst(tensors: dict[str, Tensor], references: dict[str, Tensor]) -> tuple[str, float]:
    differences = {name: tensors_apart(tensors[name], reference) for name, reference in references.items()}
    name = max(differences, key=lambda key: differences[key])
    return name, differences[name]
