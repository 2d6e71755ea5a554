"""Documents from files: what is read, what is refused with file and line, and what is counted."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from titan.config.schema import BadDocuments, DataConfig, DataKind
from titan.data import file_source
from titan.data import shard as shard_module
from titan.data.source import Source, open_source
from titan.data.stream import Cursor, DocumentShare
from titan.errors import DataError

TEXTS = ["one", "two\nlines", "zażółć 漢字 🙂", "three"]


def jsonl(*texts: str) -> bytes:
    """Return one record a line."""
    return b"".join(json.dumps({"text": text, "id": index}).encode() + b"\n" for index, text in enumerate(texts))


def source(path: Path, kind: str = "jsonl", bad: str = "error", field: str = "text") -> Source:
    """Open files as the config does."""
    return open_source(
        DataConfig(kind=DataKind[kind], path=str(path), text_field=field, bad_documents=BadDocuments[bad])
    )


def contents(documents: Source) -> list[str]:
    """Return what all documents say."""
    return [str(document.content) for document in documents]


def write(path: Path, content: bytes) -> Path:
    """Write a file, compressed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_are_documents(tmp_path: Path, suffix: str) -> None:
    """Every line's field is a document, plain or compressed, and the account is right."""
    documents = source(write(tmp_path / f"a.jsonl{suffix}", jsonl(*TEXTS)))
    assert contents(documents) == TEXTS
    assert documents.documents == 4
    assert documents.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert not documents.skipped


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    """The whole file, to the byte, is one document."""
    text = "first\r\n\r\nsecond\n\x00 漢字\n"
    assert contents(source(write(tmp_path / f"a.txt{suffix}", text.encode()), "text")) == [text]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_large_files_are_read_whole(tmp_path: Path, suffix: str, kind: str) -> None:
    """Lines and files larger than any buffer arrive complete."""
    texts = ["x" * 3_000_000 + "end", "short", "漢" * 1_000_000]
    if kind == "jsonl":
        assert contents(source(write(tmp_path / f"a.jsonl{suffix}", jsonl(*texts)))) == texts
    else:
        assert contents(source(write(tmp_path / f"a.txt{suffix}", "".join(texts).encode()), "text")) == ["".join(texts)]


def test_reading_twice_gives_the_same_and_counts_once(tmp_path: Path) -> None:
    """Each iteration reads the files anew; its account replaces the one before."""
    documents = source(write(tmp_path / "a.jsonl", jsonl("a", "", "b")))
    assert contents(documents) == contents(documents) == ["a", "b"]
    assert (documents.documents, documents.text_bytes, documents.skipped) == (2, 2, {"empty": 1})


def test_a_folder_is_read_to_any_depth_in_order(tmp_path: Path) -> None:
    """All files of the right kind below a folder are read, sorted, hidden ones and others left alone."""
    write(tmp_path / "b" / "2.jsonl.gz", jsonl("third"))
    write(tmp_path / "b" / "1.jsonl", jsonl("second"))
    write(tmp_path / "a" / "z" / "9.ndjson.zst", jsonl("first"))
    write(tmp_path / "readme.md", b"not a record")
    write(tmp_path / ".hidden.jsonl", b"not a record")
    assert contents(source(tmp_path)) == ["first", "second", "third"]


def test_a_glob_picks_files_across_folders(tmp_path: Path) -> None:
    """** crosses folders, * does not."""
    write(tmp_path / "a" / "b" / "deep.jsonl", jsonl("deep"))
    write(tmp_path / "top.jsonl", jsonl("top"))
    write(tmp_path / "top.txt", jsonl("other"))
    assert contents(source(tmp_path / "*.jsonl")) == ["top"]
    assert contents(source(tmp_path / "**" / "*.jsonl")) == ["deep", "top"]


def test_brackets_in_a_name_are_a_name_if_the_file_is_there(tmp_path: Path) -> None:
    """A file called a[1].jsonl is found although its name reads as a pattern."""
    assert contents(source(write(tmp_path / "a[1].jsonl", jsonl("here")))) == ["here"]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    """A pattern that matches nothing, and a folder without files, name the path."""
    for path in (tmp_path / "*.jsonl", tmp_path):
        with pytest.raises(DataError, match=r"no files to read for data=jsonl, data\.path="):
            source(path)


def test_the_standard_library_is_there() -> None:
    """data=python_stdlib finds Python's own sources and no installed package."""
    documents = open_source(DataConfig(kind=DataKind.python_stdlib))
    names = {file.name for file in documents.files}
    assert {"argparse.py", "typing.py", "dataclasses.py"} <= names
    assert not any("site-packages" in file.parts for file in documents.files)
    assert documents.files == sorted(documents.files)


