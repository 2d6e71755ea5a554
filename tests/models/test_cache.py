"""A model that keeps keys and values says what it says without them, and what the transformers library says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.reference.hugging_face import build_hugging_face
from titan.config.schema import ModelConfig
from titan.models.cache import CachedModel

from .flavors import build_model, flavor, random_tokens, shrink

NEW_TOKENS = 12
LENGTHS = (150, 1, 37, 150)
"""Longer than what the rotary scaling starts from, the shortest there is, and two alike."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A token at a time is too little work for several threads, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cached(config: ModelConfig, seq_len: int) -> CachedModel:
    """Return a model with weights that keeps keys and values."""
    return CachedModel(build_model(config, seq_len).requires_grad_(False))


def prompts_of(config: ModelConfig) -> list[list[int]]:
    """Return prompts of different lengths."""
    tokens = random_tokens(config, len(LENGTHS), max(LENGTHS)).tolist()
    return [row[:length] for row, length in zip(tokens, LENGTHS, strict=True)]


def greedy(model: CachedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Return what comes behind prompts, the likeliest each time."""
    chosen = [model.begin(prompts, max(map(len, prompts)) + NEW_TOKENS).argmax(-1)]
    for _ in range(NEW_TOKENS - 1):
        chosen.append(model.go_on(chosen[-1]).argmax(-1))
    return torch.stack(chosen, 1).tolist()


@pytest.mark.parametrize("name", ["llama3_1_8b", "llama3_2_1b", "llama2_7b"])
def test_it_says_what_transformers_generates(name: str) -> None:
    """Grouped queries and not, scaled rotary positions, tied embeddings; alone, and together with other lengths."""
    config = shrink(flavor(name))
    prompts, model = prompts_of(config), cached(config, max(LENGTHS) + NEW_TOKENS)
    theirs = build_hugging_face(dict(model.model.named_parameters()), config).eval()
    theirs.generation_config.eos_token_id = None
    longest = max(LENGTHS)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0
    )[:, longest:].tolist()
    assert greedy(model, prompts) == expected
    assert greedy(model, prompts[1:2]) == expected[1:2], "alone, and after other rows"
    assert len({token for row in expected for token in row}) > NEW_TOKENS, "it says something"


@pytest.mark.parametrize("name", ["llama3_1_8b", "llama2_7b"])
def test_cached_logits_are_the_uncached(name: str) -> None:
    """At every token, of rows of different lengths, those of one pass over the whole row."""
    config = shrink(flavor(name))
    prompts, model = prompts_of(config), cached(config, max(LENGTHS) + NEW_TOKENS)
    bare = build_model(config, max(LENGTHS) + NEW_TOKENS).requires_grad_(False)
    logits = model.begin(prompts, max(LENGTHS) + NEW_TOKENS)
    for _ in range(3):
        for row, found in zip(prompts, logits, strict=True):
            torch.testing.assert_close(found, bare(torch.tensor([row]))[0, -1], rtol=1e-4, atol=1e-4)
        chosen = logits.argmax(-1)
        prompts = [[*row, token] for row, token in zip(prompts, chosen.tolist(), strict=True)]
        logits = model.go_on(chosen)


def test_what_fills_up_a_row_is_not_seen() -> None:
    """Neither its tokens nor what becomes of them: with another embedding for all of it nothing changes."""
    config = replace(shrink(flavor("llama3_1_8b")), tie_embeddings=False)
    model = cached(config, 64)
    prompts = [[5, 6, 7], list(range(20, 60))]
    expected = greedy(model, prompts)
    assert model.model.tok_embeddings is not None
    with torch.no_grad():
        model.model.tok_embeddings.weight[0] = 1e4  # type: ignore[index]
    assert greedy(model, prompts) == expected


def test_only_kv_heads_are_kept() -> None:
    """The memory is that of the kv heads, and of the rows that there are."""
    config = shrink(flavor("llama3_1_8b"))
    model = cached(config, 64)
    model.begin([[1, 2], [3]], 40)
    kept = [each._keys for each in model._kept] + [each._values for each in model._kept]
    assert {tuple(each.shape) for each in kept} == {(2, config.n_kv_heads, 40, 16)}
    assert len(kept) == 2 * config.n_layers
