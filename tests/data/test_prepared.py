"""Prepared data: whole or absent, the same however it was made, found again, and refused where it is not sound."""

from __future__ import annotations

import errno
import gzip
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from titan.config.schema import BadDocuments, DataConfig, DataKind, SourceConfig, TokenizerConfig, TokenizerKind
from titan.data import prepare
from titan.data import shard as shard_module
from titan.data.mixture import check_tokenizer
from titan.data.prepare import Preparation, Progress, cache_folder, find_or_prepare, prepare_source
from titan.data.prepared import FORMAT, Part, PartWriter, Prepared, find_damage, open_prepared, token_dtype
from titan.data.rows import plan_rows
from titan.data.shard import Document, Shard
from titan.data.source import Source
from titan.data.tokenizer import build_tokenizer
from titan.errors import ConfigError, DataError
from titan.run_directory import unique_temporary

TOKENIZER = build_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes))
Report = Callable[[str, Progress], None]
TEXTS = ["first document", "zweites Dokument: ä", "x" * 1000]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Three documents, and a cache of their own."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataConfig(kind=DataKind.jsonl, path=str(file), cache_dir=str(tmp_path / "cache"))


def make(config: DataConfig, is_writer: bool = True, timeout_seconds: float = 0.3) -> Prepared:
    """Prepare with the tokenizer of bytes."""
    return find_or_prepare(config, Preparation(TOKENIZER, str(config.cache_dir), is_writer, timeout_seconds, 1))


def make_in(folder: Path, config: DataConfig, workers: int = 1, report: Report | None = None) -> Prepared:
    """Prepare into a folder with the tokenizer of bytes."""
    return prepare_source(config, folder, Preparation(TOKENIZER, "", workers=workers, report=report))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Two thousand documents that make many parts, of pieces of one file and of small files."""
    monkeypatch.setattr(shard_module, "LEAST_PORTION_BYTES", 20_000)
    folder = tmp_path / "many"
    folder.mkdir()
    for name, count in (("big", 1500), ("small_1", 20), ("small_2", 20), ("more", 500)):
        lines = [json.dumps({"text": f"{name} {number} " + "ä" * (number * 7 % 90)}) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n\n")
    return DataConfig(kind=DataKind.jsonl, path=str(folder), cache_dir=str(tmp_path / "cache"))


def test_documents_follow_each_other_between_begin_and_end(config: DataConfig) -> None:
    """The files hold every document's bytes in order, each between its begin and end of text, and nothing else."""
    prepared = make(config)
    expected = [token for text in TEXTS for token in (256, *text.encode(), 257)]
    tokens = prepared.open()[:]
    assert tokens.tolist() == expected
    assert tokens.dtype == np.uint16
    assert prepared.tokens == len(expected)
    assert prepared.documents == 3
    assert prepared.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert prepared.longest_document_tokens == 1002
    assert prepared.skipped == {}
    assert list(find_damage(prepared)) == []


def test_pieces_of_a_file_are_the_whole_file(many: DataConfig) -> None:
    """Cut into pieces anywhere, a file gives every line once and in order, and each knows its line."""
    prepared = make(many)
    assert len(prepared.parts) > 5
    folder = Path(str(many.path))
    files = [folder / f"{name}.jsonl" for name in ("big", "more", "small_1", "small_2")]
    expected = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines() if line]
    text = TOKENIZER.decode(prepared.open()[:].tolist())
    assert text.split("<|end_of_text|>")[:-1] == [f"<|begin_of_text|>{each}" for each in expected]
    shards = prepare.open_source(many).shards
    located = [shard.locate(document.record) for shard in shards for document in shard.read()]
    assert located == [
        f"{file}, line {number}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if line
    ]


@pytest.mark.parametrize("size", [0, 1, 64 << 20, 1 << 30, 10_000_000_000, 1 << 40, 1 << 50])
def test_portions_keep_processes_busy_and_files_few(size: int) -> None:
    """A source of 64 MiB has work for sixteen processes, one of a terabyte has no more than some thousand files."""
    portion = shard_module.portion_bytes(size)
    assert 4 << 20 <= portion <= 256 << 20
    assert portion == 4 << 20 or size / portion > 64
    assert size > 1 << 40 or size / portion <= 4096


