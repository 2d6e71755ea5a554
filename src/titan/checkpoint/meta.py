"""Llama as Meta publishes it: a folder with params.json and consolidated.00.pth, consolidated.01.pth, ...

Each file is the part of one model-parallel rank. Matrices were cut by rows or by columns and are put together here;
norms are in every file. The trap is the embedding: Llama 2 cut it by columns, Llama 3 by words. Only the shapes tell.

Names and the order of rows are titan's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from titan.checkpoint.files import TensorInfo
from titan.checkpoint.hugging_face import read_json
from titan.checkpoint.torch_file import load_mapped
from titan.checkpoint.weights import check_usable, expect_shapes
from titan.config.schema import ModelConfig, RopeScalingConfig
from titan.errors import CheckpointError

PARAMS = "params.json"
_PART = re.compile(r"consolidated\.(\d+)\.pth")
_ROWS = re.compile(r"(attention\.w[qkv]|feed_forward\.w[13]|^output)\.weight$")
_COLUMNS = re.compile(r"(attention\.wo|feed_forward\.w2)\.weight$")
_COMPUTED = "rope.freqs"
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_LLAMA_3_2_WIDTHS = (2048, 3072)
"""Of Llama 3.2, the only models with scaled positions that are narrower than 4096."""


class Shapes(Protocol):
    """What a `titan.models.family.ModelFamily` says of its parameters."""

    def parameter_shapes(self, config: ModelConfig) -> dict[str, torch.Size]:
        """Return the shape of each, by its name."""
        ...


def is_meta(folder: Path) -> bool:
    """Whether a folder is meant as one of Meta's: it has a params.json."""
    return (folder / PARAMS).is_file()


class MetaWeights:
    """The weights of Meta's files, put together.

    Args:
        folder: With the files.
        width: The model's dim, which tells how the embedding is cut.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self._parts = [load_mapped(path) for path in find_parts(folder)]
        check_usable(folder, self._damage())
        self._names = [name for name in self._parts[0] if name != _COMPUTED]

    def infos(self) -> dict[str, TensorInfo]:
        """Return the shape and format of each tensor, put together."""
        infos = {}
        for name in self._names:
            shape, dim = list(self._parts[0][name].shape), self._cut_dim(name)
            if dim is not None:
                shape[dim] = sum(part[name].shape[dim] for part in self._parts)
            infos[name] = TensorInfo(torch.Size(shape), self._parts[0][name].dtype)
        return infos

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Return a part of a tensor; as `Weights.read`."""
        shape, dim = self.infos()[name].shape, self._cut_dim(name)
        whole = [range(size) for size in shape]
        wanted = [each if asked is None else asked for each, asked in zip(whole, (rows, columns), strict=False)]
        if dim is None:
            return _take(self._parts[0][name], wanted).clone(memory_format=torch.contiguous_format)
        pieces, begin = [], 0
        for part in self._parts:
            size = part[name].shape[dim]
            inside = range(max(wanted[dim].start - begin, 0), min(wanted[dim].stop - begin, size))
            pieces.append(_take(part[name], [inside if each == dim else wanted[each] for each in range(len(wanted))]))
            begin += size
        return torch.cat(pieces, dim)

    def without(self, name: str) -> None:
        """Leave a tensor out, as one that is the copy of another."""
        self._names.remove(name)

    def _cut_dim(self, name: str) -> int | None:
        """Return along which dim a tensor was cut; None if every file has all of it."""
        if len(self._parts) == 1:
            return None
        if name == _EMBEDDING:
            return 0 if self._parts[0][name].shape[1] == self.width else 1
        return 0 if _ROWS.search(name) else 1 if _COLUMNS.search(name) else None

    def _damage(self) -> Iterator[str]:
        for index, part in enumerate(self._parts):
            strange = [name for name, value in part.items() if not isinstance(name, str) or type(value) is not Tensor]
            if strange:
                yield f"consolidated.{index:02d}.pth holds more than tensors: {strange[0]}"
                return
        first = self._parts[0]
        for index, part in enumerate(self._parts):
            for name in sorted(first.keys() ^ part.keys()):
                yield f"{name} is in only one of consolidated.00.pth and consolidated.{index:02d}.pth"
            for name in first.keys() & part.keys():
                if part[name].ndim != first[name].ndim or part[name].dtype != first[name].dtype:
                    yield f"{name} of consolidated.{index:02d}.pth has other dims or another format than that of 00"
                elif name.endswith("norm.weight") and not torch.equal(part[name], first[name]):
                    yield f"{name} is not the same in consolidated.00.pth and consolidated.{index:02d}.pth"


