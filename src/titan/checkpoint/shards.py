"""Safetensors files, written tensor by tensor: memory holds one, however large the file.

The library's own writer takes all tensors of a file at once. The format is simple enough to be written as it comes:
the length of the header in 8 bytes, the header as JSON with every tensor's place, and the tensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan.checkpoint.files import TensorInfo
from titan.checkpoint.hugging_face import INDEX, SINGLE
from titan.run_directory import write_synced

Infos = Mapping[str, TensorInfo]
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_shards(folder: Path, infos: Infos, read: Callable[[str], Tensor], max_bytes: int) -> list[str]:
    """Write weights as the transformers library names and splits them, with an index if there are several files.

    Args:
        folder: To write to.
        infos: What to write, in the order in which to write it.
        read: Returns a tensor, when its turn has come.
        max_bytes: The largest size of a file's tensors; a larger tensor gets a file of its own.

    Returns:
        The names of the files.
    """
    shards = plan_shards(infos, max_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, infos, read)
        return [SINGLE]
    names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, {tensor: infos[tensor] for tensor in shard}, read)
    index = {
        "metadata": {"total_size": sum(info.bytes for info in infos.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    write_json(folder / INDEX, index)
    return [*names, INDEX]


def plan_shards(infos: Infos, max_bytes: int) -> list[list[str]]:
    """Return which tensors come into which file: in order, each file as full as it gets."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.bytes
    return shards


def write_safetensors(path: Path, infos: Infos, read: Callable[[str], Tensor]) -> None:
    """Write a file, and have the disk keep it."""
    # The widest numbers first: then each tensor begins at a multiple of its numbers' size.
    order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers does not take it
    end = 0
    for name in order:
        begin, end = end, end + infos[name].bytes
        header[name] = {
            "dtype": _NAMES[infos[name].dtype],
            "shape": list(infos[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file.write, struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (infos[name].shape, infos[name].dtype), name
            _write_all(file.write, tensor_bytes(tensor))
        os.fsync(file.fileno())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's numbers as they stand in memory, without a copy if they stand in order."""
    numbers: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def write_json(path: Path, content: object) -> None:
    """Write an object as JSON, and have the disk keep it."""
    write_synced(path, json.dumps(content, indent=2) + "\n")


def _write_all(write: Callable[[memoryview], int | None], data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[write(rest) or 0 :]  # a system writes at most 2 GiB at once
