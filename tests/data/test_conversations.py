"""Conversations from file to rows: only what the assistant says is learned, prepared and streamed alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from titan.config.schema import (
    BadDocuments,
    DataConfig,
    DataKind,
    Packing,
    RecordFormat,
    TokenizerConfig,
    TokenizerKind,
)
from titan.data.batch import IGNORED_LABEL
from titan.data.feed import build_stream_feed, open_streams
from titan.data.loader import Share
from titan.data.mixture import load_rows
from titan.data.prepare import Preparation
from titan.data.rows import Row
from titan.data.tokenizer import build_tokenizer
from titan.errors import DataError

SETTINGS = TokenizerConfig(kind=TokenizerKind.bytes)
TOKENIZER = build_tokenizer(SETTINGS)
SEQ_LEN = 64
ANSWERS = [f"answer {number}" for number in range(5)]


def conversation(number: int) -> dict[str, object]:
    """Return a record of one question and one answer."""
    return {
        "messages": [
            {"role": "user", "content": f"question {number}?"},
            {"role": "assistant", "content": ANSWERS[number]},
        ]
    }


def config_of(folder: Path, records: list[object], **options: object) -> DataConfig:
    """Write the records as jsonl and return what reads them."""
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"packing": Packing.best_fit, "mask_documents": True, "cache_dir": str(folder / "cache")} | options
    return DataConfig(
        kind=DataKind.jsonl,
        path=str(folder / "chat.jsonl"),
        format=RecordFormat.chat,
        **settings,  # type: ignore[arg-type]
    )


def prepared_rows(config: DataConfig) -> Row:
    """Return all rows, tokenised before."""
    preparation = Preparation(TOKENIZER, str(config.cache_dir), workers=1)
    rows = load_rows(config, SEQ_LEN, preparation, config.packing, config.mask_documents)
    return rows.read(range(len(rows)))


def streamed_rows(config: DataConfig, count: int) -> Row:
    """Return the first rows, tokenised while they are read."""
    feed = build_stream_feed(open_streams(config, TOKENIZER), Share(1, 1, 0, 1), SEQ_LEN, seed=0)
    batches = [step.batches[0] for step in feed.steps(0, count, ())]
    columns = [[batch.tokens for batch in batches], [batch.labels for batch in batches]]
    return Row(*(np.concatenate([each.numpy() for each in column]) for column in columns), None)


def learned_texts(rows: Row) -> list[str]:
    """Return what the labels that count say, one text for each run of them."""
    texts = []
    for labels in rows.labels:
        counts = np.flatnonzero(labels != IGNORED_LABEL)
        for run in np.split(counts, np.flatnonzero(np.diff(counts) > 1) + 1):
            if len(run):
                texts.append(TOKENIZER.decode(labels[run].tolist()))
    return texts


@pytest.mark.parametrize("packing", list(Packing))
def test_only_answers_are_learned(tmp_path: Path, packing: Packing) -> None:
    """Every answer with its end of turn, once, and not one token of a question."""
    config = config_of(tmp_path, [conversation(number) for number in range(5)], packing=packing)
    expected = sorted(f"{answer}<|end_of_text|>" for answer in ANSWERS)
    found = "".join(learned_texts(prepared_rows(config)))  # an answer may go on in the next row
    assert sorted(f"{text}<|end_of_text|>" for text in found.split("<|end_of_text|>") if text) == expected
    if packing is Packing.best_fit:
        assert sorted(learned_texts(prepared_rows(config))) == expected


def test_streamed_and_prepared_learn_the_same(tmp_path: Path) -> None:
    """The same answers, whichever way the rows are made."""
    config = config_of(tmp_path, [conversation(number) for number in range(5)])
    prepared = prepared_rows(config)
    streamed = streamed_rows(config, len(prepared.inputs))
    assert sorted(learned_texts(streamed)) == sorted(learned_texts(prepared))


BAD = {
    "nobody answers": ({"messages": [{"role": "user", "content": "hello?"}]}, "the assistant says nothing"),
    "an unknown role": ({"messages": [{"role": "oracle", "content": "hm"}]}, "has the role 'oracle'"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_bad_conversation_is_named_or_counted(tmp_path: Path, name: str, is_streamed: bool) -> None:
    """An error says file, line and what to type; skipping leaves out that one alone."""
    record, words = BAD[name]
    records: list[object] = [conversation(0), record, conversation(1)]

    def read(config: DataConfig) -> Row:
        return streamed_rows(config, 2) if is_streamed else prepared_rows(config)

    with pytest.raises(DataError, match=rf"chat\.jsonl, line 2: .*{words}[\s\S]*data\.bad_documents=skip"):
        read(config_of(tmp_path, records))
    rows = read(config_of(tmp_path, records, bad_documents=BadDocuments.skip))
    assert sorted(learned_texts(rows)) == [f"{answer}<|end_of_text|>" for answer in ANSWERS[:2]]


def test_what_is_left_out_is_in_the_account(tmp_path: Path) -> None:
    """The manifest counts the documents that are there, and the reasons of those that are not."""
    config = config_of(tmp_path, [conversation(0), BAD["nobody answers"][0]], bad_documents=BadDocuments.skip)
    preparation = Preparation(TOKENIZER, str(config.cache_dir), workers=1)
    rows = load_rows(config, SEQ_LEN, preparation, config.packing, config.mask_documents)
    assert rows.text_bytes == len("question 0?answer 0")
    assert "left out 1 document: no assistant turn" in rows.describe()