def open_meta(folder: Path, family: Shapes) -> tuple[ModelConfig, MetaWeights, list[str]]:
    """Return a folder's model: its shape, its weights, and what had to be assumed.

    Raises:
        CheckpointError: If it is not whole, or no Llama as titan computes it.
    """
    params = read_params(folder)
    weights = MetaWeights(folder, params["dim"])
    infos = weights.infos()
    check_usable(folder, [f"{_EMBEDDING} is missing"] if _EMBEDDING not in infos else [])
    config = replace(to_model_config(params, folder.resolve().name), vocab_size=infos[_EMBEDDING].shape[0])
    notes = []
    if _is_tied(weights):
        config = replace(config, tie_embeddings=True)
        if _OUTPUT in infos:
            weights.without(_OUTPUT)
            notes.append("the output is the embedding, to the bit: tie_embeddings = true")
    if config.rope_scaling is not None:
        notes.append(
            f"{PARAMS} has use_scaled_rope, and not by which factor: {config.rope_scaling.factor:g} is assumed"
        )
    shapes = family.parameter_shapes(config)
    problems = expect_shapes(weights.infos(), shapes, {name: name for name in shapes})
    if problems and 0 < params["vocab_size"] != config.vocab_size:
        problems.insert(0, f"vocab_size = {params['vocab_size']}, but the files have {config.vocab_size} words")
    check_usable(folder, problems)
    return config, weights, notes


def read_params(folder: Path) -> dict[str, Any]:
    """Return params.json with its optional values filled in.

    Raises:
        CheckpointError: If it describes no Llama.
    """
    given = read_json(folder / PARAMS)
    params = {"vocab_size": -1, "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 10000.0, **given}
    params["n_kv_heads"] = params.get("n_kv_heads") or params.get("n_heads")
    params["ffn_dim_multiplier"] = params.get("ffn_dim_multiplier") or 1.0
    counts = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of")
    wrong = [f"{key} = {params.get(key)} is no positive number" for key in counts if not _is_count(params.get(key))]
    wrong += [
        f"{key} = {params[key]} is no positive number"
        for key in ("norm_eps", "rope_theta", "ffn_dim_multiplier")
        if isinstance(params[key], bool) or not isinstance(params[key], int | float) or params[key] <= 0
    ]
    wrong += [] if type(params["vocab_size"]) is int else [f"vocab_size = {params['vocab_size']} is no number"]
    if not wrong and (params["dim"] % (2 * params["n_heads"]) or params["n_heads"] % params["n_kv_heads"]):
        shape = f"dim = {params['dim']}, n_heads = {params['n_heads']}, n_kv_heads = {params['n_kv_heads']}"
        wrong.append(f"{shape}: heads do not come out even")
    check_usable(folder / PARAMS, wrong)
    return params


def to_model_config(params: dict[str, Any], name: str) -> ModelConfig:
    """Return the shape that a params.json describes.

    Its context length is not in it; it follows from the generation, which the rotary positions tell.
    """
    is_scaled = bool(params.get("use_scaled_rope"))
    is_llama_3 = params["rope_theta"] >= 500000.0
    return ModelConfig(
        name=name,
        dim=params["dim"],
        n_layers=params["n_layers"],
        n_heads=params["n_heads"],
        n_kv_heads=params["n_kv_heads"],
        ffn_dim=ffn_dim(params),
        vocab_size=params["vocab_size"],
        max_seq_len=131072 if is_scaled else 8192 if is_llama_3 else 4096,
        norm_eps=float(params["norm_eps"]),
        rope_theta=float(params["rope_theta"]),
        rope_scaling=RopeScalingConfig(factor=scaling_factor(params)) if is_scaled else None,
    )


def ffn_dim(params: dict[str, Any]) -> int:
    """Return the inner width of the feed-forward layer: Meta's files say how it was computed, not what it is."""
    size = int(params["ffn_dim_multiplier"] * int(2 * (4 * params["dim"]) / 3))
    return params["multiple_of"] * -(-size // params["multiple_of"])


def scaling_factor(params: dict[str, Any]) -> float:
    """Return how much slower the lowest rotary frequencies are with use_scaled_rope: 32 for Llama 3.2, else 8.

    Source:
        transformers, models/llama/convert_llama_weights_to_hf.py: Meta's files do not say.
    """
    return 32.0 if params["dim"] in _LLAMA_3_2_WIDTHS else 8.0


def find_parts(folder: Path) -> list[Path]:
    """Return Meta's files of a folder, in order.

    Raises:
        CheckpointError: If one is missing.
    """
    matches = (_PART.fullmatch(path.name) for path in folder.iterdir())
    found = {int(match.group(1)): folder / match.group(0) for match in matches if match}
    if not found:
        raise CheckpointError(f"{folder} cannot be used: it has no consolidated.00.pth")
    missing = [index for index in range(max(found)) if index not in found]
    check_usable(folder, [f"consolidated.{index:02d}.pth is missing" for index in missing])
    return [path for _, path in sorted(found.items())]


def _is_tied(weights: MetaWeights) -> bool:
    infos = weights.infos()
    if _OUTPUT not in infos:
        return True
    if infos[_OUTPUT] != infos[_EMBEDDING]:
        return False
    rows = range(min(16, infos[_OUTPUT].shape[0]))  # nearly always enough to tell
    if not torch.equal(weights.read(_OUTPUT, rows), weights.read(_EMBEDDING, rows)):
        return False
    return torch.equal(weights.read(_OUTPUT), weights.read(_EMBEDDING))


def _take(tensor: Tensor, indices: list[range]) -> Tensor:
    for dim, index in enumerate(indices):
        tensor = tensor.narrow(dim, min(index.start, tensor.shape[dim]), len(index))
    return tensor


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
