"""The rows of streamed text are those of the documented order, and a cursor is enough to go on from any of them."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from titan.config.schema import BadDocuments, DataConfig, Packing
from titan.data.batch import IGNORED_LABEL
from titan.data.digest import row_digest, step_digest
from titan.data.encode import Encoded
from titan.data.loader import Step
from titan.data.rows import Row
from titan.data.source import open_source
from titan.data.stream import Cursor, DocumentShare, Stream, count_streams
from titan.errors import DataError

from .streams import (
    GLOBAL_BATCH,
    SEED,
    SEQ_LEN,
    TOKENIZER,
    Shards,
    data_config,
    expected_steps,
    open_feed,
    write_texts,
)

STEPS = 12
"""In which every source here comes to its second epoch."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Shards]]:
    """A folder of sources: a few shards of many records, many shards of a few, and fewer documents than streams."""
    folder = tmp_path_factory.mktemp("texts")
    shards = {
        "few": write_texts(folder, "few", 3, 31),
        "many": write_texts(folder, "many", 17, 6),
        "tiny": write_texts(folder, "tiny", 1, 2),
    }
    return folder, shards


def assert_equal_rows(step: Step, rows: list[Row]) -> None:
    """Compare all of a step on one rank, to the token."""
    (batch,) = step.batches
    assert np.array_equal(batch.tokens.numpy(), np.stack([row.inputs for row in rows]))
    assert np.array_equal(batch.labels.numpy(), np.stack([row.labels for row in rows]))
    if batch.starts is not None:
        assert np.array_equal(batch.starts.numpy(), np.stack([row.starts for row in rows]))  # type: ignore[arg-type]


def padding_of(row: Row) -> int:
    """Return how many positions at a row's end are only filled up."""
    pairs = list(zip(row.inputs.tolist(), row.labels.tolist(), strict=True))
    return len(pairs) - max(i + 1 for i, pair in enumerate(pairs) if pair != (TOKENIZER.eos, IGNORED_LABEL))


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("names", [("few",), ("many",), ("tiny",), ("few", "many")], ids="+".join)
def test_rows_are_those_of_the_documented_order(
    texts: tuple[Path, dict[str, Shards]], names: tuple[str, ...], packing: Packing, mask: bool
) -> None:
    """Shards or records shared out, windows shuffled, documents cut or fitted, over epochs: as made the plain way."""
    folder, shards = texts
    config = data_config(folder, *names, packing=packing, mask_documents=mask)
    expected = expected_steps(config, shards if len(names) > 1 else {"": shards[names[0]]}, STEPS)
    steps = list(open_feed(config).steps(0, STEPS, ()))
    for step, rows in zip(steps, expected, strict=True):
        assert_equal_rows(step, rows)
        assert step.padding == sum(map(padding_of, rows))
        if mask:
            assert f"{step.digest % 2**64:016x}" == step_digest(rows)


@pytest.mark.parametrize("packing", list(Packing))
def test_an_epoch_of_all_streams_has_every_document_once(
    texts: tuple[Path, dict[str, Shards]], packing: Packing
) -> None:
    """Whatever the sharing out: what all streams read before their first change of epoch is the source, once."""
    folder, shards = texts
    for name in ("few", "many"):
        source = open_source(data_config(folder, name))
        read = Counter(
            document.content
            for stream in range(4)
            for _, document in DocumentShare(source, stream, 4, "key").read(Cursor(), Counter())
        )
        assert read == Counter(text for shard in shards[name] for text in shard)


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("name", ["few", "many", "tiny"])
def test_a_stream_goes_on_from_the_cursor_of_any_row(
    texts: tuple[Path, dict[str, Shards]], name: str, packing: Packing
) -> None:
    """A new stream that is given the cursor after row k makes row k+1 and all that follow, with the same cursors."""
    source = open_source(data_config(texts[0], name))

    def stream(cursor: Cursor) -> Stream:
        share = DocumentShare(source, 1, 4, f"{SEED}/")
        encode = open_feed(data_config(texts[0], name)).plan.build(0, 0, Cursor()).encode
        return Stream(share, encode, SEQ_LEN, 5, packing, TOKENIZER.eos, True, cursor)

    whole = stream(Cursor())
    rows, cursors = [], [Cursor()]
    for _ in range(120):
        rows.append(row_digest(0, whole.next_row()))
        cursors.append(whole.cursor)
    assert cursors[-1].epoch > 0
    assert len(set(cursors)) == len(cursors)
    for first in range(0, 100, 3):
        resumed = stream(cursors[first])
        for number in range(first, first + 12):
            assert row_digest(0, resumed.next_row()) == rows[number]
            assert resumed.cursor == cursors[number + 1]


