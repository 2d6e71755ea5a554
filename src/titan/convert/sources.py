"""What a path holds: a titan checkpoint, a Hugging Face folder, Meta's folder or a file of torch.save, opened alike.

Nothing that a path holds is ever executed: safetensors and JSON are data, pickles are read with `weights_only` or a
list of allowed names, and the module that a config names as the model's family is not imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan.api.finding import describe_missing
from titan.checkpoint.hugging_face import CONFIG, HuggingFaceWeights, is_hugging_face
from titan.checkpoint.hugging_face_config import read_hugging_face_config
from titan.checkpoint.manifest import NAME, Damaged, Manifest, committed_steps, step_folder
from titan.checkpoint.meta import is_meta, open_meta
from titan.checkpoint.torch_file import TorchFile
from titan.checkpoint.weights import SavedTensors, Weights, check_usable, expect_shapes
from titan.config.load import load_model
from titan.config.schema import ModelConfig
from titan.errors import CheckpointError, ConfigError
from titan.models.family import BUILT_IN, load_family
from titan.run_directory import RunDirectory

TITAN, HUGGING_FACE, META, TORCH = "titan checkpoint", "Hugging Face folder", "Meta folder", "torch file"
_EXPECTED = (
    "It is none of: a titan checkpoint (manifest.json), a run directory (checkpoints/), a Hugging Face folder "
    "(config.json),\n  Meta's Llama folder (params.json), a file of torch.save"
)


@dataclass(frozen=True)
class Source:
    """Weights in one of the formats, opened."""

    kind: str
    path: Path
    weights: Weights
    config: ModelConfig | None
    """The model's shape; None where the format does not say."""
    optimizer: Weights | None = None
    """The optimizer's state, by `parameter.key`; None where there is none."""
    step: int = 0
    tokens: int = 0
    manifest: Manifest | None = None
    """Of a titan checkpoint."""
    notes: list[str] = field(default_factory=list)
    """What was assumed."""

    @property
    def content(self) -> str:
        """What there is, as a manifest says it: all or weights."""
        return "all" if self.optimizer is not None else "weights"


def open_source(path: Path) -> Source:
    """Return what a path holds.

    Raises:
        CheckpointError: If it is not there, is of no known format, or is not whole.
    """
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        if not _may_be_on_hub(path):
            raise CheckpointError(
                describe_missing(path.absolute(), "a run directory, a checkpoint of one, or a Hugging Face folder")
            )
        hint = f"hf download {path} --local-dir FOLDER   if it is the name of a model on the Hugging Face Hub"
        raise CheckpointError(f"{path} is not there\n  Try  {hint}")
    if (path / NAME).is_file():
        return open_checkpoint(path)
    if is_hugging_face(path):
        return _open_hugging_face(path)
    if is_meta(path):
        return _open_meta(path)
    if RunDirectory(path).checkpoints.is_dir():
        return open_checkpoint(newest_checkpoint(path))
    raise CheckpointError(f"{path} cannot be used\n  {_EXPECTED}")


def _may_be_on_hub(path: Path) -> bool:
    """Whether a path that is not there reads like the name of a model, and not like one of a folder here."""
    is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)) is not None
    return is_name and path.parts[0] != "runs" and not path.parent.exists()


def newest_checkpoint(run: Path) -> Path:
    """Return the folder of a run's newest checkpoint.

    Raises:
        CheckpointError: If there is none.
    """
    folder = RunDirectory(run).checkpoints
    steps = committed_steps(folder)
    if not steps:
        raise CheckpointError(f"{run} cannot be used: {folder} has no checkpoint")
    return step_folder(folder, steps[-1])


def open_checkpoint(folder: Path) -> Source:
    """Return a titan checkpoint.

    Raises:
        CheckpointError: If it is not whole; checksums are not looked at.
    """
    manifest = read_manifest(folder)
    check_usable(folder, manifest.damage(folder, checksums=False))
    try:
        config = load_model(folder / "config.yaml")
    except ConfigError as error:
        raise CheckpointError("\n  ".join(problem.what for problem in error.problems)) from error
    weights, optimizer = SavedTensors(folder), SavedTensors(folder, "optimizer.")
    if config.family in BUILT_IN:
        shapes = load_family(config.family).parameter_shapes(config)
        check_usable(folder, expect_shapes(weights.infos(), shapes, {name: name for name in shapes}))
    return Source(
        TITAN,
        folder,
        weights,
        config,
        optimizer if optimizer.infos() else None,
        manifest.step,
        manifest.tokens,
        manifest,
    )


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: If it has none that can be read.
    """
    try:
        return Manifest.read(folder)
    except Damaged as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from error
    except (OSError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / NAME} cannot be read: {error}") from error


def family_of(config: ModelConfig) -> Any:
    """Return the description of a model's family.

    Raises:
        CheckpointError: If it is not one of titan's own.
    """
    if config.family not in BUILT_IN:
        raise CheckpointError(
            f"model.family = {config.family}: other formats know titan's own families only: {', '.join(BUILT_IN)}\n"
            "  And code that a checkpoint names is not imported."
        )
    return load_family(config.family)


def _open_hugging_face(folder: Path) -> Source:
    config = read_hugging_face_config(folder)
    return Source(HUGGING_FACE, folder, HuggingFaceWeights(folder, config, family_of(config)), config)


def _open_meta(folder: Path) -> Source:
    config, weights, notes = open_meta(folder, family_of(ModelConfig()))
    return Source(META, folder, weights, config, notes=notes)


def _open_file(path: Path) -> Source:
    if path.suffix in (".safetensors", ".json"):
        raise CheckpointError(f"{path} is one file of a folder\n  Try  {path.parent}   (with its {CONFIG})")
    file = TorchFile(path)
    return Source(TORCH, path, file.model, file.config, file.optimizer, file.step, file.tokens)
