"""What a run did, in numbers that another layout must reproduce: losses, gradients, weights.

`record_run` trains some steps on whatever mesh the config describes and brings everything together on rank 0;
`compare_records` says by how much two records differ, over *every* parameter and not on average.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan.config.schema import TitanConfig
from titan.data.packing import PackedTokens
from titan.trainer.build import build_trainer
from titan.trainer.loop import build_meter, run_step, steps_of_batches


@dataclass(frozen=True)
class Record:
    """What some steps did."""

    losses: list[float]
    """Of every step, in nats a token."""
    grad_norms: list[float]
    """Of every step, before clipping."""
    gradients: dict[str, Tensor]
    """Of the first step, whole and after clipping, by the parameter's name."""
    weights: dict[str, Tensor]
    """After the last step, whole."""

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
    config: TitanConfig, device: torch.device, packed: PackedTokens, steps: int | None = None
) -> Record | None:
    """Train some steps of a config and return what they did, on rank 0; None on all other ranks.

    Args:
        config: Resolved.
        device: This rank's.
        packed: The data.
        steps: How many; None for all.
    """
    trainer = build_trainer(config, device, packed)
    batches = steps_of_batches(trainer, build_meter(trainer))
    losses: list[float] = []
    norms: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(config.training.steps if steps is None else steps):
        result, _ = run_step(trainer, next(batches))
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 0:
            gradients = _gather({name: p.grad for name, p in trainer.parameters if p.grad is not None})
    weights = _gather({name: p.detach() for name, p in trainer.parameters})
    return Record(losses, norms, gradients, weights) if dist.get_rank() == 0 else None


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
    gradient_of, gradient = _worst(record.gradients, reference.gradients)
    weight_of, weight = _worst(record.weights, reference.weights)
    return Difference(
        loss=_relative(record.losses, reference.losses),
        grad_norm=_relative(record.grad_norms, reference.grad_norms),
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


def _relative(values: list[float], references: list[float]) -> float:
    return max(abs(v - r) / max(abs(r), 1e-30) for v, r in zip(values, references, strict=True))


def _worst(tensors: dict[str, Tensor], references: dict[str, Tensor]) -> tuple[str, float]:
    def difference(name: str) -> float:
        reference = references[name].double()
        norm = reference.norm().item()
        distance = (tensors[name].double() - reference).norm().item()
        return distance / norm if norm else distance

    differences = {name: difference(name) for name in references}
    name = max(differences, key=lambda key: differences[key])
    return name, differences[name]
