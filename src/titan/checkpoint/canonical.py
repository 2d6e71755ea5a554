"""What a checkpoint holds, whatever layout it was saved on: one digest for every whole tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from titan.checkpoint.files import read_metadata, read_tensor, tensor_infos
from titan.checkpoint.state import RNG


def tensor_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's bytes, shape and format."""
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_digests(folder: Path) -> dict[str, str]:
    """Return the digest of every tensor of a checkpoint, the generators of ranks aside; reads one at a time."""
    metadata = read_metadata(folder)
    infos = tensor_infos(metadata)
    return {
        name: tensor_digest(read_tensor(folder, name, infos[name], metadata))
        for name in sorted(infos)
        if not name.startswith(RNG)
    }


def combined(digests: Mapping[str, str]) -> str:
    """Return one digest for all tensors."""
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return xxhash.xxh3_128_hexdigest(lines.encode())
