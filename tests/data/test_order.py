"""The rows of a step are the same for any number of ranks, workers and micro-batches, and after any stop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from titan.config.schema import DataConfig, Packing
from titan.data.digest import step_digest
from titan.data.feed import Feed, PreparedFeed
from titan.data.loader import Share
from titan.data.mixture import MixtureRows
from titan.data.prepared import write_documents
from titan.data.rows import PreparedRows

from .streams import (
    GLOBAL_BATCH,
    SEED,
    SEQ_LEN,
    TOKENIZER,
    Shards,
    data_config,
    expected_steps,
    open_feed,
    tokens_of,
    write_texts,
)

STEPS = 8
Open = Callable[[int, int, int, int], Feed]
"""From rank, ranks, rows of a micro-batch and workers to what that rank is fed with."""

LAYOUTS = [
    (ranks, local)
    for ranks in (1, 2, 3, 4, 8)
    for local in sorted({1, 3, GLOBAL_BATCH // ranks})
    if GLOBAL_BATCH % (ranks * local) == 0
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Shards]]:
    """Two sources."""
    folder = tmp_path_factory.mktemp("texts")
    return folder, {"few": write_texts(folder, "few", 2, 40), "many": write_texts(folder, "many", 17, 6)}


def prepared(folder: Path, shards: dict[str, Shards], *names: str) -> Open:
    """Return what opens tokenised data, or a mixture of it, of a few more rows than three steps have."""
    parts = {
        name: PreparedRows(
            write_documents(folder / "prepared" / name, documents_of(shards[name]), TOKENIZER.n_tokens),
            SEQ_LEN,
            TOKENIZER.eos,
            mask_documents=True,
            component=name,
        )
        for name in names
    }
    rows = parts[names[0]] if len(names) == 1 else MixtureRows(parts, {name: len(name) - 2.5 for name in names})
    order = rows.order(GLOBAL_BATCH, SEED)
    return lambda rank, ranks, local, workers: PreparedFeed(
        rows, order, Share(GLOBAL_BATCH, local, rank, ranks), TOKENIZER.eos, workers, 2
    )


def documents_of(shards: Shards) -> list[np.ndarray]:
    """Return all documents in tokens."""
    return [np.array(tokens_of(text)) for texts in shards for text in texts]


def streamed(config: DataConfig) -> Open:
    """Return what opens streamed data."""
    return lambda rank, ranks, local, workers: open_feed(replace(config, num_workers=workers), rank, ranks, local)


@pytest.fixture(scope="module")
def feeds(folder: tuple[Path, dict[str, Shards]]) -> dict[str, tuple[Open, list[str]]]:
    """Return what opens each kind of data, and the digest of every step from a plain reading of it."""
    path, shards = folder
    found = {}
    for kind, names in (("prepared", ("few",)), ("prepared mixture", ("few", "many"))):
        opened = prepared(path, shards, *names)
        whole = opened(0, 1, GLOBAL_BATCH, 0)
        assert isinstance(whole, PreparedFeed)
        rows = [whole.rows.read(whole.order.rows_of_step(step)) for step in range(STEPS)]
        found[kind] = opened, [step_digest(map(step.at, range(GLOBAL_BATCH))) for step in rows]
    for packing in Packing:
        single = data_config(path, "few", packing=packing, mask_documents=True)
        mixture = data_config(path, "few", "many", packing=packing, mask_documents=True)
        for name, config, texts in (("single", single, {"": shards["few"]}), ("mixture", mixture, shards)):
            digests = [step_digest(step) for step in expected_steps(config, texts, STEPS)]
            found[f"streamed {name}, {packing.name}"] = (streamed(config), digests)
    return found


KINDS = [
    "prepared",
    "prepared mixture",
    *(f"streamed {name}, {packing.name}" for name in ("single", "mixture") for packing in Packing),
]


def read(
    opened: Open, ranks: int, local: int, workers: int, first: int, last: int, cursors: np.ndarray | None
) -> tuple[list[str], list[np.ndarray | None]]:
    """Return the digest of each step from what all ranks read, and where the data stands after it."""
    feeds = [opened(rank, ranks, local, workers) for rank in range(ranks)]
    for feed in feeds:
        feed.cursors = feed.cursors if cursors is None else cursors
    digests, after = [], []
    for steps in zip(*(feed.steps(first, last, ()) for feed in feeds), strict=True):
        assert all(len(batch.tokens) == local for step in steps for batch in step.batches)
        assert all(len(step.batches) == GLOBAL_BATCH // (ranks * local) for step in steps)
        digests.append(f"{sum(step.digest for step in steps) % 2**64:016x}")
        parts = [step.cursors for step in steps if step.cursors is not None]
        after.append(np.max(parts, axis=0) if parts else None)
    return digests, after


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_on_any_number_of_ranks(feeds: dict[str, tuple[Open, list[str]]], kind: str) -> None:
    """Data-parallel degrees 1, 2, 3, 4, 8 with any accumulation: the digest of every step, as read the plain way."""
    opened, expected = feeds[kind]
    for ranks, local in LAYOUTS:
        assert read(opened, ranks, local, 0, 0, STEPS, None)[0] == expected, (ranks, local)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_any_step_on_any_number_of_ranks(
    feeds: dict[str, tuple[Open, list[str]]], kind: str
) -> None:
    """Stopped after any step on one layout and taken up on another: the digest of every step."""
    opened, expected = feeds[kind]
    layouts = [LAYOUTS[index % len(LAYOUTS)] for index in range(0, 3 * STEPS, 3)]
    for stop, (before, after) in enumerate(itertools.pairwise(layouts), 1):
        first, cursors = read(opened, *before, 0, 0, stop, None)
        rest, _ = read(opened, *after, 0, stop, STEPS, cursors[-1])
        assert first + rest == expected, (stop, before, after)


CELLS = [
    pytest.param(kind, ranks, workers, marks=[] if (ranks, workers) == (2, 3) else pytest.mark.slow)
    for kind in KINDS
    for ranks, workers in ((1, 3), (2, 3), (3, 1), (4, 3), (8, 1))
]
"""Every degree, and one worker and several, but not each with each."""


@pytest.mark.parametrize(("kind", "ranks", "workers"), CELLS)
def test_a_step_is_the_same_with_any_number_of_workers(
    feeds: dict[str, tuple[Open, list[str]]], kind: str, ranks: int, workers: int
) -> None:
    """Read ahead in other processes, stopped in the middle and taken up without them: the digest of every step."""
    opened, expected = feeds[kind]
    first, cursors = read(opened, ranks, GLOBAL_BATCH // ranks, workers, 0, STEPS, None)
    assert first == expected
    rest, _ = read(opened, ranks, 1, workers, 3, STEPS, cursors[2])
    assert rest == expected[3:]
    rest, _ = read(opened, 2, 1, 0, 3, STEPS, cursors[2])
    assert rest == expected[3:]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_are_left_out_come_without_rows_and_the_others_as_ever(
    feeds: dict[str, tuple[Open, list[str]]], kind: str
) -> None:
    """After a spike: their documents are used up, and where the data stands is known after them too."""
    opened, expected = feeds[kind]
    whole, cursors = read(opened, 1, GLOBAL_BATCH, 0, 0, STEPS, None)
    steps = list(opened(0, 1, GLOBAL_BATCH, 0).steps(0, STEPS, {2, 3}))
    assert [step.number for step in steps] == list(range(1, STEPS + 1))
    assert [bool(step.batches) for step in steps] == [number not in (2, 3) for number in range(STEPS)]
    for index, step in enumerate(steps):
        assert f"{step.digest % 2**64:016x}" == (expected[index] if step.batches else "0" * 16)
        assert np.array_equal(step.cursors, cursors[index]) if step.cursors is not None else cursors[index] is None
    assert whole == expected


def test_the_digest_tells_rows_and_their_places_apart(feeds: dict[str, tuple[Open, list[str]]]) -> None:
    """A token, a label, a start that differ, or two rows that changed places, change the digest of the step."""
    opened, _ = feeds["prepared"]
    feed = opened(0, 1, GLOBAL_BATCH, 0)
    assert isinstance(feed, PreparedFeed)
    rows = [feed.rows.read([row]).at(0) for row in range(3)]
    found = {step_digest(rows), step_digest([rows[1], rows[0], rows[2]]), step_digest(rows[:2])}
    for name in ("inputs", "labels", "starts"):
        changed = getattr(rows[1], name).copy()
        changed[-1] += 1
        found.add(step_digest([rows[0], rows[1]._replace(**{name: changed}), rows[2]]))
    found.add(step_digest([rows[0], rows[1]._replace(starts=None), rows[2]]))
    assert len(found) == 7
