"""Rows of equal length from prepared documents: cut from one long row of tokens, or packed by best fit.

Concatenated, row r has tokens r*S to (r+1)*S as inputs and those one further on as labels: documents are cut where a
row ends, and the end of one predicts the beginning of the next, so that every token but the very first is a label once.
By best fit each document is in one row if it fits there at all, its last token predicts nothing, and what room is left
at the end of a row is padding that does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from titan.config.schema import Packing
from titan.data.batch import IGNORED_LABEL, Order, RowOrder, count_rows
from titan.data.open_files import OpenFiles
from titan.data.packing import Segment, pack_best_fit, windows
from titan.data.prepare import sign_of_life, wait_for
from titan.data.prepared import Prepared, TokenReader, checksum_of, find_damaged
from titan.errors import DataError
from titan.run_directory import close_synced, remove_leftovers, unique_temporary, write_atomically

__all__ = ["Piece", "Plan", "PreparedRows", "Row", "Rows", "Segment", "pack_best_fit", "plan_rows"]

PLAN = "plan.json"
SEGMENT = np.dtype([("start", "<u8"), ("length", "<u4")])
"""A segment of a row: its first token over all parts, and the positions it takes."""


class Row(NamedTuple):
    """One row, or several.

    Shape:
        inputs, labels, starts: (S,) or (B, S) int64.
    """

    inputs: np.ndarray
    labels: np.ndarray
    """With IGNORED_LABEL where nothing counts."""
    starts: np.ndarray | None
    """Where in its row the document of each token begins; None where attention may cross documents."""

    def at(self, index: int) -> Row:
        """Return one of several rows. Shape: (B, S) -> (S,)."""
        return Row(self.inputs[index], self.labels[index], None if self.starts is None else self.starts[index])


@dataclass(frozen=True)
class Piece:
    """A piece of a document in a row."""

    component: str
    """Of a mixture; empty where there is none."""
    shard: str
    """The shard of the source that the document is from."""
    record: int
    """Which record of the shard."""
    document: int
    """Which document of all that were prepared."""
    first: int
    """The piece's first token in the document."""
    position: int
    """Where in the row it is."""
    length: int
    """Positions that it takes."""
    document_tokens: int
    """Tokens of the whole document."""
    start: int
    """The piece's first token of all that were prepared."""


class Rows(Protocol):
    """All rows of a run's data, by number."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int] | np.ndarray) -> Row:
        """Return some rows. Shape: (B, S) each."""
        ...

    def documents_of(self, row: int) -> list[Piece]:
        """Return which documents a row is made of."""
        ...

    def read_tokens(self, piece: Piece, whole: bool = False) -> np.ndarray:
        """Return a piece's tokens, or those of its whole document. Shape: (N,)."""
        ...

    def order(self, global_batch_size: int, seed: int) -> Order:
        """Return the order in which rows are visited."""
        ...

    def describe(self) -> list[str]:
        """Return what a person wants to know of the data, as lines."""
        ...

    @property
    def digest(self) -> str:
        """Changes when any row does."""
        ...

    @property
    def tokens(self) -> int:
        """All tokens."""
        ...

    @property
    def text_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which documents are in which row, packed by best fit."""

    folder: Path
    seq_len: int
    digest: str
    """Of the data that it is for."""
    rows: int
    segments: int
    positions: int
    """Positions that hold a document's token; the others are padding."""
    cut_documents: int
    """Documents longer than a row."""
    checksums: dict[str, str]
    """Of the files `segments` and `rows`: XXH3, 128 bits, in hexadecimal."""

    @property
    def padding_share(self) -> float:
        """The share of all positions that is padding."""
        return 1 - self.positions / max(1, self.rows * self.seq_len)