def test_going_on_reads_one_window(texts: tuple[Path, dict[str, Shards]]) -> None:
    """To make the next row after a stop, at most one window of documents is tokenised, however far the run was."""
    config = data_config(texts[0], "few", packing=Packing.best_fit)
    build = open_feed(config).plan.build
    whole = build(0, 0, Cursor())
    for _ in range(40):
        whole.next_row()
        encoded = []
        resumed = build(0, 0, whole.cursor)
        encode = resumed.encode
        resumed.encode = lambda content, encode=encode, encoded=encoded: encoded.append(content) or encode(content)
        resumed.next_row()
        assert 0 < len(encoded) <= config.shuffle_window


def test_streams_divide_the_global_batch() -> None:
    """Their number is the largest divisor of the global batch that is not above what is asked for."""
    for size, most in itertools.product(range(1, 40), range(1, 40)):
        found = count_streams(size, most)
        assert size % found == 0
        assert found <= most
        assert not any(size % n == 0 for n in range(found + 1, min(size, most) + 1))


def write_jsonl(folder: Path, *lines: str) -> DataConfig:
    """Write a file of lines; returns a config that streams it."""
    (folder / "texts").mkdir()
    (folder / "texts" / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    return data_config(folder, "texts")


@pytest.mark.parametrize("lines", [["", ""], ['{"text": ""}'] * 9, ["not json"] * 3])
def test_a_source_without_text_is_an_error_and_no_endless_search(tmp_path: Path, lines: list[str]) -> None:
    """A DataError that names the shards and why nothing was in them."""
    config = write_jsonl(tmp_path, *lines)
    config.bad_documents = BadDocuments.skip
    with pytest.raises(DataError, match=r"no text to train on in 1 shards \(.*a.jsonl\)"):
        next(open_feed(config).steps(0, 1, ()))


def test_a_bad_document_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    """As before training, whichever stream comes to it."""
    texts = [json.dumps({"text": "some words"})] * 20
    config = write_jsonl(tmp_path, *texts[:9], "not json", *texts)
    with pytest.raises(DataError, match=r"a.jsonl, line 10: broken JSON"):
        for _ in open_feed(config).steps(0, 40, ()):
            pass


def test_bad_documents_that_are_skipped_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says how many and why; that four streams pass over the same line does not make it four."""
    texts = [json.dumps({"text": "some words"})] * 20
    config = write_jsonl(tmp_path, *texts, "not json", *texts)
    config.bad_documents = BadDocuments.skip
    config.shuffle_window = 100
    next(open_feed(config).steps(0, 1, ()))
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told == ["documents that this rank has left out so far: 1 broken JSON"]


def test_bytes_and_tokens_so_far_are_known(texts: tuple[Path, dict[str, Shards]]) -> None:
    """Their ratio is that of the text: two tokens more than bytes a document, with a tokenizer of bytes."""
    feed = open_feed(data_config(texts[0], "few"))
    assert feed.tokens_to_bytes == (0, 0)
    steps = feed.steps(0, STEPS, ())
    next(steps)
    tokens, text_bytes = feed.tokens_to_bytes
    assert tokens >= GLOBAL_BATCH * SEQ_LEN
    assert 0 < text_bytes < tokens
    assert (tokens - text_bytes) % 2 == 0
    next(steps)
    assert feed.tokens_to_bytes > (tokens, text_bytes)


def test_a_row_takes_no_more_of_a_document_than_it_needs(tmp_path: Path) -> None:
    """A document of millions of tokens is not copied for every row that is cut from it."""
    source = open_source(write_jsonl(tmp_path, json.dumps({"text": "book"})))
    share, book = DocumentShare(source, 0, 1, "key"), np.arange(2_000_000, dtype=np.uint32)
    stream = Stream(share, lambda _: Encoded(book), SEQ_LEN, 5, Packing.concat, 0, True, Cursor())
    stream.next_row()
    tracemalloc.start()
    try:
        rows = [stream.next_row() for _ in range(3)]
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert np.concatenate([row.inputs for row in rows]).tolist() == list(range(SEQ_LEN, 4 * SEQ_LEN))
