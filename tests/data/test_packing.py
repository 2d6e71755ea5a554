"""Tokenised text on disk: whole or absent, reused while nothing changes, shared by the ranks of a machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from titan.config.schema import BadDocuments, DataConfig, DataKind, TokenizerConfig, TokenizerKind
from titan.data import packing
from titan.data.packing import PackedTokens, pack_tokens, token_dtype
from titan.data.source import Document, Source
from titan.data.tokenizer import build_tokenizer
from titan.errors import DataError

TOKENIZER = build_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes))
TEXTS = ["first document", "zweites Dokument: ä", "x" * 1000]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Three documents, and a cache of their own."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataConfig(kind=DataKind.jsonl, path=str(file), cache_dir=str(tmp_path / "cache"))


def pack(config: DataConfig, is_writer: bool = True, timeout_seconds: float = 0.3) -> PackedTokens:
    """Pack with the tokenizer of bytes."""
    return pack_tokens(config, config.cache_dir, TOKENIZER, is_writer, timeout_seconds)


def files_below(folder: str | None) -> list[str]:
    """Return all files below a folder."""
    assert folder is not None
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count how often a source is read."""
    seen: list[str] = []
    original = Source.__iter__

    def counting(self: Source):
        seen.append(str(self.config.path))
        return original(self)

    monkeypatch.setattr(Source, "__iter__", counting)
    return seen


def test_documents_follow_each_other_between_begin_and_end(config: DataConfig) -> None:
    """The file holds every document's bytes in order, each between its begin and end of text, and nothing else."""
    packed = pack(config)
    expected = [token for text in TEXTS for token in (256, *text.encode(), 257)]
    tokens = packed.open()[:]
    assert tokens.tolist() == expected
    assert tokens.dtype == np.uint16
    assert packed.tokens == len(expected)
    assert packed.documents == 3
    assert packed.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert packed.longest_document_tokens == 1002
    assert packed.skipped == {}


def test_a_file_that_was_cut_short_is_an_error(config: DataConfig) -> None:
    """Tokens that are not there are not taken for the end of the data."""
    packed = pack(config)
    packed.path.write_bytes(packed.path.read_bytes()[:-10])
    tokens = packed.open()
    assert len(tokens[: packed.tokens - 5]) == packed.tokens - 5
    with pytest.raises(DataError, match="ends before token"):
        tokens[packed.tokens - 6 :]


def test_tokens_are_stored_in_the_smallest_type_that_holds_them() -> None:
    """Sixteen bits up to 65,536 tokens, thirty-two beyond."""
    assert token_dtype(258) is np.uint16
    assert token_dtype(65_536) is np.uint16
    assert token_dtype(65_537) is np.uint32
    assert np.iinfo(token_dtype(65_536)).max == 65_535


def test_what_was_packed_is_used_again(config: DataConfig, reads: list[str]) -> None:
    """A second run reads no document and gets the same answer, from the same file."""
    first = pack(config)
    assert pack(config) == first
    assert pack(config, is_writer=False) == first
    assert len(reads) == 1


def test_a_changed_file_is_packed_anew(config: DataConfig, reads: list[str]) -> None:
    """Other contents, even of the same length, are noticed by the file's time; the old tokens stay beside."""
    first = pack(config)
    path = Path(str(config.path))
    text = path.read_text()
    path.write_text(text.replace("first", "other"))
    os.utime(path, ns=(0, 1))
    second = pack(config)
    assert len(reads) == 2
    assert second.path != first.path
    assert bytes(second.open()[1:6].tolist()) == b"other"
    assert bytes(first.open()[1:6].tolist()) == b"first"


