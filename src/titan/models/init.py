"""Initial weights that depend on the seed and the parameter's name, never on the layout.

A parameter is cut along its first dim into blocks of about a million numbers. Each block has a random generator of
its own, seeded with a hash of (seed, name, block). So a rank draws the blocks that its shard touches and no others,
any two layouts agree to the bit, and no seed checkpoint is needed to compare them. The numbers are always drawn on
the CPU, in float32: CUDA's generator gives different ones.

The obvious other way, PyTorch's DTensor random operations, gives values that depend on the mesh
(pytorch#168058).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from titan.config.schema import ModelConfig

BLOCK_NUMBERS = 1 << 20
Draw = Callable[[Tensor, torch.Generator], object]


def parameter_draw(name: str, config: ModelConfig) -> Draw | None:
    """Return how the parameter of this name is drawn; None where it is filled with ones.

    Source:
        The depth-scaled scheme of TorchTitan's Llama 3. A tied embedding is also the output projection and is
        drawn as one, or its logits would start far too large.
    """
    if name.endswith("norm.weight"):
        return None
    if name == "tok_embeddings.weight" and not config.tie_embeddings:
        return lambda block, generator: block.normal_(generator=generator)
    if name in ("output.weight", "tok_embeddings.weight"):
        std = config.dim**-0.5
    elif re.search(r"\.(wo|w2|w3)\.weight$", name):
        std = 0.02 / math.sqrt(2 * (_layer(name) + 1))
    else:
        std = 0.02
    return lambda block, generator: torch.nn.init.trunc_normal_(
        block, std=std, a=-3 * std, b=3 * std, generator=generator
    )


def draw_rows(name: str, shape: torch.Size, rows: range, seed: int, draw: Draw | None) -> Tensor:
    """Return some consecutive rows of a parameter's initial value.

    Args:
        name: The parameter's full name in the model.
        shape: The shape of the whole parameter.
        rows: Which indices of the first dim; of step 1.
        seed: The run's seed.
        draw: How its values are drawn; None fills it with ones.

    Shape:
        (len(rows), *shape[1:]), float32, on the CPU.
    """
    out = torch.ones(len(rows), *shape[1:])
    if draw is None or not len(rows):
        return out
    rows_per_block = max(1, BLOCK_NUMBERS // max(1, shape[1:].numel()))
    for index in range(rows.start // rows_per_block, (rows.stop - 1) // rows_per_block + 1):
        first = index * rows_per_block
        last = min(first + rows_per_block, shape[0])
        block = torch.empty(last - first, *shape[1:])
        draw(block, _generator(seed, name, index))
        start, stop = max(first, rows.start), min(last, rows.stop)
        out[start - rows.start : stop - rows.start] = block[start - first : stop - first]
    return out


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _layer(name: str) -> int:
    match = re.match(r"layers\.(\d+)\.", name)
    assert match, name
    return int(match.group(1))
