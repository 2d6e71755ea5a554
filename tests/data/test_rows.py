"""Rows against a plain list of tokens: cut, packed, masked and learned, over any parts."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from titan.data import open_files
from titan.data.batch import IGNORED_LABEL
from titan.data.packing import pack_best_fit
from titan.data.prepared import BLOCK_TOKENS, PartWriter, Prepared, open_prepared, write_manifest
from titan.data.rows import PreparedRows, find_plan_damage, plan_rows
from titan.errors import DataError
from titan.prepare import show

PADDING = 999
LENGTHS = [[3, 40, 2, 9000, 7], [], [5, 5, 5, 5], [4096, 4096, 1, 2, 300]]
"""Documents of the parts; one part is empty, one begins a document where a block begins."""


def documents() -> list[list[np.ndarray]]:
    """Return tokens, the documents of each part."""
    generator = np.random.default_rng(1)
    return [[generator.integers(0, 900, length) for length in part] for part in LENGTHS]


def learned_of(tokens: np.ndarray) -> np.ndarray:
    """Return which tokens are learned: those that are odd."""
    return tokens % 2 == 1


def build(folder: Path, has_learned: bool = False) -> Prepared:
    """Write the documents as parts."""
    parts = []
    for index, part in enumerate(documents()):
        writer = PartWriter(folder, f"part_{index:05d}", [f"file {index}"], 1000, has_learned)
        for record, tokens in enumerate(part):
            writer.add(tokens, learned_of(tokens) if has_learned else None, 10 * record, 0)
        parts.append(writer.finish(0, {}))
    prepared = Prepared(folder, "tokenizer", 1000, {}, "", parts)
    write_manifest(prepared)
    return open_prepared(folder)


def flat() -> tuple[list[int], list[int]]:
    """Return all tokens, and for each where its document begins."""
    tokens: list[int] = []
    starts: list[int] = []
    for part in documents():
        for document in part:
            starts += [len(tokens)] * len(document)
            tokens += document.tolist()
    return tokens, starts


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
@pytest.mark.parametrize("has_learned", [False, True])
def test_cut_rows_are_slices_of_all_tokens(tmp_path: Path, seq_len: int, has_learned: bool) -> None:
    """Row r holds tokens r*S on, the labels are the next ones, starts are the documents', the end is padding."""
    rows = PreparedRows(build(tmp_path, has_learned), seq_len, PADDING, mask_documents=True)
    tokens, starts = flat()
    assert len(rows) == -(-(len(tokens) - 1) // seq_len)
    chosen = sorted({0, 1 % len(rows), len(rows) // 2, len(rows) - 1, *range(0, len(rows), max(1, len(rows) // 50))})
    found = rows.read(chosen)
    assert found.starts is not None
    for index, row in enumerate(chosen):
        at = [row * seq_len + i for i in range(seq_len)]
        labels = [tokens[p + 1] if p + 1 < len(tokens) else IGNORED_LABEL for p in at]
        if has_learned:
            labels = [label if label % 2 == 1 else IGNORED_LABEL for label in labels]
        assert found.inputs[index].tolist() == [tokens[p] if p < len(tokens) else PADDING for p in at]
        assert found.labels[index].tolist() == labels
        begins = [max(0, starts[min(p, len(tokens) - 1)] - row * seq_len) for p in at]
        assert found.starts[index].tolist() == begins
        one = rows[row]
        assert all(np.array_equal(a, b) for a, b in zip(one, found.at(index), strict=True) if a is not None)
    assert PreparedRows(rows.prepared, seq_len, PADDING)[0].starts is None


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
@pytest.mark.parametrize("has_learned", [False, True])
def test_packed_rows_are_the_segments_of_the_plan(tmp_path: Path, seq_len: int, has_learned: bool) -> None:
    """Each segment's tokens, labels and start are its document's, and what is left of a row is padding."""
    prepared = build(tmp_path, has_learned)
    plan = plan_rows(prepared, seq_len, None)
    rows = PreparedRows(prepared, seq_len, PADDING, plan, mask_documents=True)
    every = [tokens for part in documents() for tokens in part]
    wanted = pack_best_fit([len(tokens) for tokens in every], seq_len)
    assert len(rows) == len(wanted)
    found = pickle.loads(pickle.dumps(rows)).read(range(len(rows)))
    for index, segments in enumerate(wanted):
        inputs, labels, starts = [], [], []
        for document, first, length in segments:
            starts += [len(inputs)] * length
            inputs += every[document][first : first + length].tolist()
            next_tokens = every[document][first + 1 : first + length + 1].tolist()
            labels += [t if t % 2 == 1 or not has_learned else IGNORED_LABEL for t in next_tokens]
        room = seq_len - len(inputs)
        assert found.inputs[index].tolist() == inputs + [PADDING] * room
        assert found.labels[index].tolist() == labels + [IGNORED_LABEL] * room
        assert found.starts[index].tolist() == starts + [len(inputs)] * room
    used = sum(length for segments in wanted for _, _, length in segments)
    assert plan.padding_share == pytest.approx(1 - used / (len(wanted) * seq_len))
    assert f"{plan.padding_share:.2%} of all positions are padding" in rows.describe()[1]


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_documents_of_a_row_are_its_tokens(tmp_path: Path, is_packed: bool) -> None:
    """Replay names part, record, document and place of every piece, and their tokens are the row's inputs."""
    prepared, seq_len = build(tmp_path), 100
    plan = plan_rows(prepared, seq_len, None) if is_packed else None
    rows = PreparedRows(prepared, seq_len, PADDING, plan)
    every = [(index, record, tokens) for index, part in enumerate(documents()) for record, tokens in enumerate(part)]
    for row in range(len(rows)):
        inputs, at = rows[row].inputs.tolist(), 0
        for piece in rows.documents_of(row):
            part, record, tokens = every[piece.document]
            assert (piece.shard, piece.record) == (f"file {part}", 10 * record)
            assert (piece.position, piece.document_tokens) == (at, len(tokens))
            assert tokens[piece.first : piece.first + piece.length].tolist() == inputs[at : at + piece.length]
            assert rows.read_tokens(piece).tolist() == inputs[at : at + piece.length]
            assert rows.read_tokens(piece, whole=True).tolist() == tokens.tolist()
            at += piece.length
        assert set(inputs[at:]) <= {PADDING}


def test_documents_are_found_wherever_one_looks(tmp_path: Path) -> None:
    """The index of blocks gives the documents of any range of tokens, at the edges of blocks and parts too."""
    reader = build(tmp_path).open()
    starts = sorted(set(flat()[1]))
    edges = sorted({*starts, *(s + 1 for s in starts), *range(0, len(reader), BLOCK_TOKENS), len(reader)})
    for low in edges[:-1]:
        for high in edges:
            if low < high:
                first, found = reader.documents_in(low, high)
                wanted = [start for start in starts if low <= start < high]
                assert found["start"].tolist() == wanted
                assert not wanted or first == starts.index(wanted[0])
    lengths = [length for part in reader.document_lengths(2) for length in part.tolist()]
    assert lengths == [length for part in LENGTHS for length in part]


def test_a_plan_is_made_once_and_made_anew_for_other_data(tmp_path: Path) -> None:
    """The plan beside the data is taken if it is for this data and whole, and is made again otherwise."""
    prepared = build(tmp_path)
    plan = plan_rows(prepared, 64, None)
    before = {path.name: path.stat().st_mtime_ns for path in plan.folder.iterdir()}
    assert plan_rows(prepared, 64, None, is_writer=False) == plan
    assert {path.name: path.stat().st_mtime_ns for path in plan.folder.iterdir()} == before
    (plan.folder / "segments").write_bytes(b"short")
    assert plan_rows(prepared, 64, None) == plan
    assert len(PreparedRows(prepared, 64, PADDING, plan).segments_of(0)) >= 1
    with pytest.raises(DataError, match="waited 0 s"):
        plan_rows(replace(prepared, parts=prepared.parts[:1]), 64, None, is_writer=False, timeout_seconds=0.2)


@pytest.mark.parametrize("name", ["segments", "rows", "plan.json"])
def test_a_plan_of_other_bytes_is_found_by_its_checksum(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verify reads the plans beside the data too, and names the file; a whole plan is sound."""
    prepared = build(tmp_path)
    plan = plan_rows(prepared, 64, None)
    assert list(find_plan_damage(prepared)) == []
    file = plan.folder / name
    content = file.read_bytes()
    changes = {
        "segments": content[24:36] + content[12:],
        "rows": content[:8] + b"\7" + content[9:],
        "plan.json": content.replace(b'"cut_documents": 4', b'"cut_documents": 5'),
    }
    file.write_bytes(changes[name])
    assert len(file.read_bytes()) == len(content)
    assert file.read_bytes() != content
    (told,) = find_plan_damage(prepared)
    assert told.startswith(f"{plan.folder if name == 'plan.json' else file} is damaged")
    assert not show.verify_main([str(tmp_path)])
    assert str(plan.folder) in capsys.readouterr().out
    if name == "plan.json":  # which is found at opening
        assert plan_rows(prepared, 64, None) == plan
        assert list(find_plan_damage(prepared)) == []


def test_a_plan_that_goes_bad_while_it_is_read_names_itself(tmp_path: Path) -> None:
    """Cut short, of numbers that cannot be, or gone: an error with the file and what to do, never other rows."""
    prepared = build(tmp_path)
    plan = plan_rows(prepared, 64, None)
    rows = PreparedRows(prepared, 64, PADDING, plan)
    files = {name: plan.folder / name for name in ("segments", "rows")}
    content = {name: file.read_bytes() for name, file in files.items()}
    for name, damaged, words in (
        ("segments", b"", "ends before entry"),
        ("rows", content["rows"][:20], "ends before entry"),
        ("rows", b"\xff" * len(content["rows"]), "row 5 cannot be"),
        ("segments", b"\xff" * len(content["segments"]), "row 5 cannot be"),
    ):
        files[name].write_bytes(damaged)
        with pytest.raises(DataError, match=rf"rows_64.*{words}(.|\n)*Delete .*rows_64: the next run makes it anew"):
            rows.read([5])
        files[name].write_bytes(content[name])
    rows.read([5])
    gone = PreparedRows(prepared, 64, PADDING, plan)
    shutil.rmtree(plan.folder)
    with pytest.raises(DataError, match=r"rows_64/rows cannot be read: No such file(.|\n)*makes it anew"):
        gone.read([5])


def test_many_files_are_read_through_few_descriptors(tmp_path: Path) -> None:
    """More components and parts than a process may have files open, in it and in one forked off; all are closed."""
    before = len(os.listdir("/proc/self/fd"))
    readers = []
    for number in range(4):
        parts = []
        (tmp_path / str(number)).mkdir()
        for index in range(30):
            writer = PartWriter(tmp_path / str(number), f"part_{index:05d}", ["given"], 300, has_learned=False)
            writer.add(np.full(5, 50 * number + index), None, 0, 0)
            parts.append(writer.finish(0, {}))
        prepared = Prepared(tmp_path / str(number), "", 300, {}, "", parts)
        readers.append(PreparedRows(prepared, 5, 0, plan_rows(prepared, 5, None), mask_documents=True))

    def read_all() -> None:
        for index in range(0, 30):
            for number, rows in enumerate(readers):
                assert set(rows.reader[5 * index : 5 * index + 5].tolist()) == {50 * number + index}
                assert rows.documents_of(index)[0].document == index

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 40, limits[1]))
    try:
        read_all()
        read_all()
        assert len(os.listdir("/proc/self/fd")) - before <= (before + 40) // 4
        if (child := os.fork()) == 0:
            try:
                read_all()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        read_all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    readers.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_read_what_they_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one descriptor, no thread closes what another reads, nor reads another's file."""
    monkeypatch.setattr(open_files, "_most", lambda: 1)
    for number in range(4):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    files = open_files.OpenFiles(tmp_path, "")

    def read(number: int) -> set[int]:
        found: set[int] = set()
        for first in range(300):
            out = np.empty(9, np.uint8)
            files.read_into(str(number), out, first % 90)
            found.update(out.tolist())
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [{0}, {1}, {2}, {3}]
