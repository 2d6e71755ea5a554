"""Samples in the midst of training are the same on every layout, and training does not notice them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from titan.config.schema import TokenizerConfig, TokenizerKind
from titan.data.tokenizer import build_tokenizer
from titan.models.llama import LLAMA
from titan.trainer.build import Trainer, build_trainer
from titan.trainer.loop import build_meter, run_step, steps_of_batches
from titan.trainer.samples import continue_rows

from .layouts import layout_config, open_packed
from .matrix import BLOCK_EACH, FOUR_ROWS, mesh, options
from .pool import RankPool

PROMPTS = [[256, 5, 7], [256], [256, 40, 42, 43, 45, 48], [256, 200], [256, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23]]
"""More than one or two data ranks take at once, the longest with its continuation no multiple of any cut."""
NEW_TOKENS = 6
TEMPERATURES = (0.0, 1.0)
Found = tuple[list[list[list[int]]], list[tuple[float, float]]]


def sample_layout(world_size: int, overrides: tuple[str, ...], packed: Path, samples: bool = True) -> Found:
    """Train two steps as this rank, with samples before, between and after; returns them, and losses and norms."""
    config = layout_config(world_size, overrides)
    trainer = build_trainer(config, torch.device("cpu"), open_packed(packed, config))
    batches = steps_of_batches(trainer, build_meter(trainer))
    taken = take_samples(trainer) if samples else []
    results = []
    for _ in range(2):
        result = run_step(trainer, next(batches)).result.read()
        results.append((result.loss, result.grad_norm))
        taken += take_samples(trainer) if samples else []
    return taken, results


def take_samples(trainer: Trainer) -> list[list[list[int]]]:
    """Return what comes behind the prompts, greedily and drawn."""
    tokenizer, found = build_tokenizer(TokenizerConfig(TokenizerKind.bytes)), []
    for temperature in TEMPERATURES:
        settings = replace(trainer.config.validation, sample_tokens=NEW_TOKENS, sample_temperature=temperature)
        trainer.config = replace(trainer.config, validation=settings)
        found.append(continue_rows(trainer, PROMPTS, tokenizer, trainer.state.step))
    return found


def by_hand(packed: Path) -> list[list[int]]:
    """Return the greedy continuations of the bare model with initial weights."""
    config = layout_config(1, ())
    trainer = build_trainer(config, torch.device("cpu"), open_packed(packed, config))
    bare = LLAMA.build(config.model, 32)
    bare.init_buffers("cpu")
    bare.load_state_dict({name: parameter.detach() for name, parameter in trainer.parameters})
    found = []
    for prompt in PROMPTS:
        row = list(prompt)
        while len(row) < len(prompt) + NEW_TOKENS and row[-1] != 257:
            row.append(int(bare(torch.tensor([row]))[0, -1, :258].argmax()))
        found.append([token for token in row[len(prompt) :] if token != 257])
    return found


@pytest.fixture(scope="module")
def one_process(pools: Callable[[int], RankPool], packed_file: Path) -> Found:
    """What one process finds."""
    return pools(1).run(sample_layout, 1, (), packed_file)[0]


LAYOUTS = [
    (2, mesh(dp_shard=2)),
    (2, mesh(tp=2)),
    (2, mesh(cp=2)),
    (2, mesh(pp=2)),
    *[
        pytest.param(world_size, overrides, marks=pytest.mark.slow)
        for world_size, overrides in [
            (2, (*mesh(pp=2), *options("pp_schedule=ZBVZeroBubble"), *BLOCK_EACH, *FOUR_ROWS)),
            (2, (*mesh(dp_shard=2), "compile=inductor", "compile.backend=aot_eager")),
            (4, mesh(pp=2, tp=2)),
        ]
    ],
]


@pytest.mark.parametrize(("world_size", "overrides"), LAYOUTS)
def test_samples_are_the_same_on_every_layout(
    pools: Callable[[int], RankPool],
    packed_file: Path,
    one_process: Found,
    world_size: int,
    overrides: tuple[str, ...],
) -> None:
    """Greedy and drawn, before and after steps, on every rank; and each step is that without them, to the bit."""
    one, _ = one_process
    found = pools(world_size).run(sample_layout, world_size, overrides, packed_file)
    assert [samples for samples, _ in found] == [one] * world_size
    without = pools(world_size).run(sample_layout, world_size, overrides, packed_file, False)
    assert [results for _, results in found] == [results for _, results in without]


def test_samples_are_those_of_the_bare_model(
    pools: Callable[[int], RankPool], packed_file: Path, one_process: Found
) -> None:
    """Token by token, each the likeliest behind all before it; what is drawn differs from that."""
    (one, _), greedy = one_process, pools(1).run(by_hand, packed_file)[0]
    assert one[0] == greedy
    assert one[1] != greedy
    assert one[4] != one[0], "training has changed what is said"