def test_reading_from_a_record_on_is_the_rest(many: DataConfig) -> None:
    """`read(start)` yields what `read()` yields from that record on, in every piece."""
    for shard in prepare.open_source(many).shards:
        whole = list(shard.read())
        for start in (1, len(whole) // 2, len(whole) + 5):
            assert list(shard.read(start)) == [document for document in whole if document.record >= start]


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(many: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process or three, every file of the folder is the same."""
    monkeypatch.setattr(prepare, "_ALONE_BYTES", 0)
    folder = Path(str(many.cache_dir))
    found = [make_in(folder / str(n), many, n) for n in (1, 3)]
    assert contents(found[0].path) == contents(found[1].path)


def test_an_interruption_costs_what_was_not_done(many: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an end in the middle, whole parts are kept, half-written ones made anew, and the result is the same."""
    cache = Path(str(many.cache_dir))
    undisturbed = contents(make_in(cache / "undisturbed", many).path)
    original, read = Shard.read, []

    def fail_at_last(self: Shard, start: int = 0) -> Iterator[Document]:
        read.append(self.name)
        if len(read) == 6:
            raise KeyboardInterrupt
        return original(self, start)

    folder = cache / "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(Shard, "read", fail_at_last)
        with pytest.raises(KeyboardInterrupt):
            make_in(folder, many)
    assert not (folder / "manifest.json").exists()
    with pytest.raises(DataError, match="its preparation did not come to its end"):
        open_prepared(folder)
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("part_*.tokens")}
    assert len(done) >= 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 999_999_999)
        dead = unique_temporary(folder / "part_00009.tokens")
    dead.write_bytes(b"of a process that was killed")
    (folder / "part_00001.tokens").write_bytes(b"cut short")
    make_in(folder, many)
    assert contents(folder) == undisturbed
    kept = {name for name, time_ns in done.items() if (folder / name).stat().st_mtime_ns == time_ns}
    assert kept == set(done) - {"part_00001.tokens"}


def test_a_bad_document_keeps_what_was_done(config: DataConfig) -> None:
    """A bad document leaves no half-written file, and mending it is enough to go on."""
    path = Path(str(config.path))
    good = path.read_text()
    path.write_text(good + '{"text": \n')
    with pytest.raises(DataError, match="line 4: broken JSON"):
        make(config)
    assert not list(Path(str(config.cache_dir)).rglob("*.tmp"))
    path.write_text(good)
    assert make(config).documents == 3


def test_a_truncated_archive_is_named(config: DataConfig, tmp_path: Path) -> None:
    """A gz file that was cut short is an error with file and line, and nothing is taken for the data."""
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(Path(str(config.path)).read_bytes() * 99)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz, after line \d+: .*end-of-stream"):
        make(DataConfig(**{**vars(config), "path": str(path)}))


def test_what_was_prepared_is_used_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start reads no document and gets the same answer."""
    first = make(config)
    monkeypatch.setattr(Shard, "read", lambda self, start=0: pytest.fail("read again"))
    assert make(config) == make(config, is_writer=False) == first


def test_a_changed_file_is_prepared_anew(config: DataConfig) -> None:
    """Other contents, even of the same length, are noticed by the file's time; the old tokens stay beside."""
    first = make(config)
    path = Path(str(config.path))
    path.write_text(path.read_text().replace("first", "other"))
    os.utime(path, ns=(0, 1))
    second = make(config)
    assert bytes(second.open()[1:6].tolist()) == b"other"
    assert bytes(first.open()[1:6].tolist()) == b"first"


@pytest.mark.parametrize("change", [{"text_field": "body"}, {"bad_documents": BadDocuments.skip}])
def test_options_that_change_the_tokens_make_another_folder(config: DataConfig, change: dict) -> None:
    """Another field, or leaving bad documents out, is never answered from the cache of the other."""
    other = DataConfig(**{**vars(config), **change})
    assert cache_folder(config, "cache", "t") != cache_folder(other, "cache", "t")
    assert cache_folder(config, "cache", "t") != cache_folder(config, "cache", "other tokenizer")
    assert cache_folder(config, "a", "t").name == cache_folder(config, "b", "t").name