def test_blank_lines_are_no_documents(tmp_path: Path) -> None:
    """Blank lines separate and are neither documents nor mistakes; a last line may lack its end."""
    documents = source(write(tmp_path / "a.jsonl", b'\n{"text":"a"}\n   \n\r\n{"text":"b"}'))
    assert contents(documents) == ["a", "b"]
    assert not documents.skipped


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    """CRLF ends a line like LF, and what a document itself holds stays as it is."""
    content = b'{"text":"a\\r\\nb"}\r\n{"text":"c"}\r\n'
    assert contents(source(write(tmp_path / "a.jsonl", content))) == ["a\r\nb", "c"]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    """Files from other systems may start with one."""
    assert contents(source(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl("a", "b")))) == ["a", "b"]


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_empty_documents_are_counted(tmp_path: Path, kind: str) -> None:
    """A document without text is left out and counted, whatever bad_documents says."""
    write(tmp_path / "a.jsonl", jsonl("a") if kind == "jsonl" else b"a")
    write(tmp_path / "b.jsonl", jsonl("") if kind == "jsonl" else b"")
    documents = source(tmp_path, kind)
    assert contents(documents) == ["a"]
    assert documents.skipped == {"empty": 1}


GOOD = b'{"text":"good"}\n'
NESTED = b"[" * 100_000

BAD_LINES = {
    "broken JSON": (b'{"text": "a"\n', "broken JSON", "Expecting ',' delimiter"),
    "two records": (b'{"text":"a"}{"text":"b"}\n', "broken JSON", "Extra data"),
    "nested too deeply": (NESTED + b"\n", "broken JSON", "recursion"),
    "not UTF-8": (b'{"text":"caf\xe9"}\n', "not UTF-8", "byte 12"),
    "no field": (b'{"body":"a","id":3}\n', "no field 'text'", "it has 'body', 'id'"),
    "no object": (b'["text"]\n', "no field 'text'", "it is no object"),
    "a bare number": (b"7\n", "no field 'text'", "it is no object"),
    "not text": (b'{"text":7}\n', "'text' is not text", "of type int, not text"),
    "null": (b'{"text":null}\n', "'text' is not text", "of type NoneType, not text"),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, name: str, suffix: str) -> None:
    """The first bad line stops with file, line, what is wrong and what to type; blank lines count as lines."""
    line, _, words = BAD_LINES[name]
    path = write(tmp_path / f"a.jsonl{suffix}", GOOD + b"\n" + line + GOOD)
    with pytest.raises(DataError) as caught:
        contents(source(path))
    assert f"{path}, line 3: " in str(caught.value)
    assert words in str(caught.value)
    assert "data.bad_documents=skip" in str(caught.value)


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_skipped_and_counted_if_asked(tmp_path: Path, name: str) -> None:
    """With bad_documents=skip all other lines are read, and the reason is counted."""
    line, reason, _ = BAD_LINES[name]
    documents = source(write(tmp_path / "a.jsonl", GOOD + line + GOOD + line + GOOD), bad="skip")
    assert contents(documents) == ["good"] * 3
    assert documents.skipped == {reason: 2}


def test_every_reason_is_counted_apart(tmp_path: Path) -> None:
    """Different mistakes in one file are different counts."""
    content = GOOD + b"".join(line for line, _, _ in BAD_LINES.values()) + b'{"text":""}\n'
    documents = source(write(tmp_path / "a.jsonl", content), bad="skip")
    assert contents(documents) == ["good"]
    assert documents.skipped == {
        "broken JSON": 3,
        "not UTF-8": 1,
        "no field 'text'": 3,
        "'text' is not text": 2,
        "empty": 1,
    }


def test_the_field_has_the_name_that_the_config_says(tmp_path: Path) -> None:
    """data.text_field picks the field, and a missing one is explained with the key to set."""
    path = write(tmp_path / "a.jsonl", b'{"text":"no","body":"yes"}\n')
    assert contents(source(path, field="body")) == ["yes"]
    with pytest.raises(DataError, match=r"no field 'content' .*'text', 'body'(.|\n)*data\.text_field=NAME"):
        contents(source(path, field="content"))


def test_bytes_that_are_not_text_are_named_by_line(tmp_path: Path) -> None:
    """A text file that is not UTF-8 stops with the line of the first bad byte; skipped, the others are read."""
    path = write(tmp_path / "a.txt", b"one\ntwo\nthr\xffe\n")
    write(tmp_path / "b.txt", b"good")
    with pytest.raises(DataError, match=r"a\.txt, line 3: not UTF-8 \(invalid start byte at byte 11\)"):
        contents(source(tmp_path, "text"))
    documents = source(tmp_path, "text", bad="skip")
    assert contents(documents) == ["good"]
    assert documents.skipped == {"not UTF-8": 1}
    assert path in documents.files


