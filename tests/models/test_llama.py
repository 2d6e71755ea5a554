"""The model equals the transformers library's, for every flavor, and keeps the habits that parallelism builds on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.models.flavors import (
    FLAVORS,
    ORIGINAL_SEQ_LEN,
    PARAMETERS,
    build_model,
    count,
    flavor,
    random_tokens,
    shrink,
)
from tests.reference.hugging_face import build_hugging_face, to_hugging_face_weights
from titan.models.flops import count_parameters
from titan.models.llama import Llama

SEQ_LEN = 3 * ORIGINAL_SEQ_LEN


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest absolute difference."""
    return (a - b).abs().max().item()


def test_every_published_flavor_is_a_config_and_every_config_is_counted() -> None:
    """The flavors in conf/ are those whose sizes are published, and the debug model."""
    assert set(FLAVORS) == {*PARAMETERS, "llama3_debug"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    """The formula and the module built on meta both have the published number of parameters."""
    config = flavor(name)
    with torch.device("meta"):
        model = Llama(config, seq_len=8)
    assert count_parameters(config) == PARAMETERS[name]
    assert count(model) == PARAMETERS[name]


def test_the_debug_model_is_counted_right_too() -> None:
    """The formula agrees with the module for untied and tied embeddings at a small size."""
    for tied in (False, True):
        config = replace(flavor("llama3_debug"), tie_embeddings=tied)
        assert count_parameters(config) == count(Llama(config, 8))


@pytest.mark.parametrize("name", FLAVORS)
def test_logits_and_gradients_equal_those_of_transformers(name: str) -> None:
    """With the same weights, logits agree within 1e-5 in float32, beyond the original context too; so do gradients."""
    config = shrink(flavor(name))
    model = build_model(config, SEQ_LEN)
    reference = build_hugging_face(model.state_dict(), config)
    tokens = random_tokens(config, 2, SEQ_LEN)

    ours, theirs = model(tokens), reference(tokens).logits
    assert theirs.std() > 0.5, "logits near zero would agree whatever the model did"
    assert largest_difference(ours, theirs) < 1e-5

    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in to_hugging_face_weights(gradients, config).items():
        expected = reference.get_parameter(name).grad
        assert largest_difference(gradient, expected) < 1e-5 * max(1.0, expected.abs().max().item()), name


@pytest.mark.parametrize("name", ["llama3_1_8b", "llama3_2_1b"])
def test_the_scaling_of_the_frequencies_is_seen_in_the_logits(name: str) -> None:
    """Without it the logits differ far more than the tolerance, so the comparison would notice its absence."""
    config = shrink(flavor(name))
    model = build_model(config, SEQ_LEN)
    unscaled = build_model(replace(config, rope_scaling=None), SEQ_LEN)
    tokens = random_tokens(config, 1, SEQ_LEN)
    assert largest_difference(model(tokens), unscaled(tokens)) > 1e-2


def test_a_position_does_not_see_what_follows() -> None:
    """Changing a token changes the logits from there on and none before."""
    config = shrink(flavor("llama3_1_8b"))
    model = build_model(config, 32)
    tokens = random_tokens(config, 1, 32)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % config.vocab_size
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:20].max() < 1e-6
    assert difference[20:].min() > 1e-4


def at(model: Llama, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the logits of tokens that stand at these positions."""
    model.positions = positions
    try:
        return model(tokens)
    finally:
        model.positions = None


def test_explicit_positions_equal_counting() -> None:
    """Positions 0, 1, 2, ... give what no positions give, for one row or for each row."""
    config = shrink(flavor("llama3_2_3b"))
    model = build_model(config, 48)
    tokens = random_tokens(config, 2, 32)
    expected = model(tokens)
    counted = torch.arange(32)
    assert torch.equal(at(model, tokens, counted), expected)
    assert largest_difference(at(model, tokens, counted.expand(2, -1)), expected) < 1e-6


def test_rows_may_have_positions_of_their_own() -> None:
    """Each row of a batch gets what it gets alone at its positions."""
    config = shrink(flavor("llama3_1_8b"))
    model = build_model(config, 64)
    tokens = random_tokens(config, 2, 24)
    positions = torch.stack((torch.arange(24), torch.cat((torch.arange(14), torch.arange(40, 50)))))
    together = at(model, tokens, positions)
    for row in range(2):
        alone = at(model, tokens[row : row + 1], positions[row])
        assert largest_difference(together[row : row + 1], alone) < 1e-5
    assert largest_difference(together[1], model(tokens[1:])[0]) > 1e-3


def test_only_distances_between_positions_count() -> None:
    """Shifting all positions alike leaves the logits where they are: the embedding is a relative one."""
    config = shrink(flavor("llama2_7b"))
    model = build_model(config, 200)
    tokens = random_tokens(config, 1, 32)
    assert largest_difference(at(model, tokens, torch.arange(150, 182)), model(tokens)) < 1e-4


def test_a_document_gets_what_it_gets_alone() -> None:
    """With documents told apart, each one's logits are those of a row that holds it alone."""
    config = shrink(flavor("llama3_1_8b"))
    model = build_model(config, 48)
    tokens = random_tokens(config, 2, 40)
    ends = ((0, 7, 8, 25, 40), (0, 13, 40))
    starts = torch.stack([torch.cat([torch.full((b - a,), a) for a, b in itertools.pairwise(row)]) for row in ends])
    together = model(tokens, starts)
    for row, cuts in enumerate(ends):
        for a, b in itertools.pairwise(cuts):
            alone = model(tokens[row : row + 1, a:b])
            assert largest_difference(together[row : row + 1, a:b], alone) < 1e-5
    assert largest_difference(together, model(tokens)) > 1e-3, "the documents had nothing to see anyway"


@pytest.mark.parametrize("name", ["llama3_debug", "llama3_2_1b"])
def test_the_model_cut_into_stages_is_the_model(name: str) -> None:
    """Stages without embedding, norm or output, and with some of the blocks, give the same logits one after another."""
    config = shrink(flavor(name))
    model = build_model(config, 32)
    tokens = random_tokens(config, 2, 32)
    x: torch.Tensor = tokens
    for blocks, is_first, is_last in ((("0",), True, False), (("1",), False, False), (("2",), False, True)):
        stage = build_model(config, 32)
        for index in set(stage.layers) - set(blocks):
            del stage.layers[index]
        if not is_first:
            stage.tok_embeddings = None
        if not is_last:
            stage.norm = stage.output = None
        assert set(stage.state_dict()) <= set(model.state_dict())
        x = stage(x)
    assert torch.equal(x, model(tokens))


def test_tied_weights_are_one_parameter() -> None:
    """A tied model has one parameter for both ends, also after it was moved off meta, and both ends train it."""
    config = shrink(flavor("llama3_2_1b"))
    with torch.device("meta"):
        model = Llama(config, 16)
    model.to_empty(device="cpu")
    model.tie_weights()
    assert model.output is not None
    assert model.tok_embeddings is not None
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())


def test_the_rotary_angles_are_not_saved() -> None:
    """The state holds parameters only: angles follow from the config."""
    config = shrink(flavor("llama3_debug"))
    model = build_model(config, 16)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
