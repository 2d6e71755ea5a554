"""Weights in one file of torch.save: read through a memory map, written tensor by tensor.

    {"model": {name: tensor}, "optimizer": {"name.key": tensor}, "step": 500, "tokens": 1000000,
     "config": {"model": {"dim": 4096, ...}}}

Names are titan's. Of these, only "model" has to be there; a file may also be the dict of its tensors alone.

torch.save keeps all it writes in memory until the end, so the file is written here: the same pickle, with a record for
each tensor behind it, in the container that torch.save uses. Files are read with `weights_only`: what else a pickle
asks to be called is not.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _rebuild_tensor_v2

from titan.checkpoint.files import TensorInfo
from titan.checkpoint.weights import check_usable, take_part
from titan.config.schema import ModelConfig, RopeScalingConfig
from titan.errors import CheckpointError

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
}


class MappedTensors:
    """Tensors of a file that is mapped into memory: read when they are needed."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def infos(self) -> dict[str, TensorInfo]:
        """Return the shape and format of each."""
        return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return a part of a tensor; as `Weights.read`."""
        part = take_part(self._tensors[name], rows, columns)
        return part.clone(memory_format=torch.contiguous_format)


class TorchFile:
    """A file of torch.save with titan's names.

    Raises:
        CheckpointError: If it is something else, or wants to run something.
    """

    def __init__(self, path: Path) -> None:
        content = load_mapped(path)
        has_parts = isinstance(content.get("model"), dict)
        model = content["model"] if has_parts else content
        optimizer = content.get("optimizer") if has_parts else None
        check_usable(path, _problems(model, "") + _problems(optimizer or {}, "optimizer: "))
        self.model = MappedTensors({name: tensor.detach() for name, tensor in model.items()})
        self.optimizer = MappedTensors(optimizer) if optimizer else None
        self.step, self.tokens = (_count(content.get(key)) if has_parts else 0 for key in ("step", "tokens"))
        self.config = _config(path, content.get("config")) if has_parts else None


def load_mapped(path: Path) -> dict[str, Any]:
    """Return the dict in a file of torch.save, its tensors mapped and not read.

    Raises:
        CheckpointError: If it is none, or wants to run something.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # an unpickler fails in any way on any bytes
        raise CheckpointError(f"{path} cannot be read: {_why(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be used: it holds a {type(content).__name__}, not a dict of tensors")
    return content


def write_torch_file(
    path: Path, parts: Mapping[str, Mapping[str, TensorInfo]], read: Callable[[str, str], Tensor], more: dict[str, Any]
) -> None:
    """Write a file as torch.save would.

    Args:
        path: To write to.
        parts: What to write: by part, such as "model", and name.
        read: Returns the tensor of a part and a name, when its turn has come.
        more: What else to put beside the parts: numbers, texts, dicts and lists of them.
    """
    planned = {
        part: {name: _Planned(f"{part}/{name}", info) for name, info in infos.items()} for part, infos in parts.items()
    }
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, protocol=2)
    pickler.dump({**planned, **more})
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickled.getvalue(), len(pickled.getvalue()))
    writer.write_record("byteorder", b"little", len(b"little"))
    for key, each in enumerate(pickler.planned):
        part, _, name = each.name.partition("/")
        tensor = read(part, name).detach().contiguous()
        assert (tensor.shape, tensor.dtype) == (each.info.shape, each.info.dtype), each.name
        storage: Any = tensor.untyped_storage()
        assert storage.nbytes() == each.info.bytes, f"{each.name} is a part of another tensor"
        writer.write_record(f"data/{key}", storage, each.info.bytes)
    writer.write_end_of_file()


class _Planned:
    """Stands for a tensor in what is pickled."""

    def __init__(self, name: str, info: TensorInfo) -> None:
        self.name, self.info = name, info


class _StorageOf:
    """Stands for a tensor's numbers."""

    def __init__(self, planned: _Planned) -> None:
        self.planned = planned


class _Pickler(pickle.Pickler):
    """Pickles a planned tensor as torch.save pickles a tensor, and remembers in which order the numbers come."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.planned: list[_Planned] = []

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Planned):
            return NotImplemented
        shape = tuple(obj.info.shape)
        stride = torch.empty(shape, device="meta").stride()
        return _rebuild_tensor_v2, (_StorageOf(obj), 0, shape, stride, False, collections.OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _StorageOf):
            return None
        self.planned.append(obj.planned)
        info = obj.planned.info
        return "storage", _STORAGES[info.dtype], str(len(self.planned) - 1), "cpu", info.shape.numel()


def _problems(tensors: Any, where: str) -> list[str]:
    if not isinstance(tensors, dict):
        return [f"{where}it is a {type(tensors).__name__}, not a dict of tensors"]
    if any(str(name).endswith("self_attn.q_proj.weight") for name in tensors):
        return ["its names are those of the transformers library, which also orders rows in another way\n"
                "  Try  model.save_pretrained(FOLDER)   and that folder"]  # fmt: skip
    wrong = [
        f"{where}{name} is a {type(tensor).__name__}, not a tensor"
        for name, tensor in tensors.items()
        if type(tensor) not in (Tensor, nn.Parameter) or not isinstance(name, str)
    ]
    return wrong or [
        f"{where}{name} is {str(tensor.dtype).removeprefix('torch.')}, {str(tensor.layout).removeprefix('torch.')}"
        for name, tensor in tensors.items()
        if tensor.dtype not in _STORAGES or tensor.layout is not torch.strided
    ]


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _config(path: Path, content: Any) -> ModelConfig | None:
    """Return the model's shape of a file that `write_torch_file` wrote."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return None
    values = dict(content["model"])
    try:
        scaling = values.pop("rope_scaling", None)
        return ModelConfig(rope_scaling=RopeScalingConfig(**scaling) if scaling else None, **values)
    except TypeError as error:
        raise CheckpointError(f"{path} cannot be used: its config is of another version: {error}") from error


def config_content(config: ModelConfig) -> dict[str, Any]:
    """Return a model's shape as `write_torch_file` keeps it."""
    return {"model": asdict(config)}


def _why(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors, numbers and texts; what it asks for was not run"
    if "_use_new_zipfile_serialization" in str(error):
        return (
            "it has the format of before PyTorch 1.6\n  Try  torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
        )
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
