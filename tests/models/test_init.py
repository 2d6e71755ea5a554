"""Initial weights are a function of (seed, name), of nothing else, and have the distributions that they should."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.models.flavors import flavor
from titan.config.schema import ModelConfig
from titan.models import init
from titan.models.init import draw_rows, parameter_draw
from titan.models.llama import Llama

WIDE = replace(flavor("llama3_debug"), dim=512, ffn_dim=1024)


def draw(name: str, *shape: int, rows: range | None = None, seed: int = 0, config: ModelConfig = WIDE) -> Tensor:
    """Return rows of a parameter; all of them where none are named."""
    return draw_rows(
        name, torch.Size(shape), range(shape[0]) if rows is None else rows, seed, parameter_draw(name, config)
    )


@pytest.mark.parametrize("block_numbers", [1, 7 * 3, 100, 1 << 20])
@pytest.mark.parametrize("shape", [(37, 3), (64, 7), (1, 5)])
def test_rows_drawn_apart_are_the_rows_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, block_numbers: int, shape: tuple[int, int]
) -> None:
    """Any range of rows, across any block boundary, has the bits that the whole has."""
    monkeypatch.setattr(init, "BLOCK_NUMBERS", block_numbers)
    whole = draw("layers.0.attention.wq.weight", *shape)
    for start in range(shape[0]):
        for stop in range(start, shape[0] + 1):
            assert torch.equal(draw("layers.0.attention.wq.weight", *shape, rows=range(start, stop)), whole[start:stop])


def test_a_parameter_of_several_blocks_is_drawn_the_same_in_parts() -> None:
    """At the real size of a block, shards that cut blocks in two join to the whole."""
    name, shape = "output.weight", (5001, 512)
    assert shape[0] * shape[1] > 2 * init.BLOCK_NUMBERS
    whole = draw(name, *shape)
    cuts = [0, 1, 1667, 2047, 2048, 2049, 4000, 5001]
    parts = [draw(name, *shape, rows=range(a, b)) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    blocks = whole.split(2048)
    assert not torch.equal(blocks[0][:900], blocks[1][:900]), "blocks must not repeat each other"


def test_seed_and_name_decide_and_nothing_else_does() -> None:
    """The same seed and name give the same bits again, whatever was drawn before; another of either gives others."""
    name = "layers.1.attention.wq.weight"
    first = draw(name, 16, 512)
    torch.manual_seed(1234)
    torch.rand(100)
    assert torch.equal(draw(name, 16, 512), first)
    for other in (draw(name, 16, 512, seed=1), draw("layers.2.attention.wq.weight", 16, 512)):
        assert not torch.equal(other, first)
        assert abs(torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1]) < 0.05


def test_drawing_leaves_the_global_generator_alone() -> None:
    """Initialisation uses no random number of anyone else's."""
    before = torch.get_rng_state()
    draw("output.weight", 64, 512)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("layers.0.attention.wq.weight", 0.02),
        ("layers.3.attention.wk.weight", 0.02),
        ("layers.3.attention.wv.weight", 0.02),
        ("layers.3.feed_forward.w1.weight", 0.02),
        ("layers.0.attention.wo.weight", 0.02 / math.sqrt(2)),
        ("layers.3.attention.wo.weight", 0.02 / math.sqrt(8)),
        ("layers.3.feed_forward.w2.weight", 0.02 / math.sqrt(8)),
        ("layers.7.feed_forward.w3.weight", 0.02 / math.sqrt(16)),
        ("output.weight", 512**-0.5),
    ],
)
def test_matrices_are_normal_cut_at_three_deviations(name: str, std: float) -> None:
    """The deviation falls with the depth where it should, the mean is 0, and nothing lies beyond three deviations."""
    values = draw(name, 512, 512)
    # The deviation of a normal distribution cut at three of its own.
    tail = 3 * math.exp(-4.5) / math.sqrt(2 * math.pi) * 2 / math.erf(3 / math.sqrt(2))
    assert values.std().item() == pytest.approx(std * math.sqrt(1 - tail), rel=0.01)
    assert values.abs().max() <= 3 * std * (1 + 1e-6)
    assert values.abs().max() > 2.9 * std
    assert abs(values.mean().item()) < 5 * std / 512


def test_an_embedding_is_standard_normal_unless_it_is_also_the_output() -> None:
    """Tied weights are drawn as an output projection, or the first logits would be of the order of sqrt(dim)."""
    untied = draw("tok_embeddings.weight", 512, 512)
    tied = draw("tok_embeddings.weight", 512, 512, config=replace(WIDE, tie_embeddings=True))
    assert untied.std().item() == pytest.approx(1, rel=0.01)
    assert untied.abs().max() > 3.5, "not cut"
    assert tied.std().item() == pytest.approx(0.9866 * 512**-0.5, rel=0.01)


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.attention_norm.weight", "layers.5.ffn_norm.weight"])
def test_norms_start_at_one(name: str) -> None:
    """A norm's scale is ones, in any range."""
    assert parameter_draw(name, WIDE) is None
    assert torch.equal(draw(name, 512, rows=range(3, 9)), torch.ones(6))


@pytest.mark.parametrize(
    "config",
    [
        flavor("llama3_debug"),
        # As wide as a tied model has to be: its own token's logit is sqrt(dim) times the embedding's share of the last
        # hidden state, which is small only where the blocks' outputs are large beside it.
        replace(flavor("llama3_2_1b"), dim=1024, ffn_dim=4096, n_layers=2, n_heads=16, n_kv_heads=4, vocab_size=512),
    ],
    ids=["untied", "tied"],
)
def test_a_fresh_model_knows_nothing(config: ModelConfig) -> None:
    """With every parameter drawn, the first loss is near ln(vocabulary) and no parameter is left empty."""
    model = Llama(config, 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("nan"))
            parameter.copy_(
                draw_rows(name, parameter.shape, range(parameter.shape[0]), 0, parameter_draw(name, config))
            )
    model.init_buffers("cpu")
    tokens = torch.randint(config.vocab_size, (8, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    # Logits of variance near 1 add about half a nat.
    assert math.log(config.vocab_size) - 0.1 < loss.item() < math.log(config.vocab_size) + 0.9
