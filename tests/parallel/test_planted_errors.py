"""The comparison finds what it is there to find: each error of `tests.parallel.planted`, where it matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from titan.trainer.record import Record, compare_records
from titan.verify.parity import FLOAT32, is_same

from .matrix import UNEVEN, mesh
from .planted import PLANTS, record_planted
from .pool import RankPool

WHERE = {
    "gradients_averaged_over_ranks": (2, mesh(dp_shard=2)),
    "tokens_counted_on_each_rank": (2, (*mesh(dp_shard=2), *UNEVEN)),
    "positions_counted_from_zero_on_each_rank": (2, mesh(cp=2)),
    "mask_of_the_first_part_everywhere": (2, (*mesh(cp=2), "parallelism.cp_head_tail=false")),
    "documents_ignored": (2, (*mesh(cp=2), "data.mask_documents=true")),
    "norms_not_summed_over_tensor_ranks": (2, mesh(tp=2)),
    "tied_gradients_not_added": (2, (*mesh(pp=2), "model.tie_embeddings=true")),
    "microbatches_averaged": (2, mesh(pp=2)),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_error_is_found(
    record: Callable[..., Record], pools: Callable[[int], RankPool], packed_file: Path, short_file: Path, plant: str
) -> None:
    """With the error in it the layout is different, without it the same."""
    world_size, overrides = WHERE[plant]
    data = short_file if UNEVEN[0] in overrides else packed_file
    reference = record(1, *(text for text in overrides if not text.startswith("parallelism.")), data=data)
    assert is_same(compare_records(record(world_size, *overrides, data=data), reference), FLOAT32)
    broken = pools(world_size).run(record_planted, plant, world_size, overrides, data)[0]
    difference = compare_records(broken, reference)
    assert not is_same(difference, FLOAT32)


def test_another_seed_is_found(record: Callable[..., Record]) -> None:
    """Other weights and other rows are no rounding error."""
    difference = compare_records(record(1, "training.seed=1"), record(1))
    assert difference.gradient > 0.1
    assert difference.weight > 0.1