def test_waiting_ends_in_vain_or_with_the_writer(config: DataConfig) -> None:
    """Others wait for the writer as long as it shows signs of life, and no longer."""
    began = time.monotonic()
    with pytest.raises(DataError, match="waited 0 s for another rank to tokenise the data into"):
        make(config, is_writer=False)
    assert 0.3 <= time.monotonic() - began < 5
    writer = threading.Timer(0.2, lambda: make(config))
    writer.start()
    try:
        assert make(config, is_writer=False, timeout_seconds=30).documents == 3
    finally:
        writer.join()


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": ""}\n'])
def test_no_text_at_all_is_an_error(config: DataConfig, content: str) -> None:
    """Files without a single document stop the run and say why there is none."""
    Path(str(config.path)).write_text(content)
    reason = ": 2 empty" if content.startswith("{") else ""
    with pytest.raises(DataError, match=rf"no text in 1 files \(.*data\.jsonl\){reason}$"):
        make(config)


def test_a_folder_that_cannot_be_written_is_named(config: DataConfig, tmp_path: Path) -> None:
    """The user's mistake is explained with what to type, not with a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.* cannot be written: .*(.|\n)*Try  data\.cache_dir="):
        make(DataConfig(**{**vars(config), "cache_dir": str(tmp_path / "file")}))


def test_a_folder_with_other_data_is_left_alone(config: DataConfig, many: DataConfig, tmp_path: Path) -> None:
    """--to a folder of other data is refused, whether that is whole or was interrupted."""
    folder = tmp_path / "to"
    make_in(folder, config)
    before = contents(folder)
    with pytest.raises(DataError, match=r"holds other data: data\.kind=jsonl"):
        make_in(folder, many)
    assert contents(folder) == before
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds a part of other data"):
        make_in(folder, many)


def test_a_damaged_manifest_is_refused(config: DataConfig) -> None:
    """A manifest of other contents than its checksum, of no JSON, or of another format names itself."""
    prepared = make(config)
    file = prepared.path / "manifest.json"
    text = file.read_text()
    for damaged, words in (
        (text.replace('"documents": 3', '"documents": 4', 1), "its checksum is not that of its contents"),
        (text[: len(text) // 2], "is damaged"),
        (text.replace(f'"format": {FORMAT}', '"format": 99'), "is of format 99"),
        ("[]", "is of format None"),
    ):
        file.write_text(damaged)
        with pytest.raises(DataError, match=rf"manifest\.json.*{words}"):
            open_prepared(prepared.path)
    file.unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json(.|\n)*titan\.prepare --to"):
        open_prepared(prepared.path)


def test_a_file_that_was_cut_short_is_refused(config: DataConfig) -> None:
    """A missing or shorter file is found when the folder is opened, and while it is read."""
    prepared = make(config)
    reader, file = prepared.open(), prepared.path / "part_00000.tokens"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(DataError, match=r"part_00000\.tokens has 2,0\d\d bytes, where its manifest says 2,0\d\d"):
        open_prepared(prepared.path)
    with pytest.raises(DataError, match=r"part_00000\.tokens ends before entry"):
        reader[:]
    file.unlink()
    with pytest.raises(DataError, match=r"part_00000\.tokens is missing"):
        open_prepared(prepared.path)


def test_one_wrong_bit_is_found_by_its_checksum(config: DataConfig) -> None:
    """Verify names the file whose bytes are others, even if it is as long as before."""
    prepared = make(config)
    file = prepared.path / "part_00000.documents"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(bytes(content))
    assert [line.split(" is damaged")[0] for line in find_damage(open_prepared(prepared.path))] == [str(file)]


def test_another_tokenizer_is_refused(config: DataConfig) -> None:
    """Data that was prepared with another tokenizer is never trained on; both fingerprints are named."""
    prepared = make(config)
    check_tokenizer(prepared, TOKENIZER)
    other = Prepared(**{**vars(prepared), "tokenizer": "f" * 64})
    with pytest.raises(DataError, match=r"ffffffffffff of 258 tokens, but this run has (.|\n)*titan\.prepare --to"):
        check_tokenizer(other, TOKENIZER)


def test_what_was_left_out_is_counted(tmp_path: Path) -> None:
    """Documents left out are counted by reason, in the manifest too."""
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "' + "a" * 98 + '"}\n{"text": ""}\nbroken\nbroken too\n')
    config = DataConfig(DataKind.jsonl, str(file), cache_dir=str(tmp_path), bad_documents=BadDocuments.skip)
    assert make(config).skipped == make(config).skipped == {"broken JSON": 2, "empty": 1}


def test_progress_is_told(many: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits hears how many documents and tokens are done, up to the last."""
    monkeypatch.setattr(prepare, "_REPORT_SECONDS", 0)
    heard: list[Progress] = []
    prepared = make_in(Path(str(many.cache_dir)), many, report=lambda _, progress: heard.append(progress))
    assert (heard[-1].documents, heard[-1].tokens) == (prepared.documents, prepared.tokens)
    assert heard[0].seconds_left is None
    assert all(progress.seconds_left is not None for progress in heard[1:])


