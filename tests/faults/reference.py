"""The run that nothing disturbs, and what a run is compared by: every row of metrics and every tensor, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import xxhash

from tests.support.command import results, validations
from titan.checkpoint.files import read_metadata, read_tensors, tensor_infos
from titan.checkpoint.manifest import Manifest, committed_steps, step_folder


def digests(checkpoint: Path) -> dict[str, str]:
    """Return a checksum of everything that a checkpoint holds, whole: weights, optimizer, every rank's generators."""
    infos = tensor_infos(read_metadata(checkpoint))
    tensors = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}
    read_tensors(tensors, checkpoint)
    return {name: xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes()) for name, tensor in tensors.items()}


def different(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Return the tensors that are not the same, or that only one of two checkpoints has."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


@dataclass(frozen=True)
class Reference:
    """An undisturbed run that has kept a checkpoint of every step it saved."""

    directory: Path
    _known: dict[int, dict[str, str]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> dict[int, tuple[int, float, float]]:
        """Step, loss and gradient norm with all their bits, by step."""
        return {row[0]: row for row in results(self.directory)}

    @cached_property
    def validations(self) -> list[tuple[int, float, int]]:
        """Step, loss with all its bits, and tokens of every validation."""
        return validations(self.directory)

    @cached_property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        return committed_steps(self.directory / "checkpoints")

    @cached_property
    def shard_bytes(self) -> int:
        """The size of what a rank writes into a checkpoint; the smaller of two."""
        files = Manifest.read(self.checkpoint(self.steps[-1])).files
        return min(record.bytes for name, record in files.items() if name.endswith(".distcp"))

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return step_folder(self.directory / "checkpoints", step)

    def digests(self, step: int) -> dict[str, str]:
        """Return a checksum of every tensor after a step."""
        if step not in self._known:
            self._known[step] = digests(self.checkpoint(step))
        return self._known[step]
