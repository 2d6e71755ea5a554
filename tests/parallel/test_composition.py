"""Every combination of the parallelisms equals one process: `tests.parallel.matrix` is the list."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from titan.trainer.record import Difference, Record, compare_records
from titan.verify.parity import BFLOAT16, FLOAT32, Tolerance, is_same

from .layouts import record_layout
from .matrix import BEGIN, BLOCK_EACH, CASES, DOCUMENT, END, UNEVEN, Case, mesh, options
from .pool import RankPool

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
LONG = ("training.steps=20", "training.seq_len=32")


def assert_same(difference: Difference, tolerance: Tolerance = FLOAT32) -> None:
    """Hold what titan promises."""
    assert is_same(difference, tolerance), (difference, asdict(tolerance))


def assert_validates_as(record: Record, reference: Record, tolerance: Tolerance = FLOAT32) -> None:
    """Hold what titan promises of held-out rows, which are seven: no mesh has as many data ranks."""
    assert record.validation_losses == pytest.approx(reference.validation_losses, rel=tolerance.loss)
    assert len(record.validation_losses) == 2 or len(record.losses) == 1


def case_parameters() -> list[object]:
    """Return the cases as pytest takes them."""
    return [
        pytest.param(case, id=f"{case.kind}: {case.name}", marks=[pytest.mark.slow] * case.is_slow)
        for case in CASES
        if case.is_tested
    ]


@pytest.mark.parametrize("case", case_parameters())
def test_a_layout_equals_one_process(record: Callable[..., Record], case: Case) -> None:
    """Losses, gradient norms, every gradient and every weight equal those of one process; validation losses too."""
    found, reference = record(case.world_size, *case.overrides), record(1, *case.reference)
    tolerance = BFLOAT16 if case.kind == "bfloat16" else FLOAT32
    assert_same(compare_records(found, reference), tolerance)
    assert_validates_as(found, reference, tolerance)


SCHEDULES = {
    "as GPipe": ("0F0,0F1,,,0B0,0B1", ",1F0,1F1,1B0,1B1,"),
    "in a V, the last backward pass in halves": (
        "0F0,0F1,,3F0,3F1,3I0,3I1,3W0,3W1,0B0,0B1",
        ",1F0,2F0,1F1,2F1,,2B0,2B1,1B0,1B1,",
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_from_a_file_equals_one_process(record: Callable[..., Record], tmp_path: Path, name: str) -> None:
    """Whatever order of passes a file gives, training and validation are those of one process."""
    file = tmp_path / "schedule.csv"
    file.write_text("\n".join(SCHEDULES[name]))
    overrides = (*mesh(pp=2), *BLOCK_EACH, *options(f"pp_schedule_csv={file}"), "training.local_batch_size=2")
    found, reference = record(2, *overrides), record(1, *mesh())
    assert_same(compare_records(found, reference))
    assert_validates_as(found, reference)


def test_the_document_lists_what_is_tested() -> None:
    """The table in docs/parallelism.md was generated from the same cases, and how many are tests is said before it."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    assert f"{sum(case.is_tested for case in CASES)} of its {len(CASES)} rows are tests" in before
    listed = rest.split(END)[0]
    rows = [line.split("|")[1:3] for line in listed.splitlines() if line.startswith("| ") and "`" in line]
    assert [(int(n), text.strip(" `")) for n, text in rows] == [(case.world_size, case.name) for case in CASES]


GOLDEN_LAYOUTS = [
    (1, mesh()),
    (2, mesh(dp_shard=2)),
    (2, mesh(pp=2)),
    pytest.param(4, mesh(pp=2, tp=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world_size", "overrides"), GOLDEN_LAYOUTS)
def test_twenty_steps_follow_the_golden_curve(
    record: Callable[..., Record], world_size: int, overrides: tuple[str, ...]
) -> None:
    """Every layout gives the losses and gradient norms that are kept in the repository, step by step."""
    golden = json.loads(GOLDEN.read_text())
    found = record(world_size, *overrides, *LONG)
    assert golden["losses"][-1] < golden["losses"][0] - 0.3, "the model does not learn, so equality would mean little"
    assert found.losses == pytest.approx(golden["losses"], rel=1e-5)
    assert found.grad_norms == pytest.approx(golden["grad_norms"], rel=1e-4)


@pytest.mark.parametrize("overrides", [("parallelism=fsdp",), ("parallelism=hsdp",)])
def test_twenty_steps_of_a_preset_equal_one_process(record: Callable[..., Record], overrides: tuple[str, ...]) -> None:
    """After twenty steps too, every weight is that of one process."""
    assert_same(compare_records(record(4, *overrides, *LONG), record(1, *mesh(), *LONG)))


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, mesh(dp_shard=2)), (2, mesh(cp=2)), (2, (*mesh(pp=2), "training.local_batch_size=2"))],
)
def test_ranks_with_different_numbers_of_valid_tokens_weigh_every_token_the_same(
    record: Callable[..., Record], short_file: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    """With one row almost all padding, a mesh still equals one process: there is one denominator."""
    shape = (*UNEVEN, *BLOCK_EACH)
    reference, found = (record(n, *shape, *each, data=short_file) for n, each in ((1, mesh()), (world_size, layout)))
    assert_same(compare_records(found, reference))
    assert_validates_as(found, reference)


def test_bfloat16_is_not_float32(record: Callable[..., Record]) -> None:
    """Mixed precision does compute in bfloat16: near float32, and not the same."""
    difference = compare_records(record(1, *mesh(), "training.param_dtype=bfloat16"), record(1, *mesh()))
    assert 1e-6 < difference.loss < 1e-2


def test_tied_embeddings_are_one_parameter(record: Callable[..., Record]) -> None:
    """Whole or across stages, a tied output has no weight of its own in what is compared, and in checkpoints."""
    for world_size, layout in ((1, mesh()), (2, mesh(pp=2))):
        assert "output.weight" not in record(world_size, *layout, "model.tie_embeddings=true").weights


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, mesh(dp_shard=2)),
        (2, mesh(pp=2)),
        (2, (*mesh(pp=2), *options("pp_schedule=ZBVZeroBubble"), *BLOCK_EACH, "training.local_batch_size=4")),
        pytest.param(2, mesh(tp=2), marks=pytest.mark.slow),
        pytest.param(4, mesh(dp_replicate=2, dp_shard=2), marks=pytest.mark.slow),
        pytest.param(2, (*mesh(dp_shard=2), *options("cpu_offload=true")), marks=pytest.mark.slow),
        pytest.param(2, (*mesh(dp_shard=2), "compile=inductor"), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_validates_is_the_run_that_does_not(
    record: Callable[..., Record],
    pools: Callable[[int], RankPool],
    packed_file: Path,
    world_size: int,
    overrides: tuple[str, ...],
) -> None:
    """Losses, gradient norms and every weight are the same to the bit, with two validations in between or without."""
    without = pools(world_size).run(record_layout, world_size, overrides, packed_file, False)[0]
    found = record(world_size, *overrides)
    assert (len(found.validation_losses), without.validation_losses) == (2, [])
    assert (found.losses, found.grad_norms) == (without.losses, without.grad_norms)
    assert all(torch.equal(found.weights[name], weight) for name, weight in without.weights.items())
