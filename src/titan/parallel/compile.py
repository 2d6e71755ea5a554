"""torch.compile, one transformer block at a time: the blocks are alike, so one compilation serves them all."""

from __future__ import annotations

from titan.models.decoder import Decoder


def apply_compile(model: Decoder, backend: str) -> None:
    """Compile every block in place. After activation checkpointing, so that it lies inside the graph."""
    for block in model.layers.values():
        block.compile(backend=backend, fullgraph=True)