def damaged(path: Path, kind: str) -> Path:
    """Write a file of several records in a compression, and damage it."""
    content = jsonl(*(str(number) * 50 for number in range(2000)))
    write(path, content)
    whole = path.read_bytes()
    if kind == "cut short":
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif kind == "cut at the end":
        path.write_bytes(whole[:-1])
    elif kind == "other bytes behind":
        path.write_bytes(whole + b"these are no compressed bytes")
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("damage", ["cut short", "cut at the end", "other bytes behind", "not compressed at all"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_damaged_archive_is_never_taken_for_its_end(tmp_path: Path, kind: str, suffix: str, damage: str) -> None:
    """A compressed file that is cut short or spoiled is an error, or counted; what is missing never goes unsaid."""
    path = damaged(tmp_path / f"a.jsonl{suffix}", damage)
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}"):
        contents(source(path, kind))
    documents = source(path, kind, bad="skip")
    read = contents(documents)
    assert documents.skipped["unreadable file"] == 1
    if kind == "text":
        assert read == []
    else:
        assert read == [str(number) * 50 for number in range(len(read))]


def test_a_damaged_archive_is_named_with_the_line_that_was_reached(tmp_path: Path) -> None:
    """The message of a jsonl file says how far reading came."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl("a", "b")) + gzip.compress(jsonl("c"))[:20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, after line 2: .*end-of-stream"):
        contents(source(path))


def test_zstd_frames_follow_each_other(tmp_path: Path) -> None:
    """A file may hold several frames, empty ones and skippable ones, as parallel compressors write them."""
    compress = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    content = jsonl(*TEXTS)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable + compress(content[:30]) + compress(b"") + skippable + compress(content[30:]))
    assert contents(source(path)) == TEXTS


def test_many_small_zstd_frames_are_read(tmp_path: Path) -> None:
    """One frame a record, more of them than a read takes, loses none."""
    compress = zstandard.ZstdCompressor().compress
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(compress(jsonl(str(number))) for number in range(10_000)))
    assert contents(source(path)) == [str(number) for number in range(10_000)]


def test_gzip_members_follow_each_other(tmp_path: Path) -> None:
    """Concatenated gzip files are one file."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl("a")) + gzip.compress(jsonl("b")))
    assert contents(source(path)) == ["a", "b"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_file_of_no_bytes_holds_no_documents(tmp_path: Path, suffix: str) -> None:
    """An empty file is no damaged one, not even in a compression that never writes one."""
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"")
    assert contents(source(path)) == []


@pytest.mark.parametrize("bad", ["error", "skip"])
def test_a_file_that_went_away_is_named(tmp_path: Path, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that names the file, in every piece of it, also where bad documents are skipped: none of them is bad."""
    monkeypatch.setattr(shard_module, "LEAST_PORTION_BYTES", 10)
    lines = source(write(tmp_path / "a.jsonl", GOOD * 3), bad=bad)
    text = source(write(tmp_path / "b.txt", GOOD), "text", bad)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl, after line 0: No such file"):
        contents(lines)
    with pytest.raises(DataError, match=r"a\.jsonl, after line 0 behind byte 10: No such file"):
        list(lines.shards[1].read())
    with pytest.raises(DataError, match=r"b\.txt: No such file"):
        contents(text)


def test_a_bad_line_of_a_file_that_went_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its lines cannot be counted any more, the place in the file says where it is."""
    monkeypatch.setattr(shard_module, "LEAST_PORTION_BYTES", 16)
    shard = source(write(tmp_path / "a.jsonl", GOOD + GOOD + b"broken\n")).shards[2]
    opened = file_source._open
    monkeypatch.setattr(file_source, "_open", lambda file: (opened(file), file.unlink())[0])
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 behind byte 32: broken JSON"):
        list(shard.read())


class Counting(io.BufferedReader):
    """A file that counts what is taken from it."""

    taken = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        Counting.taken += len(line)
        return line


@pytest.mark.parametrize("size", [39, 40, 41, 997, 998, 999, 1000])
def test_a_line_over_many_pieces_is_read_by_the_one_it_begins_in(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that a long line fills end at their own end, so that no byte is read more than a few times."""
    monkeypatch.setattr(shard_module, "LEAST_PORTION_BYTES", 20)
    texts = ["a", "b" * size, "c", "d" * 13, "", "e" * size]
    path = write(tmp_path / "a.jsonl", b"".join(b'{"text":"%b"}\n' % text.encode() for text in texts))
    monkeypatch.setattr(file_source, "_open", lambda file: Counting(io.FileIO(file)))
    monkeypatch.setattr(Counting, "taken", 0)
    documents = source(path)
    assert contents(documents) == [text for text in texts if text]
    assert len(documents.shards) > 2 * size // 20
    assert Counting.taken < 2.2 * path.stat().st_size + 100


def test_texts_of_other_streams_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that many streams share, each is read by one of them."""
    for number in range(10):
        write(tmp_path / f"{number}.txt", b"text")
    opened: list[Path] = []
    real = file_source._open
    monkeypatch.setattr(file_source, "_open", lambda file: opened.append(file) or real(file))
    documents = source(tmp_path, "text")
    for stream in range(8):
        assert list(DocumentShare(documents, stream, 8, "key").read(Cursor(), Counter()))
    assert sorted(opened) == documents.files


def test_a_damaged_archive_that_streams_share_is_counted_once(tmp_path: Path) -> None:
    """All of them come to the damage; the one that would have read on there counts it."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl("a", "b", "c")) + gzip.compress(jsonl("c"))[:20])
    documents, skipped = source(path, bad="skip"), Counter[str]()
    read = [list(DocumentShare(documents, stream, 5, "key").read(Cursor(), skipped)) for stream in range(5)]
    assert sum(map(len, read)) == 3
    assert skipped == {"unreadable file": 1}