def plan_rows(
    prepared: Prepared, seq_len: int, cache_dir: str | None, is_writer: bool = True, timeout_seconds: float = 600
) -> Plan:
    """Return the plan of packing by best fit: the one beside the data, or one made now.

    Args:
        prepared: The documents.
        seq_len: Positions of a row.
        cache_dir: Where to keep it if the data's own folder cannot be written.
        is_writer: Whether this process makes what is missing; others wait.
        timeout_seconds: How long the others wait without a sign of life from the writer.

    Raises:
        DataError: If it cannot be written anywhere, or if the wait is in vain.
    """
    folder = prepared.path / f"rows_{seq_len}"
    if not folder.is_dir() and not os.access(prepared.path, os.W_OK) and cache_dir is not None:
        folder = Path(cache_dir) / "rows" / f"{prepared.digest}_{seq_len}"
    plan = _read_plan(prepared, seq_len, folder)
    if plan is None and is_writer:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with sign_of_life(folder):
                plan = _write_plan(prepared, seq_len, folder)
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written: {error.strerror or error}\n  Try  data.cache_dir=/path/with/space"
            ) from error
    elif plan is None:
        wait_for(lambda: _read_plan(prepared, seq_len, folder) is not None, folder, timeout_seconds)
        plan = _read_plan(prepared, seq_len, folder)
    if plan is None:
        raise DataError(f"{folder} has changed while it was opened\n  {_anew(folder)}")
    return plan


def find_plan_damage(prepared: Prepared) -> Iterator[str]:
    """Read every byte of the plans beside the data and yield what is not as its checksum says."""
    for folder in sorted(prepared.path.glob("rows_*")):
        length = folder.name.removeprefix("rows_")
        plan = _read_plan(prepared, int(length), folder) if length.isdigit() else None
        if plan is not None:
            yield from find_damaged(folder, plan.checksums)
        elif length.isdigit():
            yield f"{folder} is damaged, cut short, or of other data\n  {_anew(folder)}"


def _read_plan(prepared: Prepared, seq_len: int, folder: Path) -> Plan | None:
    """Return the plan of a folder; None where there is none that is whole and for this data."""
    try:
        told = json.loads((folder / PLAN).read_text())
        checksum = told.pop("checksum")
        plan = Plan(folder, **told)
        sizes = {"segments": SEGMENT.itemsize * plan.segments, "rows": 8 * (plan.rows + 1)}
        is_whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    is_sound = checksum == checksum_of(told) and plan.checksums.keys() == sizes.keys()
    return plan if is_whole and is_sound and (plan.digest, plan.seq_len) == (prepared.digest, seq_len) else None


def _anew(folder: Path) -> str:
    return f"Delete {folder}: the next run makes it anew"


def _write_plan(prepared: Prepared, seq_len: int, folder: Path) -> Plan:
    reader = TokenReader(prepared)
    rows = segments = positions = cut = begin = 0
    remove_leftovers(folder, "*")
    temporary = {name: unique_temporary(folder / name) for name in ("segments", "rows")}
    digests = {name: xxhash.xxh3_128() for name in temporary}
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(path.open("wb")) for name, path in temporary.items()}

            def write(name: str, values: np.ndarray) -> None:
                content = values.tobytes()
                files[name].write(content)
                digests[name].update(content)

            write("rows", np.zeros(1, "<u8"))
            for _, lengths in windows(reader.document_lengths()):
                starts = begin + np.cumsum(lengths) - lengths
                packed = pack_best_fit(lengths, seq_len)
                flat = np.array([segment for row in packed for segment in row], np.int64).reshape(-1, 3)
                out = np.empty(len(flat), SEGMENT)
                out["start"], out["length"] = starts[flat[:, 0]] + flat[:, 1], flat[:, 2]
                write("segments", out)
                write("rows", (segments + np.cumsum([len(row) for row in packed])).astype("<u8"))
                rows += len(packed)
                segments += len(flat)
                positions += int(flat[:, 2].sum())
                cut += int((lengths > seq_len + 1).sum())
                begin += int(lengths.sum())
            for file in files.values():
                close_synced(file)
        checksums = {name: digest.hexdigest() for name, digest in digests.items()}
        plan = Plan(folder, seq_len, prepared.digest, rows, segments, positions, cut, checksums)
        if (there := _read_plan(prepared, seq_len, folder)) is not None:
            return there  # another node was faster, and its readers have the files open
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    told = asdict(plan)
    del told["folder"]
    write_atomically(folder / PLAN, json.dumps(told | {"checksum": checksum_of(told)}) + "\n")
    return plan


