"""The global batch of a step is the same however ranks, micro-batches and workers share it out."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from titan.config.schema import TokenizerConfig, TokenizerKind
from titan.data.batch import IGNORED_LABEL, RowOrder
from titan.data.loader import Batch, Share, build_loader
from titan.data.prepared import write_documents
from titan.data.rows import PreparedRows
from titan.data.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes))
SEQ_LEN = 16
GLOBAL_BATCH = 8
STEPS = 5


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PreparedRows:
    """Real text, packed: 1,003 tokens in 63 rows, the last of them padded; 5 steps of 8 stay within an epoch."""
    folder = tmp_path_factory.mktemp("data")
    text = "".join(chr(97 + number * number % 26) for number in range(1001))
    prepared = write_documents(folder, [TOKENIZER.encode(text)], TOKENIZER.n_tokens)
    return PreparedRows(prepared, SEQ_LEN, TOKENIZER.eos)


def order_of(rows: PreparedRows, global_batch: int = GLOBAL_BATCH) -> RowOrder:
    """Return the order of the rows."""
    return RowOrder(len(rows), global_batch, seed=3)


def load(rows: PreparedRows, local: int, rank: int, ranks: int, first: int = 0, last: int = STEPS, workers: int = 0):
    """Return the micro-batches of one rank, grouped by step."""
    share = Share(GLOBAL_BATCH, local, rank, ranks)
    steps = list(build_loader(rows, order_of(rows), share, TOKENIZER.eos, first, last, workers))
    assert [step.number for step in steps] == list(range(first + 1, last + 1))
    assert all(len(step.batches) == GLOBAL_BATCH // (local * ranks) for step in steps)
    return [step.batches for step in steps]


def global_batches(rows: PreparedRows, local: int, ranks: int, **options) -> list[tuple[Tensor, Tensor]]:
    """Put every step's global batch together from what all ranks load: rank by rank, micro-batch by micro-batch."""
    loaded = [load(rows, local, rank, ranks, **options) for rank in range(ranks)]
    out = []
    for of_ranks in zip(*loaded, strict=True):
        parts: list[Batch] = [batch for of_rank in of_ranks for batch in of_rank]
        assert all(part.tokens.shape == part.labels.shape == (local, SEQ_LEN) for part in parts)
        out.append((torch.cat([part.tokens for part in parts]), torch.cat([part.labels for part in parts])))
    return out


def assert_equal_batches(ours: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    """Compare step by step, to the token."""
    assert len(ours) == len(expected)
    for (tokens, labels), (expected_tokens, expected_labels) in zip(ours, expected, strict=True):
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(labels, expected_labels)


@pytest.fixture(scope="module")
def expected(rows: PreparedRows) -> list[tuple[Tensor, Tensor]]:
    """What a plain loop over the order reads."""
    order = order_of(rows)
    steps = [[rows[int(row)] for row in order.rows_of_step(step)] for step in range(STEPS)]
    return [
        (torch.tensor([row.inputs.tolist() for row in step]), torch.tensor([row.labels.tolist() for row in step]))
        for step in steps
    ]


@pytest.mark.parametrize(("ranks", "local"), [(r, b) for r in (1, 2, 4, 8) for b in (1, 2, 4, 8) if r * b <= 8])
def test_a_step_is_the_same_for_any_number_of_ranks_and_micro_batches(
    rows: PreparedRows, expected: list[tuple[Tensor, Tensor]], ranks: int, local: int
) -> None:
    """Data-parallel degrees 1 to 8 with any accumulation load the same rows at every step, each row once."""
    assert_equal_batches(global_batches(rows, local, ranks), expected)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "local"), [(1, 2), (2, 4)])
def test_a_step_is_the_same_for_any_number_of_workers(
    rows: PreparedRows, expected: list[tuple[Tensor, Tensor]], ranks: int, local: int, workers: int
) -> None:
    """Reading ahead in other processes changes neither the rows nor their order."""
    assert_equal_batches(global_batches(rows, local, ranks, workers=workers), expected)


@pytest.mark.parametrize(("ranks", "local", "workers"), [(1, 8, 0), (2, 2, 0), (4, 1, 0), (2, 2, 2)])
def test_resuming_gives_the_batches_that_would_have_come(
    rows: PreparedRows, expected: list[tuple[Tensor, Tensor]], ranks: int, local: int, workers: int
) -> None:
    """A loader that starts at step k, on any layout, gives what an uninterrupted one gives from step k on."""
    for first in (1, 3, STEPS - 1):
        resumed = global_batches(rows, local, ranks, first=first, workers=workers)
        assert_equal_batches(resumed, expected[first:])


def test_a_loader_with_nothing_left_to_do_is_empty(rows: PreparedRows) -> None:
    """Resuming a run that is done loads nothing."""
    assert load(rows, 8, 0, 1, first=STEPS, last=STEPS) == []


def test_an_epoch_trains_on_every_token_once(rows: PreparedRows) -> None:
    """Over the 63 rows of an epoch every token but the first is a label exactly once, whatever the order."""
    steps = build_loader(rows, order_of(rows, 7), Share(7, 7, 0, 1), TOKENIZER.eos, 0, len(rows) // 7)
    batches = [batch for step in steps for batch in step.batches]
    pairs = [
        (int(token), int(label))
        for batch in batches
        for token, label in zip(batch.tokens.flatten(), batch.labels.flatten(), strict=True)
        if label != IGNORED_LABEL
    ]
    tokens = rows.reader[:].tolist()
    assert len(rows) == 63
    assert sorted(pairs) == sorted(itertools.pairwise(tokens))


def test_every_micro_batch_of_every_rank_has_rows_of_its_own() -> None:
    """The shares of a step neither overlap nor leave anything out, in places of the global batch."""
    shares = [Share(GLOBAL_BATCH, 2, rank, 2).micro_batches for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    assert [place for share in shares for micro in share for place in micro] == list(range(GLOBAL_BATCH))


def test_data_smaller_than_a_batch_is_repeated(tmp_path: Path) -> None:
    """A global batch of more rows than there are goes round: every row as often as any other, give or take one."""
    small = PreparedRows(write_documents(tmp_path, [np.arange(30)], 258), 10, 257)
    assert len(small) == 3
    (batch,) = next(build_loader(small, RowOrder(3, 8, 0), Share(8, 8, 0, 1), 257, 0, 1)).batches
    firsts, counts = batch.tokens[:, 0].unique(return_counts=True)
    assert firsts.tolist() == [0, 10, 20]
    assert sorted(counts.tolist()) == [2, 3, 3]
