"""The weights of a Hugging Face folder, read by titan's names: any rows and columns, and nothing else of the file.

    config.json                        the shape: `titan.checkpoint.hugging_face_config`
    model.safetensors                  all weights; or, of a larger model,
    model-00001-of-00030.safetensors   some of them, and
    model.safetensors.index.json       which file has which

The trap is the order of rows of the query and key matrices. Llama's rotary embedding turns neighbours (0, 1), (2, 3)
and so on of each head; transformers turns (0, E/2), (1, E/2 + 1) and so on, and stores each head's rows so that both
compute the same: its row h*E + s*E/2 + p is titan's row h*E + 2*p + s. Values read in the wrong order have the right
shape, and give a model that speaks nonsense.

E: size of a head.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan.checkpoint.files import TensorInfo
from titan.checkpoint.weights import check_usable, expect_shapes
from titan.config.schema import ModelConfig
from titan.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
}
_COMPUTED = ".rotary_emb.inv_freq"
"""What old versions of transformers saved although it follows from the config."""


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is meant as a model of the transformers library: it has a config.json, and is not titan's."""
    return (folder / CONFIG).is_file()


class Naming(Protocol):
    """What a `titan.models.family.ModelFamily` says of its parameters, by titan's names."""

    def parameter_shapes(self, config: ModelConfig) -> dict[str, torch.Size]:
        """Return the shape of each."""
        ...

    def hugging_face_name(self, parameter: str) -> str:
        """Return what the transformers library calls one."""
        ...

    def is_rotary(self, parameter: str) -> bool:
        """Return whether its rows stand in another order there."""
        ...


class HuggingFaceWeights:
    """The weights of a folder.

    Files are opened for each read and closed after it: what is mapped of them counts as this process's memory.

    Args:
        folder: With the safetensors files.
        config: The shape of the model.
        naming: What its parameters are called there.

    Raises:
        CheckpointError: If a file is missing or damaged, or they do not have just these tensors in these shapes.
    """

    def __init__(self, folder: Path, config: ModelConfig, naming: Naming) -> None:
        self.folder, self.naming, self.head_size = folder, naming, config.dim // config.n_heads
        shapes, name_of = naming.parameter_shapes(config), naming.hugging_face_name
        self._called = {name: name_of(name) for name in shapes}
        self._files, self._found = find_tensors(folder)
        # Of a tied model, some have the output too, which transformers does not load either.
        copies = {name_of("output.weight")} - set(self._called.values())
        expected = {
            name: info for name, info in self._found.items() if name not in copies and not name.endswith(_COMPUTED)
        }
        check_usable(folder, expect_shapes(expected, shapes, self._called))

    def infos(self) -> dict[str, TensorInfo]:
        """Return the shape and format of each parameter, by titan's names."""
        return {name: self._found[called] for name, called in self._called.items()}

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return a part of a parameter, its rows in titan's order; as `Weights.read`."""
        called = self._called[name]
        rows = range(self._found[called].shape[0]) if rows is None else rows
        if not self.naming.is_rotary(name):
            return read_part(self._files[called], called, rows, columns)
        # Rows of a head stand apart, so whole heads are read: at most two that are needed in part.
        first = rows.start // self.head_size * self.head_size
        last = -(-rows.stop // self.head_size) * self.head_size
        heads = read_part(self._files[called], called, range(first, last), columns)
        return to_neighbours(heads, self.head_size)[rows.start - first : rows.stop - first].clone()

    def read_as_stored(self, called: str) -> Tensor:
        """Return a whole tensor by the name and in the order that it has in the files."""
        if called not in self._found:
            raise CheckpointError(f"{self.folder} has no tensor {called}")
        return read_part(self._files[called], called, range(self._found[called].shape[0]), None)


def to_neighbours(rows: Tensor, head_size: int) -> Tensor:
    """Give the rows of whole heads titan's order. Shape: (heads * E, ...) both."""
    return rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: Tensor, head_size: int) -> Tensor:
    """Give the rows of whole heads the order of transformers. Shape: (heads * E, ...) both."""
    return rows.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


def find_tensors(folder: Path) -> tuple[dict[str, Path], dict[str, TensorInfo]]:
    """Return the file, and the shape and format, of every tensor of a folder, by the names in it.

    Raises:
        CheckpointError: If a file is missing or damaged, or the index does not fit the files.
    """
    index = _read_index(folder)
    paths = _files_without_index(folder) if index is None else [folder / name for name in sorted(set(index.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    check_usable(folder, [f"{INDEX} names {name}, which is not there" for name in missing])
    files: dict[str, Path] = {}
    infos: dict[str, TensorInfo] = {}
    for path in paths:
        for name, info in read_header(path).items():
            files[name], infos[name] = path, info
    lost = [name for name, file in (index or {}).items() if files.get(name) != folder / file]
    check_usable(folder, [f"{INDEX} says that {name} is in {(index or {})[name]}, which is not so" for name in lost])
    return files, infos


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the shape and format of each tensor of a safetensors file.

    Raises:
        CheckpointError: If it is no whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            return {
                name: TensorInfo(torch.Size(piece.get_shape()), _dtype(path, name, piece.get_dtype()))
                for name, piece in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error


def read_part(path: Path, called: str, rows: range, columns: range | None) -> Tensor:
    """Return some rows and columns of a tensor of a safetensors file, in memory of their own.

    Raises:
        CheckpointError: If the file is no whole safetensors file, or has no such tensor.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = file.get_slice(called)
            part = stored[rows.start : rows.stop]
            if columns is not None and part.ndim > 1:
                part = part[:, columns.start : columns.stop]
            return part.clone(memory_format=torch.contiguous_format)  # what was mapped ends with the file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{called} cannot be read from {path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: If there is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} cannot be used: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be used: it holds no JSON object")
    return content


def _read_index(folder: Path) -> dict[str, str] | None:
    if not (folder / INDEX).exists():
        return None
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{folder / INDEX} cannot be used: it has no weight_map of names to files")
    outside = sorted({file for file in index.values() if Path(file).name != file})
    check_usable(folder, [f"{INDEX} names {file}, which is not a file of this folder" for file in outside])
    return index


def _files_without_index(folder: Path) -> list[Path]:
    single = folder / SINGLE
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(
            f"{folder} cannot be used: it has no *.safetensors file{_other_weights(folder.glob('*'))}"
        )
    return found


def _other_weights(paths: Iterable[Path]) -> str:
    pickled = sorted(path.name for path in paths if path.suffix in (".bin", ".pth", ".pt"))
    if not pickled:
        return ""
    return f"\n  It has {pickled[0]}, which transformers saves anew with save_pretrained(..., safe_serialization=True)"


def _dtype(path: Path, name: str, text: str) -> torch.dtype:
    if text not in _DTYPES:
        raise CheckpointError(f"{path} cannot be used: {name} has the unknown format {text}")
    return _DTYPES[text]
