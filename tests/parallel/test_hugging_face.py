"""A Hugging Face folder fills a model on any mesh with just its values, each rank reading its own part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.reference.hugging_face import to_hugging_face_weights
from tests.support.foreign import save_hugging_face, shape
from titan.config.schema import ModelConfig
from titan.errors import CheckpointError
from titan.models.family import load_family
from titan.models.llama import Llama
from titan.parallel.apply import allocate, plain_parameters
from titan.parallel.mesh import build_mesh
from titan.trainer.hugging_face import load_hugging_face
from titan.trainer.model import build_model

from .layouts import layout_config
from .matrix import mesh
from .pool import RankPool

UNEVEN = ("model.dim=48", "model.n_heads=8", "model.n_kv_heads=2", "model.ffn_dim=90", "model.vocab_size=326")
"""Shards of several sizes, and query and key rows cut inside of heads."""
TIED = "model.tie_embeddings=true"


def load_on_mesh(world_size: int, overrides: tuple[str, ...], folder: Path) -> dict[str, Tensor]:
    """Build a layout as this rank, fill it, and return its whole parameters."""
    config = layout_config(world_size, overrides)

    def fill(model: Llama, family: object, seed: int, device: torch.device, shard_device: torch.device) -> None:
        allocate(model, device, shard_device)
        for _, parameter in plain_parameters(model):
            parameter.detach().fill_(float("nan"))
        assert load_hugging_face(plain_parameters(model), folder, config.model) == []

    family, device = load_family("llama"), torch.device("cpu")
    built = build_model(config, family, build_mesh(config.parallelism, "cpu"), device, fill)  # type: ignore[arg-type]
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in built.parameters
    }


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (4, mesh(dp_shard=2, tp=2)),
        (4, mesh(dp_shard=4)),
        (4, mesh(dp_replicate=2, tp=2)),
        (4, (*mesh(pp=2, dp_shard=2), TIED)),
    ],
)
def test_every_mesh_gets_the_values_of_the_files(
    pools: Callable[[int], RankPool], tmp_path: Path, world_size: int, overrides: tuple[str, ...]
) -> None:
    """To the bit, by the tests' own renaming and reordering of what the ranks have together."""
    overrides = (*UNEVEN, *overrides)
    config = layout_config(world_size, overrides).model
    save_hugging_face(tmp_path, config)
    loaded: dict[str, Tensor] = {}
    for part in pools(world_size).run(load_on_mesh, world_size, overrides, tmp_path):
        loaded |= part
    ours = to_hugging_face_weights(loaded, config)
    theirs = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def load_on_one(config: ModelConfig, folder: Path) -> list[str]:
    """Fill a model on this process alone."""
    parameters: list[tuple[str, nn.Parameter]] = list(Llama(config, 8).named_parameters())
    for _, parameter in parameters:
        parameter.detach().fill_(7.0)
    try:
        return load_hugging_face(parameters, folder, config)
    except CheckpointError:
        assert all(bool((parameter == 7.0).all()) for _, parameter in parameters)
        raise


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": 8}, "model.n_heads = 8, and it was saved with 6"),
        ({"n_layers": 2, "dim": 96}, r"model.dim = 96, and .* with 48\n  model.n_layers = 2, and .* with 3"),
        ({"tie_embeddings": True}, "model.tie_embeddings = True, and it was saved with False"),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, change: dict[str, int], words: str) -> None:
    """Even where all tensors fit, as with other numbers of heads; every difference is listed, and nothing filled."""
    save_hugging_face(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        load_on_one(shape(**change), tmp_path)


def test_other_rotary_positions_are_said(tmp_path: Path) -> None:
    """A run may stretch the context of what it starts from; the log says so."""
    save_hugging_face(tmp_path)
    (line,) = load_on_one(shape(rope_theta=500000.0), tmp_path)
    assert line == f"{tmp_path}: model.rope_theta = 500000.0, and it was saved with 10000.0"
