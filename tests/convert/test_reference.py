"""The small Llama that titan's is held against is transformers', and Meta's; and the comparison sees what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.hugging_face import build_hugging_face, to_hugging_face_config, to_hugging_face_weights
from tests.support.foreign import META, SCALING, random_weights, shape
from titan.checkpoint.hugging_face_config import to_hugging_face_config as to_old_config
from titan.checkpoint.torch_file import MappedTensors
from titan.config.schema import ModelConfig
from titan.convert.agreement import Agreement, Forward, TitanForward, compare, sample_positions
from titan.convert.reference import Reference, hugging_face_reference, meta_reference
from titan.models.llama import LLAMA

SHAPES = {
    "plain": shape(),
    "tied": shape(tie_embeddings=True),
    "scaled": shape(rope_scaling=SCALING),
    "one kv head": shape(n_kv_heads=1),
    "wide vocabulary": shape(vocab_size=20_000),
}
POSITIONS = torch.arange(24)


def run(model: Forward, n_layers: int) -> Tensor:
    """Return logits of some tokens."""
    x = model.embed(TOKENS)
    for index in range(n_layers):
        x = model.block(index, x)
    return model.logits(x)


TOKENS = torch.arange(24).unsqueeze(0) * 11 % 70


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("version", [4, 5])
def test_it_computes_what_transformers_computes(name: str, version: int) -> None:
    """From its tensors and its config, as either version writes it."""
    config = SHAPES[name]
    weights = random_weights(config)
    theirs = build_hugging_face(weights, config)
    content = to_hugging_face_config(config).to_dict() if version == 5 else to_old_config(config, torch.float32, {})
    assert ("rope_parameters" in content) == (version == 5)
    ours = hugging_face_reference(content, to_hugging_face_weights(weights, config).__getitem__, POSITIONS)
    with torch.no_grad():
        torch.testing.assert_close(run(ours, 3), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_metas_convention_is_the_same_model(scaled: bool) -> None:
    """Neighbours turned as complex numbers, in Meta's order of rows, is what transformers computes from the other."""
    scaling = replace(SCALING, factor=32.0, original_seq_len=8192) if scaled else None
    config = replace(META, rope_scaling=scaling, max_seq_len=131072)
    weights = random_weights(config)
    params = {"dim": 64, "n_heads": 8, "n_kv_heads": 2, "norm_eps": 1e-5, "use_scaled_rope": scaled}
    ours = meta_reference(params, weights.__getitem__, POSITIONS, 32.0, is_tied=False)
    with torch.no_grad():
        theirs = build_hugging_face(weights, config)(TOKENS).logits
        torch.testing.assert_close(run(ours, 2), theirs, rtol=1e-5, atol=1e-5)


def both(config: ModelConfig, weights: dict[str, Tensor], **content: Any) -> tuple[TitanForward, Reference]:
    """Return titan's model and transformers' of the same weights, whose config may say something else."""
    positions = sample_positions(config)
    theirs = to_hugging_face_weights(weights, config)
    written = {**to_old_config(config, torch.float32, {}), **content}
    ours = TitanForward(MappedTensors(weights), config, LLAMA, positions)
    return ours, hugging_face_reference(written, theirs.__getitem__, positions)


@pytest.mark.parametrize("name", SHAPES)
def test_titan_agrees(name: str) -> None:
    """To rounding, at positions near and far."""
    config = SHAPES[name]
    ours, theirs = both(config, random_weights(config))
    found = compare(ours, theirs, config)
    assert found.departs == ""
    assert (
        found.difference < 4e-6
    )  # in float32, over three blocks: 2e-6, a little more or less by the processor's kernels


@pytest.mark.parametrize(
    ("content", "departs"),
    [
        ({"rope_theta": 11000.0}, "layers.0"),
        ({"rope_scaling": None}, "layers.0"),
        ({"rms_norm_eps": 1e-3}, "layers.0"),
        ({"num_key_value_heads": 1, "num_attention_heads": 3}, "layers.0"),
    ],
)
def test_another_config_departs(content: dict[str, Any], departs: str) -> None:
    """What no tensor shows: other positions, another epsilon, other heads."""
    config = SHAPES["scaled"]
    found = compare(*both(config, random_weights(config), **content), config)
    assert found.departs == departs
    assert found.difference > 1e-4


@pytest.mark.parametrize(
    ("name", "departs"),
    [
        ("tok_embeddings.weight", "the embedding"),
        ("layers.0.attention.wq.weight", "layers.0"),
        ("layers.1.attention_norm.weight", "layers.1"),
        ("layers.2.feed_forward.w2.weight", "layers.2"),
        ("norm.weight", "the last norm or the output"),
        ("output.weight", "the last norm or the output"),
    ],
)
def test_another_weight_departs_where_it_is(name: str, departs: str) -> None:
    """A tenth of one percent in one tensor is found, and the first part that has it is named."""
    config = SHAPES["plain"]
    ours, theirs = both(config, random_weights(config))
    wrong = random_weights(config)
    wrong[name] = wrong[name] * 1.001
    ours.weights = MappedTensors(wrong)
    assert compare(ours, theirs, config).departs == departs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_departs(value: float) -> None:
    """Also where both sides have it: nothing can be said of such a model."""
    config = SHAPES["plain"]
    weights = random_weights(config)
    weights["layers.1.feed_forward.w1.weight"][3, 4] = value
    assert compare(*both(config, weights), config) == Agreement(float("inf"), "layers.1")


def test_positions_are_near_and_far() -> None:
    """And never beyond what the model was made for."""
    assert sample_positions(shape(max_seq_len=131072)).tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert sample_positions(shape(max_seq_len=5)).tolist() == [0, 1, 2, 4]
