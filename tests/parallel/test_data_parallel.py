"""Data parallelism, sharded or not, changes nothing: the invariants of `titan.parallel.fsdp`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from titan.verify import Difference, Record, compare_records

LONG = ("training.steps=20", "training.seq_len=32")

LAYOUTS = [
    (2, ("parallelism=fsdp",)),
    (4, ("parallelism=fsdp",)),
    (4, ("parallelism=hsdp",)),
    (2, ("parallelism=ddp",)),
    (4, ("parallelism=ddp", "training.local_batch_size=1")),
]


def assert_same(difference: Difference) -> None:
    """Hold the tolerances that titan promises in float32."""
    assert difference.loss < 1e-5, difference
    assert difference.grad_norm < 1e-4, difference
    assert difference.gradient < 1e-4, difference
    assert difference.weight < 1e-4, difference


@pytest.mark.parametrize(("world_size", "overrides"), LAYOUTS)
def test_twenty_steps_equal_one_process(
    record: Callable[..., Record], world_size: int, overrides: tuple[str, ...]
) -> None:
    """Every step's loss and gradient norm, every gradient and every weight equal those of one process."""
    reference = record(1, "parallelism=single", *LONG)
    assert reference.losses[-1] < reference.losses[0] - 0.3, "the model does not learn, so equality would mean little"
    assert_same(compare_records(record(world_size, *overrides, *LONG), reference))


@pytest.mark.parametrize("local_batch_size", [1, 4, 8])
def test_accumulation_changes_nothing(record: Callable[..., Record], local_batch_size: int) -> None:
    """The same global batch in other pieces gives the same step."""
    reference = record(1, "parallelism=single")
    assert_same(compare_records(record(1, f"training.local_batch_size={local_batch_size}"), reference))


def test_ranks_with_different_numbers_of_valid_tokens_weigh_every_token_the_same(
    record: Callable[..., Record],
) -> None:
    """With one row almost all padding, two ranks still equal one process: there is one denominator."""
    overrides = ("training.seq_len=8000", "model.dim=16", "model.n_layers=1", "training.steps=1",
                 "training.local_batch_size=1", "training.global_batch_size=4")  # fmt: skip
    reference = record(1, *overrides)
    assert_same(compare_records(record(2, *overrides), reference))


def test_tied_embeddings_shard_like_any_parameter(record: Callable[..., Record]) -> None:
    """A parameter with two uses has the sum of both gradients on every mesh."""
    reference = record(1, "model.tie_embeddings=true")
    assert "output.weight" not in reference.weights
    assert_same(compare_records(record(2, "model.tie_embeddings=true"), reference))


def test_resharding_after_forward_changes_nothing(record: Callable[..., Record]) -> None:
    """Freeing weights between forward and backward is a matter of memory alone."""
    reference = record(1, "parallelism=single")
    for choice in ("always", "never"):
        assert_same(compare_records(record(2, f"parallelism.reshard_after_forward={choice}"), reference))


@pytest.mark.parametrize(
    "option", ["activation_checkpoint=full", "activation_checkpoint=every_nth", "activation_checkpoint=selective"]
)
def test_recomputing_activations_changes_nothing(record: Callable[..., Record], option: str) -> None:
    """What is recomputed is what was there before."""
    assert_same(compare_records(record(2, option), record(1, "parallelism=single")))


def test_bfloat16_stays_near_float32(record: Callable[..., Record]) -> None:
    """Mixed precision computes in bfloat16 and keeps float32 weights: near, and not the same."""
    reference = record(1, "parallelism=single")
    difference = compare_records(record(2, "training.param_dtype=bfloat16"), reference)
    assert 1e-6 < difference.loss < 1e-2
    assert difference.gradient < 0.1


def test_a_planted_error_is_seen(record: Callable[..., Record]) -> None:
    """The comparison notices another seed, so its silence elsewhere means something."""
    difference = compare_records(record(1, "training.seed=1"), record(1, "parallelism=single"))
    assert difference.gradient > 0.1
    assert difference.weight > 0.1