class PreparedRows:
    """The rows of prepared documents.

    Args:
        prepared: The documents.
        seq_len: Positions of a row.
        padding: The token that fills rows up.
        plan: Which documents are in which row; None concatenates.
        mask_documents: Whether rows say where their documents begin.
        component: What the documents are called in a mixture.
    """

    def __init__(
        self,
        prepared: Prepared,
        seq_len: int,
        padding: int,
        plan: Plan | None = None,
        mask_documents: bool = False,
        component: str = "",
    ) -> None:
        self.prepared, self.seq_len, self.padding, self.plan = prepared, seq_len, padding, plan
        self.mask_documents, self.component = mask_documents, component
        self.reader = TokenReader(prepared)
        self._rows = count_rows(prepared.tokens, seq_len) if plan is None else plan.rows
        self._has_learned = prepared.has_learned
        self._plan_files = None if plan is None else OpenFiles(plan.folder, _anew(plan.folder))

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Row:
        """Return a row. Shape: (S,) each."""
        return self.read([row]).at(0)

    def read(self, rows: Sequence[int] | np.ndarray) -> Row:
        """Return some rows. Shape: (B, S) each.

        Raises:
            DataError: If a file ends before it should.
        """
        return self._read_cut(rows) if self.plan is None else self._read_packed(rows)

    def _read_cut(self, rows: Sequence[int] | np.ndarray) -> Row:
        seq_len, total, reader = self.seq_len, self.prepared.tokens, self.reader
        tokens = np.empty((len(rows), seq_len + 1), reader.dtype)
        learned = np.empty((len(rows), seq_len + 1), np.uint8) if self._has_learned else None
        counts = []
        for index, row in enumerate(rows):
            start = int(row) * seq_len
            count = min(seq_len + 1, total - start)
            reader.read_into(tokens[index, :count], start)
            if learned is not None:
                reader.read_into(learned[index, :count], start, "learned")
            counts.append(count)
        inputs, labels = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
        if learned is not None:
            labels[learned[:, 1:] == 0] = IGNORED_LABEL
        for index, count in enumerate(counts):
            if count <= seq_len:
                inputs[index, count:] = self.padding
                labels[index, max(0, count - 1) :] = IGNORED_LABEL
        if not self.mask_documents:
            return Row(inputs, labels, None)
        starts = np.zeros_like(inputs)
        for index, row in enumerate(rows):
            start = int(row) * seq_len
            begins = reader.documents_in(start, min(start + seq_len, total))[1]["start"].astype(np.int64) - start
            starts[index, begins] = begins
        return Row(inputs, labels, np.maximum.accumulate(starts, axis=1))

    def _read_packed(self, rows: Sequence[int] | np.ndarray) -> Row:
        seq_len, reader = self.seq_len, self.reader
        inputs = np.full((len(rows), seq_len), self.padding, np.int64)
        labels = np.full((len(rows), seq_len), IGNORED_LABEL, np.int64)
        starts = np.zeros((len(rows), seq_len), np.int64) if self.mask_documents else None
        tokens = np.empty(seq_len + 1, reader.dtype)
        learned = np.empty(seq_len + 1, np.uint8) if self._has_learned else None
        for index, row in enumerate(rows):
            at = 0
            for start, length in self.segments_of(int(row)):
                reader.read_into(tokens[: length + 1], start)
                inputs[index, at : at + length] = tokens[:length]
                labels[index, at : at + length] = tokens[1 : length + 1]
                if learned is not None:
                    reader.read_into(learned[: length + 1], start, "learned")
                    labels[index, at : at + length][learned[1 : length + 1] == 0] = IGNORED_LABEL
                if starts is not None:
                    starts[index, at : at + length] = at
                at += length
            if starts is not None:
                starts[index, at:] = at
        return Row(inputs, labels, starts)

    def segments_of(self, row: int) -> list[tuple[int, int]]:
        """Return the first token and the positions of each segment of a row; of one that was cut there is one.

        Raises:
            DataError: If the plan cannot be read, or is damaged.
        """
        if self.plan is None or self._plan_files is None:
            start = row * self.seq_len
            return [(start, min(self.seq_len, self.prepared.tokens - start))]
        bounds = np.empty(2, "<u8")
        self._plan_files.read_into("rows", bounds, row)
        first, last = bounds.tolist()
        if not first <= last <= min(self.plan.segments, first + self.seq_len):
            raise self._damaged(row)
        found = np.empty(last - first, SEGMENT)
        self._plan_files.read_into("segments", found, first)
        is_inside = found["start"] + found["length"].astype("<u8") < self.prepared.tokens
        if found["length"].sum() > self.seq_len or not (is_inside & (found["start"] < self.prepared.tokens)).all():
            raise self._damaged(row)
        return list(zip(found["start"].tolist(), found["length"].tolist(), strict=True))

    def _damaged(self, row: int) -> DataError:
        assert self.plan is not None
        return DataError(f"{self.plan.folder} is damaged: row {row} cannot be\n  {_anew(self.plan.folder)}")

    def documents_of(self, row: int) -> list[Piece]:
        """Return which documents a row is made of."""
        pieces, position = [], 0
        for start, length in self.segments_of(row):
            at, stop = start, start + length
            while at < stop:
                number, part, document, end = self.reader.document_at(at)
                take = min(stop, end) - at
                begin = int(document["start"])
                pieces.append(
                    Piece(
                        self.component,
                        self.prepared.parts[part].shards[int(document["shard"])],
                        int(document["record"]),
                        number,
                        at - begin,
                        position,
                        take,
                        end - begin,
                        at,
                    )
                )
                at += take
                position += take
        return pieces

    def read_tokens(self, piece: Piece, whole: bool = False) -> np.ndarray:
        """Return a piece's tokens, or those of its whole document. Shape: (N,)."""
        if whole:
            begin = piece.start - piece.first
            return self.reader[begin : begin + piece.document_tokens]
        return self.reader[piece.start : piece.start + piece.length]

    def order(self, global_batch_size: int, seed: int) -> RowOrder:
        """Return the order in which rows are visited."""
        return RowOrder(len(self), global_batch_size, seed)

    @property
    def packing(self) -> Packing:
        """How documents became rows."""
        return Packing.concat if self.plan is None else Packing.best_fit

    @property
    def digest(self) -> str:
        """Changes when any row does; of rows that were cut it is that of the documents."""
        if self.plan is None:
            return self.prepared.digest
        return xxhash.xxh3_128_hexdigest(f"{self.prepared.digest} best_fit {self.seq_len}".encode())

    @property
    def tokens(self) -> int:
        """All tokens, begin and end of text included."""
        return self.prepared.tokens

    @property
    def text_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return self.prepared.text_bytes

    def describe(self) -> list[str]:
        """Return what a person wants to know of the data, as lines."""
        found = self.prepared
        lines = [
            f"{found.documents:,} document{'s' * (found.documents != 1)}, {_size(found.text_bytes)} of text, "
            f"{found.tokens:,} tokens ({found.text_bytes / max(1, found.tokens):.2f} bytes a token)"
        ]
        longest = f"the longest has {found.longest_document_tokens:,} tokens"
        if self.plan is not None:
            cut = self.plan.cut_documents
            lines.append(
                f"packed by best fit: {self.plan.padding_share:.2%} of all positions are padding, "
                f"{cut:,} document{'s are' if cut != 1 else ' is'} longer than a row of {self.seq_len} and cut; "
                f"{longest}"
            )
        elif found.longest_document_tokens > self.seq_len:
            lines.append(f"documents longer than a row of {self.seq_len} go on in the next; {longest}")
        lines += [
            f"left out {count:,} document{'s' * (count != 1)}: {reason}" for reason, count in found.skipped.items()
        ]
        return lines


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