def test_a_new_file_in_the_folder_is_packed_with_the_others(tmp_path: Path) -> None:
    """The list of files is part of what the tokens depend on."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("b")
    config = DataConfig(kind=DataKind.text, path=str(folder), cache_dir=str(tmp_path / "cache"))
    assert pack(config).documents == 1
    (folder / "a.txt").write_text("a")
    assert pack(config).open()[:].tolist() == [256, ord("a"), 257, 256, ord("b"), 257]


@pytest.mark.parametrize("change", [{"text_field": "body"}, {"bad_documents": BadDocuments.skip}])
def test_options_that_change_the_tokens_make_another_file(tmp_path: Path, change: dict) -> None:
    """Another field, or leaving bad documents out, is never answered from the cache of the other."""
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a", "body": "b"}\n')
    config = DataConfig(kind=DataKind.jsonl, path=str(file), cache_dir=str(tmp_path / "cache"))
    other = DataConfig(**{**vars(config), **change})
    assert pack(config).path != pack(other).path


def test_where_the_cache_lies_changes_nothing(config: DataConfig, tmp_path: Path) -> None:
    """The name of the tokens depends on the data alone, so a shared cache serves all."""
    other = DataConfig(**{**vars(config), "cache_dir": str(tmp_path / "elsewhere")})
    assert pack(config).path.parent.name == pack(other).path.parent.name


def test_another_process_gets_what_the_writer_writes(config: DataConfig) -> None:
    """A rank that does not write waits for the file and reads the same tokens."""
    program = (
        "import sys, json\n"
        "from titan.config.schema import *\n"
        "from titan.data.packing import pack_tokens\n"
        "from titan.data.tokenizer import build_tokenizer\n"
        "tokenizer = build_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes))\n"
        "config = DataConfig(kind=DataKind.jsonl, path=sys.argv[1], cache_dir=sys.argv[2])\n"
        "print('waiting', flush=True)\n"
        "print(json.dumps(pack_tokens(config, config.cache_dir, tokenizer, False, 60).open()[:].tolist()))\n"
    )
    arguments = [sys.executable, "-c", program, str(config.path), str(config.cache_dir)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        assert process.poll() is None
        packed = pack(config)
        assert json.loads(process.stdout.readline()) == packed.open()[:].tolist()
    assert process.returncode == 0


def test_waiting_in_vain_ends(config: DataConfig) -> None:
    """Without a sign of life from a writer the wait is an error after the time that was given."""
    start = time.monotonic()
    with pytest.raises(DataError, match="waited 0 s for another rank to tokenise the data into"):
        pack(config, is_writer=False, timeout_seconds=0.3)
    assert 0.3 <= time.monotonic() - start < 5


def test_waiting_goes_on_while_the_writer_writes(config: DataConfig) -> None:
    """The time is counted from the last sign of life, so a large corpus needs no larger timeout."""
    folder = pack(config).path.parent
    index = (folder / "index.json").read_text()
    (folder / "index.json").unlink()
    (folder / "tokens.bin").rename(folder / "kept")

    def write_slowly() -> None:
        with (folder / ".tokens.host.1.tmp").open("wb") as file:
            for _ in range(12):
                file.write(b"12")
                file.flush()
                time.sleep(0.1)
        (folder / "kept").rename(folder / "tokens.bin")
        (folder / ".index").write_text(index)
        (folder / ".index").rename(folder / "index.json")

    writer = threading.Thread(target=write_slowly)
    writer.start()
    try:
        assert pack(config, is_writer=False, timeout_seconds=0.6).documents == 3
    finally:
        writer.join()


def test_a_failed_writing_leaves_nothing_behind(config: DataConfig) -> None:
    """A bad document in the middle leaves no half-written file, and mending it is enough to go on."""
    path = Path(str(config.path))
    good = path.read_text()
    path.write_text(good + '{"text": \n')
    with pytest.raises(DataError, match="line 4: broken JSON"):
        pack(config)
    assert files_below(config.cache_dir) == []
    path.write_text(good)
    assert pack(config).documents == 3
    assert files_below(config.cache_dir) == ["index.json", "tokens.bin"]


def test_an_interrupted_writing_leaves_nothing_behind(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even Ctrl-C in the middle of tokenising leaves a file that could be taken for a whole one."""

    def interrupted(self: Source):
        yield Document("some text", 0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Source, "__iter__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(config)
    assert files_below(config.cache_dir) == []
    assert pack(config).documents == 3


def test_tokens_without_their_index_are_written_again(config: DataConfig, reads: list[str]) -> None:
    """A crash between the two files costs the work, not the truth: the index is what makes tokens valid."""
    packed = pack(config)
    (packed.path.parent / "index.json").unlink()
    packed.path.write_bytes(b"garbage")
    assert pack(config) == packed
    assert packed.open()[:1].tolist() == [256]
    assert len(reads) == 2


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": ""}\n'])
def test_no_text_at_all_is_an_error(config: DataConfig, content: str) -> None:
    """Files without a single document stop the run and say why there is none."""
    Path(str(config.path)).write_text(content)
    reason = ": 2 empty" if content.startswith("{") else ""
    with pytest.raises(DataError, match=rf"no text in 1 files \(.*data\.jsonl\){reason}$"):
        pack(config)
    assert files_below(config.cache_dir) == []


def test_a_cache_that_cannot_be_written_is_named(config: DataConfig, tmp_path: Path) -> None:
    """The user's mistake is explained with the key to set, not with a traceback."""
    (tmp_path / "file").write_text("")
    other = DataConfig(**{**vars(config), "cache_dir": str(tmp_path / "file")})
    with pytest.raises(DataError, match=r"data\.cache_dir = .*file cannot be written: .*(.|\n)*Try  data\.cache_dir="):
        pack(other)


def test_what_was_left_out_is_reported(tmp_path: Path) -> None:
    """The description counts documents by reason, and says that long ones go on in the next row."""
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "' + "a" * 98 + '"}\n{"text": ""}\nbroken\nbroken too\n')
    config = DataConfig(
        kind=DataKind.jsonl, path=str(file), cache_dir=str(tmp_path / "cache"), bad_documents=BadDocuments.skip
    )
    packed = pack(config)
    assert pack(config).skipped == {"empty": 1, "broken JSON": 2}
    assert packed.describe(seq_len=64) == [
        "1 document, 0.1 kB of text, 100 tokens (0.98 bytes a token)",
        "documents longer than a row of 64 go on in the next; the longest has 100 tokens",
        "left out 2 documents: broken JSON",
        "left out 1 document: empty",
    ]
    assert len(packed.describe(seq_len=100)) == 3


def test_two_writers_at_once_agree(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ranks of two machines on one file system do not disturb each other, and either result is whole."""
    original, pid = Source.__iter__, os.getpid()
    inner: list[PackedTokens] = []

    def overtaken(self: Source):
        for number, text in enumerate(original(self)):
            if number == 1:
                with monkeypatch.context() as patch:
                    patch.setattr(Source, "__iter__", original)
                    patch.setattr(packing.os, "getpid", lambda: pid + 1)
                    inner.append(pack(config))
            yield text

    monkeypatch.setattr(Source, "__iter__", overtaken)
    outer = pack(config)
    assert inner == [outer]
    assert bytes(outer.open()[1:6].tolist()) == b"first"
    assert files_below(config.cache_dir) == ["index.json", "tokens.bin"]
