"""A Llama's shape as the transformers library writes it, config.json, to titan's and back.

Version 5 of transformers writes rotary positions as one `rope_parameters`, version 4 as `rope_theta` and
`rope_scaling`. Both are read; version 4's is written, which both read. What titan's Llama does not compute is refused,
because a model with biases left out, or with other rotary positions, would load and be wrong in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from titan.checkpoint.hugging_face import CONFIG, read_json
from titan.checkpoint.weights import check_usable
from titan.config.initial_load import HUGGING_FACE_KEYS
from titan.config.schema import ModelConfig, RopeScalingConfig

ARCHITECTURE = "LlamaForCausalLM"
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What a config says of a tokenizer."""
_OPTIONAL_COUNTS = ("num_key_value_heads", "max_position_embeddings", "head_dim")
_ROPE_SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_seq_len",
}


def read_hugging_face_config(folder: Path, name: str | None = None) -> ModelConfig:
    """Return the shape that a folder's config.json describes.

    Args:
        folder: With config.json.
        name: What to call it; None takes the folder's name.

    Raises:
        CheckpointError: If it is not a Llama as titan computes it; names everything that is not so.
    """
    content = read_json(folder / CONFIG)
    check_usable(folder / CONFIG, _problems(content))
    heads = content["num_attention_heads"]
    theta, scaling = _rope(content)
    return ModelConfig(
        name=name or folder.resolve().name,
        n_kv_heads=content.get("num_key_value_heads") or heads,
        max_seq_len=content.get("max_position_embeddings", 2048),
        norm_eps=float(content.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=None
        if scaling is None
        else RopeScalingConfig(**{ours: scaling[theirs] for theirs, ours in _ROPE_SCALING_KEYS.items()}),
        tie_embeddings=bool(content.get("tie_word_embeddings", False)),
        **{ours: content[theirs] for theirs, ours in HUGGING_FACE_KEYS.items()},
    )


def to_hugging_face_config(config: ModelConfig, dtype: torch.dtype, tokens: dict[str, Any]) -> dict[str, Any]:
    """Return a shape as config.json has it.

    Args:
        config: The shape.
        dtype: The format of the weights.
        tokens: What is known of `TOKEN_KEYS`.
    """
    scaling = config.rope_scaling
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for theirs, ours in HUGGING_FACE_KEYS.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.dim // config.n_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for theirs, ours in _ROPE_SCALING_KEYS.items()}},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        # Without them transformers takes Llama 2's, under which no Llama 3 would ever end a text.
        **{key: tokens.get(key) for key in TOKEN_KEYS},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _problems(content: dict[str, Any]) -> Iterator[str]:
    architectures = content.get("architectures") or [ARCHITECTURE]
    if content.get("model_type") != "llama" or architectures != [ARCHITECTURE]:
        kind = f"model_type {content.get('model_type')}, architectures {architectures}"
        yield f"it describes {kind}, and titan computes model_type llama, {ARCHITECTURE}"
        return
    counts = [*HUGGING_FACE_KEYS, *(key for key in _OPTIONAL_COUNTS if content.get(key) is not None)]
    wrong = [key for key in counts if type(content.get(key)) is not int or content[key] < 1]
    wrong += [key for key in ("rms_norm_eps",) if not _is_positive(content.get(key, 1e-6))]
    yield from (f"{key} = {content.get(key)} is no positive number" for key in wrong)
    if wrong:
        return
    width, heads = content["hidden_size"], content["num_attention_heads"]
    kv_heads = content.get("num_key_value_heads") or heads
    if width % (2 * heads) or (content.get("head_dim") or width // heads) != width // heads:
        size = content.get("head_dim") or width / heads
        yield f"head_dim = {size:g} with hidden_size = {width} and {heads} heads: a head has hidden_size / heads"
    if heads % kv_heads:
        yield f"num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}"
    for key in ("attention_bias", "mlp_bias"):
        if content.get(key):
            yield f"{key} = true: titan's Llama has no biases"
    if content.get("hidden_act", "silu") != "silu":
        yield f"hidden_act = {content['hidden_act']}: titan's Llama computes silu"
    if content.get("quantization_config") is not None:
        yield "quantization_config is set: quantised weights are not read"
    yield from _rope_problems(content)


def _rope_problems(content: dict[str, Any]) -> Iterator[str]:
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(content.get(key), dict | None):
            yield f"{key} = {content[key]} is no object"
            return
    parameters = _rope_parameters(content)
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        yield f"rope_type = {kind}: titan computes default and llama3"
    needed = ["rope_theta", *(_ROPE_SCALING_KEYS if kind == "llama3" else ())]
    for key in needed:
        if not _is_positive(parameters.get(key)):
            yield f"{key} = {parameters.get(key)} of the rotary positions is no positive number"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor = {parameters['partial_rotary_factor']}: titan turns whole heads"


def _rope(content: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    parameters = _rope_parameters(content)
    return float(parameters["rope_theta"]), parameters if parameters.get("rope_type") == "llama3" else None


def _rope_parameters(content: dict[str, Any]) -> dict[str, Any]:
    """Return version 5's form of it, whichever version wrote it."""
    stored = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kind = stored.get("rope_type", stored.get("type", "default"))  # "type" until transformers 4.43
    return {"rope_theta": content.get("rope_theta", 10000.0), **stored, "rope_type": kind}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