def test_tokens_are_stored_in_the_smallest_type_that_holds_them() -> None:
    """Sixteen bits up to 65,536 tokens, thirty-two beyond."""
    assert token_dtype(258) is np.uint16
    assert token_dtype(65_536) is np.uint16
    assert token_dtype(65_537) is np.uint32


def test_parts_that_another_machine_has_made_are_not_made_again(
    many: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before one begins, they are taken; found when one has ended, its own is given up, and no file changes."""
    folder, original = Path(str(many.cache_dir)) / "shared", prepare._make_part
    elsewhere = make_in(folder.with_name("elsewhere"), many)
    made: list[int] = []

    def make_part(folder: Path, index: int, *given) -> Part:
        if index == 0:  # the other machine makes all but the last, and this one while it is at it
            for file in elsewhere.path.glob("part_*"):
                if elsewhere.parts[-1].name not in file.name:
                    shutil.copy(file, folder)
            part = elsewhere.parts[0]
            (folder / f"{part.name}.json").rename(folder / "hidden")
            monkeypatch.setattr(PartWriter, "finish", finish)
        return original(folder, index, *given)

    def finish(writer: PartWriter, text_bytes: int, skipped: dict[str, int]) -> Part:
        if (folder / "hidden").exists():
            (folder / "hidden").rename(folder / f"{writer.name}.json")
            before.update({file.name: file.stat().st_ino for file in folder.glob("part_*")})
        made.append(int(writer.name[-5:]))
        return original_finish(writer, text_bytes, skipped)

    before: dict[str, int] = {}
    original_finish = PartWriter.finish
    monkeypatch.setattr(prepare, "_make_part", make_part)
    heard: list[Progress] = []
    monkeypatch.setattr(prepare, "_REPORT_SECONDS", 0)
    prepared = make_in(folder, many, report=lambda _, progress: heard.append(progress))
    assert made == [0, len(elsewhere.parts) - 1]
    assert {name: (folder / name).stat().st_ino for name in before} == before
    assert contents(folder) == contents(elsewhere.path)
    assert heard[-1].documents == prepared.documents


def test_machines_at_the_same_folder_choose_other_parts(tmp_path: Path) -> None:
    """Alone, parts are made in their order; beside another in any order; each once."""
    with prepare.sign_of_life(tmp_path):
        assert list(prepare._in_turn(list(range(200)), tmp_path)) == list(range(200))
        with prepare.sign_of_life(tmp_path):
            orders = [list(prepare._in_turn(list(range(200)), tmp_path)) for _ in range(2)]
    assert all(sorted(order) == list(range(200)) for order in orders)
    assert orders[0] != orders[1]
    assert not (tmp_path / ".writers").exists()


def test_a_manifest_that_is_there_is_not_replaced(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that comes second leaves what others read by now."""
    first = make(config)
    file = first.path / "manifest.json"
    text, number = file.read_text(), file.stat().st_ino
    hidden = file.rename(file.with_name("hidden"))
    original = prepare._make_parts

    def make_parts(*given) -> list[Part]:
        found = original(*given)
        hidden.rename(file)
        return found

    monkeypatch.setattr(prepare, "_make_parts", make_parts)
    assert make(config) == first
    assert (file.read_text(), file.stat().st_ino) == (text, number)


def test_those_that_wait_see_that_the_writer_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before there is anything of the data, as while a dataset is fetched; and nothing of the sign stays."""
    monkeypatch.setattr(prepare, "_BEAT_SECONDS", 0.05)
    folder, began = tmp_path / "not there yet", time.monotonic()
    with prepare.sign_of_life(folder):
        prepare.wait_for(lambda: time.monotonic() - began > 2, folder, timeout_seconds=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"no sign of life(.|\n)*data\.cache_dir"):
        prepare.wait_for(lambda: False, folder, timeout_seconds=0.2)


def test_the_sign_of_life_is_there_while_a_source_is_opened(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset is fetched when it is opened, which takes longer than anyone would wait."""
    original, found = prepare.open_source, []

    def open_slowly(config: SourceConfig) -> Source:
        found.extend(cache.rglob(".writers/*"))
        return original(config)

    cache = Path(str(config.cache_dir))
    monkeypatch.setattr(prepare, "open_source", open_slowly)
    prepared = make(config)
    assert len(found) == 1
    assert not (prepared.path / ".writers").exists()


def test_the_disk_has_a_file_before_it_has_its_name(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a part that says it is whole would outlive its tokens, if the power goes."""
    synced: set[int] = set()
    fsync, replace = os.fsync, os.replace

    def note(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def check(source: Path, target: Path) -> None:
        assert source.stat().st_ino in synced, target
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    prepared = make(config)
    plan_rows(prepared, 64, None)
    assert len(synced) >= 3 + 1 + 2 + 2


def test_a_source_that_vanishes_is_named(many: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is told as that, with its name, not as a folder that cannot be written."""
    original = prepare._make_part

    def make_part(folder: Path, index: int, *given) -> Part:
        if index == 1:
            (Path(str(many.path)) / "big.jsonl").unlink()
        return original(folder, index, *given)

    monkeypatch.setattr(prepare, "_make_part", make_part)
    with pytest.raises(DataError, match=r"big\.jsonl.*No such file") as caught:
        make(many)
    assert "written" not in str(caught.value)


def test_a_shard_that_raises_is_named(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk in the middle of a file says which file, whatever reads it."""

    def fail(self: Shard, start: int = 0) -> Iterator[Document]:
        yield Document("fine", 0)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Shard, "read", fail)
    with pytest.raises(DataError, match=r"data\.jsonl cannot be read: Input/output error"):
        make(config)


def test_a_disk_that_is_full_is_told_as_that(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a part is written, with what to type, and nothing half-written stays."""

    def full(*given) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PartWriter, "_write", full)
    with pytest.raises(DataError, match=r"cannot be written: No space left(.|\n)*Try  data\.cache_dir="):
        make(config)
    assert not list(Path(str(config.cache_dir)).rglob("*.tmp"))


def test_a_process_without_its_tokenizer_says_so(config: DataConfig, tmp_path: Path) -> None:
    """What is wrong in a process that tokenises arrives as it is, with its exit code; it would have broken the pool."""
    missing = TokenizerConfig(kind=TokenizerKind.huggingface, path=str(tmp_path / "gone"))
    prepare._make_ready(missing, config, None)
    with pytest.raises(ConfigError, match="gone") as caught:
        prepare._work(tmp_path, 0, [])
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.problems == caught.value.problems


def test_a_disk_that_goes_away_is_told(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while tokens are read, as a shared disk gives for a file that was replaced, names the file."""
    reader = make(config).open()
    reader[:1]

    def stale(*given) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "preadv", stale)
    with pytest.raises(DataError, match=r"part_00000\.tokens cannot be read: Stale file handle\n  See that"):
        reader[:1]
