"""What was written against its source: as logits where conventions differ, to the bit where they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from titan.checkpoint.hugging_face import CONFIG, HuggingFaceWeights, read_json
from titan.checkpoint.hugging_face_config import read_hugging_face_config
from titan.checkpoint.meta import read_params
from titan.checkpoint.weights import SavedTensors, Weights
from titan.config.schema import ModelConfig
from titan.convert.agreement import Agreement, Forward, TitanForward, compare, sample_positions
from titan.convert.describe import format_name
from titan.convert.reference import hugging_face_reference, meta_reference
from titan.convert.sources import HUGGING_FACE, META, Source, family_of
from titan.errors import TitanError

Say = Callable[[str], object]
_EMBEDDING = "tok_embeddings.weight"


class Disagreement(TitanError):
    """What was written does not compute what its source computes."""


def check_import(source: Source, config: ModelConfig, folder: Path, say: Say) -> None:
    """Hold a checkpoint that was written against what it was imported from.

    Args:
        source: What it was imported from.
        config: The model's shape.
        folder: Of the checkpoint, which need not have its manifest yet.
        say: Prints a line.

    Raises:
        Disagreement: If it is not the same.
    """
    written = SavedTensors(folder)
    if source.optimizer is not None:
        check_same(source.optimizer, SavedTensors(folder, "optimizer."), say)
    if source.kind not in (HUGGING_FACE, META):
        check_same(source.weights, written, say)
        return
    _check_embedding(source.weights, written, None)
    positions = sample_positions(config)
    ours = TitanForward(written, config, family_of(config), positions)
    _check_agrees(compare(ours, _reference(source, config), config), config, say)


def _reference(source: Source, config: ModelConfig) -> Forward:
    """Return the model as the source's own convention has it."""
    positions = sample_positions(config)
    if source.kind == META:
        factor = config.rope_scaling.factor if config.rope_scaling is not None else 1.0
        params = read_params(source.path)
        return meta_reference(params, source.weights.read, positions, factor, config.tie_embeddings)
    assert isinstance(source.weights, HuggingFaceWeights)
    return hugging_face_reference(read_json(source.path / CONFIG), source.weights.read_as_stored, positions)


def check_hugging_face(source: Source, config: ModelConfig, folder: Path, dtype: torch.dtype | None, say: Say) -> None:
    """Hold a folder that was exported against its checkpoint, whose weights are rounded likewise.

    Args:
        source: The checkpoint.
        config: The model's shape.
        folder: The exported one.
        dtype: What the weights were rounded to, or None.
        say: Prints a line.

    Raises:
        Disagreement: If it does not compute the same.
    """
    family, positions = family_of(config), sample_positions(config)
    read_back = read_hugging_face_config(folder, config.name)
    written = HuggingFaceWeights(folder, read_back, family)
    _check_embedding(source.weights, written, dtype)
    theirs = hugging_face_reference(read_json(folder / CONFIG), written.read_as_stored, positions)
    ours = TitanForward(source.weights, config, family, positions, dtype)
    _check_agrees(compare(ours, theirs, config), config, say)
    if any(info.dtype != (dtype or info.dtype) for info in source.weights.infos().values()):
        whole = TitanForward(source.weights, config, family, positions)
        drift = compare(ours, whole, config, allowed=float("inf")).difference
        say(f"rounded  to {format_name(dtype)}: the logits move by {drift:.1e} of their size")


def _check_agrees(found: Agreement, config: ModelConfig, say: Say) -> None:
    if found.departs:
        raise Disagreement(
            f"what was written does not compute what its source computes: they depart at {found.departs}, "
            f"by {found.difference:.1e} of the size of the numbers\n  Nothing was kept."
        )
    tokens = len(sample_positions(config))
    say(f"agrees   with the source: logits of {tokens} tokens to {found.difference:.1e} of their size")


def _check_embedding(source: Weights, written: Weights, dtype: torch.dtype | None) -> None:
    """Compare all of the embedding: a few tokens touch a few of its rows alone, and every format has it as it is."""
    embedding = source.read(_EMBEDDING)
    embedding = embedding if dtype is None else embedding.to(dtype)
    if not _is_same(embedding, written.read(_EMBEDDING)):
        raise Disagreement(f"what was written is not its source: {_EMBEDDING} differs\n  Nothing was kept.")


def check_same(source: Weights, written: Weights, say: Say) -> None:
    """Read every tensor back.

    Raises:
        Disagreement: If one is not the same to the bit.
    """
    infos = source.infos()
    different = [
        name
        for name, info in infos.items()
        if written.infos().get(name) != info or not _is_same(source.read(name), written.read(name))
    ]
    different += sorted(written.infos().keys() - infos.keys())
    if different:
        raise Disagreement(f"what was written is not its source, first in {different[0]}\n  Nothing was kept.")
    say(f"agrees   with the source: {len(infos)} tensors to the bit")


def _is_same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))  # as bits: NaN is itself
