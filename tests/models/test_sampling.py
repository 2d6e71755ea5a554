"""How tokens are chosen, against the transformers library's processors of logits, and against the probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from titan.models.sampling import Sampling, draw, only_words, row_generators

SETTINGS = [
    Sampling(1.0),
    Sampling(0.3),
    Sampling(2.5, top_k=7),
    Sampling(1.0, top_k=1),
    Sampling(0.7, top_p=0.5),
    Sampling(1.3, top_k=40, top_p=0.9),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_k=10_000),
]


def some_logits(rows: int = 4, words: int = 97) -> Tensor:
    """Return logits of which some words are much likelier than others."""
    return 3 * torch.randn(rows, words, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_probabilities_are_those_of_transformers(sampling: Sampling) -> None:
    """The same tokens are left, with the same probabilities."""
    logits = some_logits()
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)  # type: ignore[arg-type]
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)  # type: ignore[arg-type]
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)  # type: ignore[arg-type]
    found = sampling.probabilities(logits)
    torch.testing.assert_close(found.float(), scores.softmax(-1), rtol=1e-5, atol=1e-7)
    assert torch.equal(found > 0, scores > -torch.inf)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=20, top_p=0.8)], ids=str)
def test_tokens_come_as_often_as_their_probability_says(sampling: Sampling) -> None:
    """Over numbers spread evenly from 0 to 1, each token's share is its probability, to one of them."""
    count, logits = 5000, some_logits(rows=1)
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = sampling.choose(logits.expand(count, -1), draws)
    found = torch.bincount(tokens, minlength=logits.shape[1]) / count
    assert float((found - sampling.probabilities(logits)[0]).abs().max()) <= 1 / count


def test_the_ends_of_the_draw_are_tokens_of_some_probability() -> None:
    """0 and the largest number below 1 give the first and the last token that can come, and none beyond."""
    logits = torch.full((2, 6), -torch.inf)
    logits[:, 2:4] = torch.tensor([0.1, 0.2])
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert Sampling(1.0).choose(logits, draws).tolist() == [2, 3]


def test_temperature_zero_takes_the_likeliest() -> None:
    """Whatever is drawn."""
    logits = some_logits()
    assert torch.equal(Sampling().choose(logits, torch.rand(4, dtype=torch.float64)), logits.argmax(-1))


def test_a_seed_gives_the_same_numbers_and_rows_have_their_own() -> None:
    """What a row draws follows from its seed and name, not from the rows beside it, and moves no other generator."""
    before = torch.get_rng_state()
    several, alone = row_generators(5, [0, 1, 2]), row_generators(5, [1])
    first = [draw(several) for _ in range(3)]
    assert torch.equal(torch.stack(first)[:, 1:2], torch.stack([draw(alone) for _ in range(3)]))
    assert len(set(torch.stack(first).flatten().tolist())) == 9
    assert draw(row_generators(6, [1])) != first[0][1]
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_of_the_embedding_without_a_token_never_come() -> None:
    """A vocabulary that is filled up has rows that no tokenizer decodes."""
    logits = some_logits(words=10)
    logits[:, 8:] = 100.0
    assert int(Sampling().choose(only_words(logits, 8), torch.zeros(4)).max()) < 8
    assert torch.equal(only_words(logits, 10), logits)
