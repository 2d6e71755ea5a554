"""Weights of a Hugging Face folder, straight into a model on a mesh: each rank reads the rows and columns it holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from titan.checkpoint.hugging_face import HuggingFaceWeights
from titan.checkpoint.hugging_face_config import read_hugging_face_config
from titan.checkpoint.weights import Weights, check_usable
from titan.config.initial_load import SHAPE_KEYS
from titan.config.schema import ModelConfig
from titan.models.family import load_family
from titan.parallel.apply import local_indices

_FUNCTION_KEYS = ("norm_eps", "rope_theta", "rope_scaling")


def load_hugging_face(
    parameters: list[tuple[str, nn.Parameter]], folder: Path, config: ModelConfig, excused: Collection[str] = ()
) -> list[str]:
    """Fill this rank's share of a model, on any mesh; no rank waits for another.

    Values are converted to the format of the parameters.

    Args:
        parameters: This rank's, by their names in the bare model.
        folder: The Hugging Face folder.
        config: The shape of the model that is trained.
        excused: Keys of the shape that may differ, because `parameters` leaves out what they are about.

    Returns:
        What else differs from the folder's config.json, as lines for the log: a run may mean to stretch its context.

    Raises:
        CheckpointError: If the folder is not whole, or is of another shape; nothing is filled then.
    """
    stored = read_hugging_face_config(folder)
    lines = compare_models(config, stored, folder, excused)
    weights = HuggingFaceWeights(folder, stored, load_family("llama"))
    infos = weights.infos()
    check_usable(folder, [f"it has no {name}" for name, _ in parameters if name not in infos])
    fill(parameters, weights)
    return lines


def fill(parameters: Iterable[tuple[str, nn.Parameter]], weights: Weights) -> None:
    """Fill this rank's share of a model with weights of any format that are known to fit."""
    with torch.no_grad():
        for name, parameter in parameters:
            _fill(name, parameter, weights)


def compare_models(config: ModelConfig, stored: ModelConfig, folder: Path, excused: Collection[str] = ()) -> list[str]:
    """Hold the model that is trained against the one that weights were saved from.

    Args:
        config: The shape of the model that is trained.
        stored: That of the weights.
        folder: Theirs, for the messages.
        excused: Keys of the shape that may differ, because what they are about is not taken.

    Returns:
        What differs besides the shape, as lines for the log: a run may mean to stretch its context.

    Raises:
        CheckpointError: If the shape differs.
    """
    keys = [key for key in SHAPE_KEYS if key not in excused]
    check_usable(folder, [f"model.{line}" for line in _different(config, stored, keys)])
    return [f"{folder}: model.{line}" for line in _different(config, stored, _FUNCTION_KEYS)]


def _different(config: ModelConfig, stored: ModelConfig, keys: Sequence[str]) -> list[str]:
    ours, theirs = asdict(config), asdict(stored)
    return [f"{key} = {ours[key]}, and it was saved with {theirs[key]}" for key in keys if ours[key] != theirs[key]]


def _fill(name: str, parameter: nn.Parameter, weights: Weights) -> None:
    rows, columns = local_indices(parameter)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(weights.read(name, rows, columns).view(local.shape))
