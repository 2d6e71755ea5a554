"""What every format of weights can do here: say what it has, and read a part of it, by titan's names.

And titan's own checkpoints in this form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from titan.checkpoint.files import TensorInfo, read_metadata, read_tensor, tensor_infos
from titan.errors import CheckpointError

MOST_LINES = 20
"""Problems that an error lists; a model has hundreds of tensors, and often all are wrong in the same way."""


class Weights(Protocol):
    """The tensors of a model, wherever they are kept."""

    def infos(self) -> dict[str, TensorInfo]:
        """Return what there is, by titan's names of parameters."""
        ...

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return a part of a tensor, on the CPU, in memory of its own.

        Args:
            name: Titan's name of the parameter.
            rows: Which indices of the first dim, of step 1; None for all.
            columns: Which of the second, where there is one; None for all.
        """
        ...


class SavedTensors:
    """The tensors of a titan checkpoint.

    Args:
        folder: The checkpoint's.
        prefix: With which the names of those that are meant begin: `model.` or `optimizer.`.

    Raises:
        CheckpointError: If its metadata cannot be read.
    """

    def __init__(self, folder: Path, prefix: str = "model.") -> None:
        self.folder, self.prefix = folder, prefix
        self._metadata = read_metadata(folder)
        self._infos = {
            name.removeprefix(prefix): info
            for name, info in tensor_infos(self._metadata).items()
            if name.startswith(prefix)
        }

    def infos(self) -> dict[str, TensorInfo]:
        """Return the shape and format of each, by its name without the prefix."""
        return self._infos

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return a part of a tensor; as `Weights.read`. The pieces that were saved are read whole."""
        whole = read_tensor(self.folder, self.prefix + name, self._infos[name], self._metadata)
        return take_part(whole, rows, columns)


def take_part(whole: Tensor, rows: range | None, columns: range | None) -> Tensor:
    """Return some rows and columns of a tensor, without the memory of the others."""
    part = whole if rows is None else whole[rows.start : rows.stop]
    part = part if columns is None or part.ndim < 2 else part[:, columns.start : columns.stop]
    return part if part.shape == whole.shape else part.clone(memory_format=torch.contiguous_format)


def check_usable(where: object, problems: Iterable[str]) -> None:
    """Refuse what has problems.

    Raises:
        CheckpointError: With the first of them, one a line.
    """
    found = list(problems)
    if found:
        lines = found[:MOST_LINES]
        if len(found) > MOST_LINES:
            lines.append(f"... and {len(found) - MOST_LINES} more")
        raise CheckpointError("\n  ".join([f"{where} cannot be used:", *lines]))


def expect_shapes(
    found: Mapping[str, TensorInfo], shapes: Mapping[str, torch.Size], called: Mapping[str, str]
) -> list[str]:
    """Hold tensors against the model that they are for; returns what is wrong, one line each.

    Args:
        found: What there is, by its own names.
        shapes: The model's parameters, by titan's names.
        called: What the format calls each parameter.
    """
    wrong = []
    for name, shape in shapes.items():
        other = called[name]
        if other not in found:
            wrong.append(f"{other} is missing")
        elif found[other].shape != shape:
            wrong.append(f"{other} has the shape {list(found[other].shape)}, and the model has {list(shape)}")
        elif not found[other].dtype.is_floating_point or found[other].dtype.itemsize < 2:
            wrong.append(f"{other} is {str(found[other].dtype).removeprefix('torch.')}: quantised weights are not read")
    return wrong + [f"{name} is no part of the model" for name in found.keys() - set(called.values())]
