"""Tables: parquet, Arrow, saved datasets and folders of them, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from titan.config.schema import BadDocuments, DataConfig, DataKind, RecordFormat
from titan.data import table_source
from titan.data.source import Source, open_source
from titan.data.table_source import _explain
from titan.errors import DataError

TEXTS = [f"text {number} ä" for number in range(250)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in every form."""
    path = tmp_path_factory.mktemp("tables")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(250))})
    (path / "parquet").mkdir()
    table.to_parquet(path / "parquet" / "train-0.parquet", batch_size=100)
    table.save_to_disk(path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(path / "splits")
    return path


def config(kind: str, **settings: Any) -> DataConfig:
    """Return a config; paths may be given as such."""
    return DataConfig(DataKind[kind], **{k: str(v) if isinstance(v, Path) else v for k, v in settings.items()})


def texts(source: Source) -> list[str]:
    """Return what all documents say."""
    return [str(document.content) for document in source]


@pytest.mark.parametrize("name", ["parquet", "file", "arrow files", "saved", "splits", "hub saved", "hub", "streamed"])
def test_every_form_of_a_table_gives_its_documents(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows once and in order, from any record of any shard on, with the same account."""
    monkeypatch.setattr(table_source, "RANGE_BYTES", 2000)
    source = {
        "parquet": lambda: open_source(config("parquet", path=folder / "parquet")),
        "file": lambda: open_source(config("parquet", path=folder / "parquet" / "train-0.parquet")),
        "arrow files": lambda: open_source(config("arrow", path=folder / "saved" / "*.arrow")),
        "saved": lambda: open_source(config("arrow", path=folder / "saved")),
        "splits": lambda: open_source(config("arrow", path=folder / "splits")),
        "hub saved": lambda: open_source(config("huggingface", dataset=folder / "splits")),
        "hub": lambda: open_source(config("huggingface", dataset=folder / "parquet")),
        "streamed": lambda: open_source(config("huggingface", dataset=folder / "parquet"), streaming=True),
    }[name]()
    assert texts(source) == TEXTS
    assert source.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert len(source.shards) == {"parquet": 3, "file": 3, "arrow files": 1, "streamed": 1}.get(
        name, len(source.shards)
    )
    assert len({shard.name for shard in source.shards}) == len(source.shards)
    for shard in source.shards:
        whole = list(shard.read())
        for start in (1, len(whole) - 1, len(whole) + 3):
            assert list(shard.read(start)) == whole[start:]
            assert [document.record for document in whole] == list(range(len(whole)))


def test_a_split_is_the_one_that_was_asked_for(folder: Path) -> None:
    """data.split picks, and one that is not there comes with those that are."""
    assert texts(open_source(config("huggingface", dataset=folder / "splits", split="test"))) == TEXTS[:3]
    for dataset in ("splits", "parquet"):
        with pytest.raises(
            DataError, match=r"data\.split = dev is no split of(.|\n)*train(.|\n)*Try  data\.split=train"
        ):
            open_source(config("huggingface", dataset=folder / dataset, split="dev"))
    with pytest.raises(DataError, match=r"data\.subset = en is none of(.|\n)*Try  data\.subset=default"):
        open_source(config("huggingface", dataset=folder / "parquet", subset="en"))


@pytest.mark.parametrize("bad", ["error", "skip"])
def test_a_wrong_field_names_those_there_are(folder: Path, bad: str) -> None:
    """A column that no row has is a mistake in any case, for nothing would be left."""
    for kind, where in (("parquet", "parquet"), ("arrow", "saved")):
        wrong = config(kind, path=folder / where, text_field="body", bad_documents=BadDocuments[bad])
        with pytest.raises(DataError, match=r"no field 'body' \(it has 'text', 'id'\)(.|\n)*data\.text_field=NAME"):
            open_source(wrong)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_of_another_kind_is_refused_or_counted(tmp_path: Path, kind: str) -> None:
    """A file that is no table names itself; skipped, it is counted."""
    file = tmp_path / f"a.{kind}"
    file.write_bytes(b"this is no table")
    with pytest.raises(DataError, match=rf"a\.{kind}: no {kind} file"):
        open_source(config(kind, path=file))
    source = open_source(config(kind, path=file, bad_documents=BadDocuments.skip))
    assert texts(source) == []
    assert source.skipped == {"unreadable file": 1}


def test_values_that_are_no_text_are_named_by_row(tmp_path: Path) -> None:
    """A null, and a number, are refused with file and row, or counted."""
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["a", None, "", "b"]}).to_parquet(file)
    with pytest.raises(DataError, match=r"a\.parquet, row 1: field 'text' is of type NoneType, not text"):
        texts(open_source(config("parquet", path=file)))
    source = open_source(config("parquet", path=file, bad_documents=BadDocuments.skip))
    assert texts(source) == ["a", "b"]
    assert source.skipped == {"'text' is not text": 1, "empty": 1}


def test_conversations_are_read_and_held_against_their_form(tmp_path: Path) -> None:
    """With data.format=chat the messages are the document, and what is no conversation says why."""
    messages = [{"role": "user", "content": "ä"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"messages": [messages, messages]}).to_parquet(file)
    source = open_source(config("parquet", path=file, format=RecordFormat.chat))
    assert [document.content for document in source] == [messages, messages]
    assert source.text_bytes == 6
    lines = tmp_path / "a.jsonl"
    for value, words in (
        ('"text"', "of type str, not a list"),
        ("[7]", "message 1 of 1 is of type int, not an object"),
        ('[{"role":"user"}]', "message 1 of 1 has no 'content'"),
        ('[{"role":"assistant","content":null,"tool_calls":[1]}]', "calls tools, .* put the call into its content"),
        ("[]", "there are no messages"),
    ):
        lines.write_text(f'{{"messages": {value}}}\n')
        with pytest.raises(DataError, match=f"line 1: field 'messages' is no conversation: .*{words}"):
            texts(open_source(config("jsonl", path=lines, format=RecordFormat.chat)))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "the hub does not answer"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "neither a folder here nor"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "HF_TOKEN"),
        (ValueError("BuilderConfig 'x' not found. Available: ['en', 'de']"), "There are: en, de"),
        (RuntimeError("something else\nwith details"), "cannot be read: something else"),
    ],
)
def test_what_the_hub_says_is_explained(error: Exception, words: str) -> None:
    """Offline, missing, private and gated datasets are told apart, each with what to do."""
    assert words in str(_explain(config("huggingface", dataset="a/b"), error))
