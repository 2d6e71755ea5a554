"""Safetensors files written tensor by tensor are what the library itself reads, and are cut where they should be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from titan.checkpoint.files import TensorInfo
from titan.checkpoint.shards import plan_shards, write_safetensors, write_shards

TENSORS = {
    "matrix": torch.randn(7, 5),
    "half": torch.randn(3, 3).half(),
    "brain": torch.randn(9).bfloat16(),
    "double": torch.randn(2, 2, 2).double(),
    "turned": torch.randn(4, 6).T,
    "one": torch.tensor(3.5),
    "none": torch.empty(0, 4),
}


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    """Return shapes and formats."""
    return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    """Every format and shape, tensors out of order and without numbers, to the bit."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, infos(TENSORS), TENSORS.__getitem__)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


def test_each_tensor_is_read_once_and_only_when_its_turn_has_come(tmp_path: Path) -> None:
    """The file has grown by the tensor before when the next one is asked for."""
    tensors = {f"t{index}": torch.full((1000,), float(index)) for index in range(5)}
    path, sizes = tmp_path / "x.safetensors", []

    def read(name: str) -> Tensor:
        sizes.append(os.path.getsize(path))
        return tensors[name]

    write_safetensors(path, infos(tensors), read)
    assert [size - sizes[0] for size in sizes] == [4000 * index for index in range(5)]


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [(100, [["a", "b"], ["c"], ["d"]]), (40, [["a"], ["b"], ["c"], ["d"]]), (10**9, [["a", "b", "c", "d"]])],
)
def test_files_are_filled_in_order(max_bytes: int, expected: list[list[str]]) -> None:
    """A tensor larger than a file may be gets one of its own."""
    sizes = {"a": 10, "b": 12, "c": 40, "d": 6}
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    assert plan_shards(infos(tensors), max_bytes) == expected


def test_an_index_says_which_file_has_which(tmp_path: Path) -> None:
    """In the form of transformers: total size, and a map of names to files."""
    tensors = {name: torch.zeros(10) for name in "abc"}
    names = write_shards(tmp_path, infos(tensors), tensors.__getitem__, 80)
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", names[-1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert json.loads((tmp_path / names[-1]).read_text()) == {
        "metadata": {"total_size": 120},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1]},
    }
