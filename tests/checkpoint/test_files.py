"""Tensors that are written as they come."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from titan.checkpoint.files import read_metadata, read_tensor, tensor_infos, write_tensors


def test_what_is_written_is_let_go(tmp_path: Path) -> None:
    """With `release`, none is in memory when the next one is asked for; PyTorch's writer would keep them all."""
    given: list[Tensor] = []
    in_memory: list[int] = []

    def resolve(name: str) -> Tensor:
        in_memory.append(sum(tensor.untyped_storage().nbytes() > 0 for tensor in given))
        given.append(torch.full((100,), float(name)))
        return given[-1]

    state = {str(index): torch.empty(100, device="meta") for index in range(6)}
    write_tensors(state, tmp_path, resolve=resolve, release=True)
    assert in_memory == [0] * 6
    metadata = read_metadata(tmp_path)
    for name, info in tensor_infos(metadata).items():
        assert torch.equal(read_tensor(tmp_path, name, info, metadata), torch.full((100,), float(name)))


def test_what_is_written_is_kept_otherwise(tmp_path: Path) -> None:
    """A copy that was staged once may be used again."""
    staged = {"a": torch.ones(10), "b": torch.ones(10)}
    write_tensors(staged, tmp_path, resolve=staged.__getitem__)
    assert all(bool((tensor == 1).all()) for tensor in staged.values())
