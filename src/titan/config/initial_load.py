"""What a run begins from is there, and of the model's shape as far as the small files beside the weights say.

The ranks look at the tensors themselves (`titan.trainer.resume`); this is what can be known before there are any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from titan.config.keys import override
from titan.config.schema import CheckpointContent, TitanConfig
from titan.errors import Problem

SHAPE_KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "tie_embeddings")
"""What weights of one shape and another differ in. Not all of it shows in the shapes of the tensors."""
HUGGING_FACE_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "ffn_dim",
    "vocab_size": "vocab_size",
}
"""What config.json of the transformers library calls the counts that it always has."""
_OF_WORDS = ("model.tok_embeddings.weight", "model.output.weight")


def fits_any(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a tensor's name fits one of the patterns of `checkpoint.exclude`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def excused_keys(exclude: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of the shape that may differ: words may be others where what has a row for each is left out."""
    is_left_out = any(fits_any(name, exclude) for name in _OF_WORDS)
    return ("vocab_size", "tie_embeddings") if is_left_out else ()


def check_initial_load(config: TitanConfig) -> Iterator[Problem]:
    """What a run begins from is there and fits, and nothing is said of it where there is nothing."""
    settings = config.checkpoint
    if settings.initial_load is None:
        if settings.exclude or settings.initial_content is CheckpointContent.all:
            key = "exclude" if settings.exclude else "initial_content"
            yield Problem(
                f"checkpoint.{key} is set, but there is no checkpoint.initial_load that it is about",
                suggestion="checkpoint.initial_load=<run.dir>/checkpoints/step_00000100",
            )
        return
    folder = Path(settings.initial_load)
    if not folder.is_dir():
        yield Problem(
            f"checkpoint.initial_load = {settings.initial_load} is not a folder",
            suggestion="checkpoint.initial_load=<run.dir>/checkpoints/step_00000100",
        )
        return
    if not ((folder / ".metadata").is_file() or any(folder.glob("*.safetensors"))):
        newest = max(folder.glob("**/step_*/.metadata"), default=folder / "checkpoints" / "step_00000100" / ".metadata")
        yield Problem(
            f"checkpoint.initial_load = {settings.initial_load} is neither a checkpoint nor a Hugging Face folder",
            "It has no .metadata and no *.safetensors.",
            f"checkpoint.initial_load={newest.parent}",
        )
        return
    if not (folder / ".metadata").is_file() and settings.initial_content is CheckpointContent.all:
        yield Problem(
            f"checkpoint.initial_content = all, but {settings.initial_load} is a Hugging Face folder",
            "It holds weights alone.",
            "checkpoint.initial_content=weights",
        )
    yield from _check_shape(config, folder)


def _check_shape(config: TitanConfig, folder: Path) -> Iterator[Problem]:
    stored, excused = _stored_shape(folder), excused_keys(config.checkpoint.exclude)
    different = [
        key for key in SHAPE_KEYS if key in stored and key not in excused and stored[key] != getattr(config.model, key)
    ]
    if not different:
        return
    suggestion = " ".join(override(f"model.{key}", stored[key]) for key in different)
    if different == ["vocab_size"]:
        suggestion += f"   or  checkpoint.exclude=[{','.join(_OF_WORDS)}]   for words of another tokenizer"
    yield Problem(
        f"checkpoint.initial_load = {config.checkpoint.initial_load} holds weights of another shape than the model's",
        "\n".join(
            f"model.{key} = {getattr(config.model, key)}, and it was saved with {stored[key]}" for key in different
        ),
        suggestion,
    )


def _stored_shape(folder: Path) -> dict[str, Any]:
    """Return the shape that a folder's own files tell; of what cannot be read the ranks say what is wrong."""
    try:
        if (folder / "config.json").is_file():
            content = json.loads((folder / "config.json").read_bytes())
            if content.get("model_type") != "llama":
                return {}
            found = {ours: content.get(theirs) for theirs, ours in HUGGING_FACE_KEYS.items()}
            found["n_kv_heads"] = content.get("num_key_value_heads") or found["n_heads"]
            found["tie_embeddings"] = bool(content.get("tie_word_embeddings", False))
        else:
            found = yaml.safe_load((folder / "config.yaml").read_text())["model"]
        return {key: value for key, value in found.items() if isinstance(value, int)}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError):
        return {}
