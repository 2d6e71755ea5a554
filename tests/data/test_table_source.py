"""Tables: parquet, Arrow, saved datasets and folders of them, without a network."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import httpx
import pyarrow
import pyarrow.parquet
import pytest

from titan.config.schema import BadDocuments, DataConfig, DataKind, RecordFormat
from titan.data import table_source
from titan.data.shard import Shard
from titan.data.source import Source, open_source
from titan.data.stream import Cursor, DocumentShare
from titan.data.table_source import PartShard, _explain
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


def not_utf8(*values: bytes) -> pyarrow.Array:
    """Return a column of text that holds any bytes."""
    ends = [sum(map(len, values[:count])) for count in range(len(values) + 1)]
    buffers = [None, pyarrow.array(ends, pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"".join(values))]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), buffers)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_value_that_is_not_utf8_is_one_bad_document(tmp_path: Path, kind: str) -> None:
    """It is named by its row, or counted, and those beside it are read."""
    table = pyarrow.table({"text": not_utf8(b"fine", b"n\xffo", b"yes")})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    settings: dict[str, Any] = {"kind": "parquet", "path": tmp_path / "a.parquet"}
    if kind == "saved":
        settings = {"kind": "arrow", "path": tmp_path / "saved"}
    with pytest.raises(DataError, match=r"row 1: not UTF-8 \(invalid start byte at byte 1\)"):
        texts(open_source(config(**settings)))
    source = open_source(config(**settings, bad_documents=BadDocuments.skip))
    assert texts(source) == ["fine", "yes"]
    assert source.skipped == {"not UTF-8": 1}


def test_row_groups_are_read_as_datasets_reads_them(tmp_path: Path) -> None:
    """Whatever Arrow's type for a text or a conversation, in any number of row groups, from any row on."""
    words = [f"wört {number}" for number in range(2500)]
    messages = [[{"role": "user", "content": word}, {"role": "assistant", "content": word}] for word in words]
    columns = {
        "plain": pyarrow.array(words),
        "large": pyarrow.array(words, pyarrow.large_string()),
        "by number": pyarrow.array(words).dictionary_encode(),
        "a.b": pyarrow.array(words),
        "chat": pyarrow.array(messages),
    }
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=1100)
    expected = list(datasets.load_dataset("parquet", data_files=[str(file)], split="train", streaming=True))
    for name in columns:
        options = {"format": RecordFormat.chat, "messages_field": name} if name == "chat" else {"text_field": name}
        source = open_source(config("parquet", path=file, **options))
        assert [document.content for document in source] == [row[name] for row in expected]
        assert [shard.name for shard in source.shards] == [f"{file}[{index} of 3]" for index in range(3)]
        (rest,) = source.shards[1].read(1099)
        assert rest.content == expected[2199][name]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_rows_of_other_streams_are_not_turned_into_text(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a table that many streams share, each row becomes a document in one of them and is looked at by no other."""
    picked: Counter[int] = Counter()
    pick = Shard.pick
    monkeypatch.setattr(
        Shard, "pick", lambda self, values, record: picked.update([record]) or pick(self, values, record)
    )
    path = folder / kind
    source = open_source(config("parquet" if kind == "parquet" else "arrow", path=path), streaming=True)
    read = [
        document.content
        for stream in range(7)
        for _, document in DocumentShare(source, stream, 7, "key").read(Cursor(), Counter())
    ]
    assert sorted(map(str, read)) == sorted(TEXTS)
    assert picked.total() == len(TEXTS)


class Failing:
    """Rows of the hub that fail after two."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def with_format(self, _: str) -> Failing:
        return self

    def iter(self, batch_size: int) -> Any:
        assert batch_size > 2
        yield pyarrow.table({"text": ["a", "b"]})
        raise self.error


def caused(error: Exception, cause: Exception) -> Exception:
    """Return an error that comes of another."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("connection reset by the hub"),
        TimeoutError(),
        OSError(errno.EIO, "Input/output error"),
        FileNotFoundError("gone"),
        httpx.ReadTimeout("read timed out"),
        caused(ValueError("cannot read"), httpx.ConnectError("no route")),
        MemoryError(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("bad", ["error", "skip"])
def test_a_network_that_fails_loses_no_document(error: Exception, bad: str) -> None:
    """It is an error whatever is to become of bad documents: the rest of the shard is good, and would be lost."""
    shard = PartShard(config("huggingface", bad_documents=BadDocuments[bad]), "a", 1, rows=Failing(error), where="a/b")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a/b, after row 2: (.|\n)*This is no bad document"):
        list(shard.read())


@pytest.mark.parametrize(
    "error", [pyarrow.ArrowInvalid("Invalid: bad page"), OSError("Corrupt snappy compressed data."), KeyError("text")]
)
def test_bad_contents_can_be_skipped(error: Exception) -> None:
    """What is stored wrongly will be so tomorrow: it is a bad document, counted once whatever number of streams."""
    shard = PartShard(config("huggingface"), "a", 1, rows=Failing(error), where="a/b")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a/b, after row 2: (.|\n)*data\.bad_documents=skip leaves"):
        list(shard.read())
    shard.config = config("huggingface", bad_documents=BadDocuments.skip)
    assert [document.content for document in shard.read()] == ["a", "b"]
    assert shard.skipped == {"unreadable file": 1}
    skipped: Counter[str] = Counter()
    for stream in range(3):
        shard.share = (stream, 3)
        list(shard.read(0, skipped))
    assert skipped == {"unreadable file": 1}


def test_damage_in_a_row_group_is_bad_contents(tmp_path: Path) -> None:
    """A parquet file whose pages are spoiled is refused with its place, or counted, and what is good is read."""
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file, row_group_size=125, use_dictionary=False)
    at = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[at : at + 60] = b"\xff" * 60
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet, row group 1, after row 0: "):
        texts(open_source(config("parquet", path=file)))
    source = open_source(config("parquet", path=file, bad_documents=BadDocuments.skip))
    assert texts(source) == TEXTS[:125]
    assert source.skipped == {"unreadable file": 1}
    file.unlink()
    with pytest.raises(DataError, match=r"a\.parquet, row group 0, after row 0: .*No such file"):
        texts(source)
