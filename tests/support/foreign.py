"""Small models in the formats of others, made by the transformers library or written as Meta writes them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.reference.hugging_face import to_hugging_face_config
from titan.checkpoint.files import write_tensors
from titan.checkpoint.manifest import Manifest, commit, record_of_file
from titan.config.load import model_text
from titan.config.schema import ModelConfig, RopeScalingConfig
from titan.models.llama import LLAMA

SMALL = ModelConfig(
    name="small",
    dim=48,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    ffn_dim=80,
    vocab_size=70,
    max_seq_len=512,
    norm_eps=1e-6,
    rope_theta=10000.0,
)
SCALING = RopeScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq_len=64)


def shape(**changes: object) -> ModelConfig:
    """Return `SMALL` with other values."""
    return ModelConfig(**{**vars(SMALL), **changes})  # type: ignore[arg-type]


def save_hugging_face(
    folder: Path, config: ModelConfig = SMALL, shard_bytes: int | str = "5GB", dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Have transformers write a model with random weights, and return it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(to_hugging_face_config(config)).eval()
    for parameter in model.parameters():  # norms too, which are ones otherwise
        torch.nn.init.normal_(parameter, mean=0.1 if parameter.ndim == 1 else 0.0, std=0.1)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return model


META = ModelConfig(
    name="meta",
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    ffn_dim=176,
    vocab_size=72,
    max_seq_len=4096,
    norm_eps=1e-5,
    rope_theta=10000.0,
)
"""Cut by 8 in every way that Meta cuts."""


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Return random values for every parameter, by titan's names; always the same."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(size, generator=generator) * 0.2 + (len(size) == 1)
        for name, size in LLAMA.parameter_shapes(config).items()
    }


def save_meta(
    folder: Path, weights: dict[str, Tensor], parts: int = 1, cuts_words: bool = True, **params: object
) -> None:
    """Write weights as Meta does, each model-parallel rank's part a file: `META` in Llama 2's or Llama 3's way.

    Args:
        folder: To write to.
        weights: By Meta's names, which are titan's.
        parts: Model-parallel ranks.
        cuts_words: Whether the embedding is cut by words, as Llama 3's, or by columns, as Llama 2's.
        params: Values of params.json that differ.
    """
    folder.mkdir()
    shape = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps({**shape, "vocab_size": -1, **params}))
    for rank in range(parts):
        part = {name: meta_part(name, tensor, rank, parts, cuts_words) for name, tensor in weights.items()}
        part["rope.freqs"] = torch.ones(4)
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")


def meta_part(name: str, tensor: Tensor, rank: int, parts: int, cuts_words: bool) -> Tensor:
    """Return a model-parallel rank's part of a tensor: ColumnParallelLinear, RowParallelLinear, or one of its own."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind == "tok_embeddings":
        dim = 0 if cuts_words else 1
    else:
        dim = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}.get(kind)
    return tensor if dim is None else tensor.chunk(parts, dim)[rank].clone()


class Payload:
    """Something that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def save_titan(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor] | None = None,
    step: int = 0,
) -> None:
    """Write a titan checkpoint without a run."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True)
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    files = write_tensors(
        state | {f"optimizer.{name}": tensor for name, tensor in (optimizer or {}).items()}, temporary
    )
    (temporary / "config.yaml").write_text(model_text(config))
    files["config.yaml"] = record_of_file(temporary / "config.yaml")
    content = "weights" if optimizer is None else "all"
    commit(temporary, folder, Manifest(step, 100 * step, content, "a run", files, mesh={"dp_shard": 2}))


def rewrite_manifest(folder: Path) -> None:
    """Make a checkpoint's manifest agree with its files as they are now."""
    manifest = Manifest.read(folder)
    replace(manifest, files={name: record_of_file(folder / name) for name in manifest.files}).write(folder)
