"""Documents from files, plain or compressed: one a line in jsonl, one a file in text.

A plain file of many lines is cut into pieces of equal size, so that several processes can read it at once. A line
belongs to the piece in which it begins.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from titan.config.files import COMPRESSIONS
from titan.config.schema import DataKind, SourceConfig
from titan.data.shard import Document, Shard, field_of, portion_bytes

_BLOCK_BYTES = 1 << 20
_UNREADABLE = (OSError, EOFError, zlib.error)
_ZSTD_BYTES = zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE


def file_shards(config: SourceConfig, files: list[Path]) -> list[Shard]:
    """Return the shards of some files, in their order."""
    if config.kind is not DataKind.jsonl:
        return [TextShard(config, str(file), _size(file), path=file) for file in files]
    piece = portion_bytes(sum(map(_size, files)))
    return [shard for file in files for shard in _pieces(config, file, piece)]


def _pieces(config: SourceConfig, file: Path, piece: int) -> Iterator[Shard]:
    size = _size(file)
    if file.suffix in COMPRESSIONS or size <= piece:
        yield LinesShard(config, str(file), size, path=file)
        return
    for begin in range(0, size, piece):
        end = min(begin + piece, size)
        yield LinesShard(config, f"{file}[{begin}:{end}]", end - begin, path=file, begin=begin, end=end)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # which reading it will say
        return 0


@dataclass
class TextShard(Shard):
    """A file that is one document."""

    path: Path = Path()

    def locate(self, record: int) -> str:
        """Return the file."""
        return str(self.path)

    def _read(self, start: int) -> Iterator[Document]:
        if start > 0 or not self.is_in_share(0):
            return
        try:
            with _open(self.path) as stream:
                content = b"".join(iter(lambda: stream.read(_BLOCK_BYTES), b""))
        except _UNREADABLE as error:
            self.refuse_rest(0, partial(self.locate, 0), error)
            return
        try:
            yield Document(content.decode("utf-8"), 0)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            message = f"not UTF-8 ({error.reason} at byte {error.start})"
            self.refuse_at(lambda: f"{self.path}, line {line}", message, "not UTF-8")


@dataclass
class LinesShard(Shard):
    """The lines of a jsonl file, or those that begin in a piece of it."""

    path: Path = Path()
    begin: int = 0
    end: int | None = None
    """The first byte that is not the piece's; None for all of the file."""

    def locate(self, record: int) -> str:
        """Return the file and the line in it; reads what is before the piece to count its lines."""
        return f"{self.path}, {self._line(record + 1)}"

    def _read(self, start: int) -> Iterator[Document]:
        lines = self._open_lines()
        record = 0
        while True:
            try:
                line = next(lines, None)
            except _UNREADABLE as error:
                self.refuse_rest(record, partial(self._after, record), error)
                return
            if line is None:
                return
            if record >= start and self.is_in_share(record) and line.strip():
                yield from self._parse(line, record)
            record += 1

    def _parse(self, line: bytes, record: int) -> Iterator[Document]:
        try:
            values = json.loads(line)
        except UnicodeDecodeError as error:
            return self.refuse(record, f"not UTF-8 ({error.reason} at byte {error.start})", "not UTF-8")
        except (ValueError, RecursionError) as error:
            return self.refuse(record, f"broken JSON ({error})", "broken JSON")
        if not isinstance(values, dict):
            name = field_of(self.config)
            return self.refuse(record, f"no field {name!r} (it is no object)", f"no field {name!r}", self.naming)
        yield from self.pick(values, record)

    def _open_lines(self) -> Iterator[bytes]:
        with _open(self.path) as stream:
            if self.end is None:
                yield from stream
                return
            at = self.begin
            if at:  # the line that goes over the edge belongs to the piece before
                stream.seek(at - 1)
                over = stream.readline(self.end - at + 1)
                if not over.endswith(b"\n"):  # and so do all of this piece, which may be one of many that it fills
                    return
                at += len(over) - 1
            while at < self.end and (line := stream.readline()):
                yield line
                at += len(line)

    def _after(self, records: int) -> str:
        return f"{self.path}, after {self._line(records)}"

    def _line(self, number: int) -> str:
        try:
            return f"line {self._lines_before() + number}"
        except OSError:  # the file has gone away
            return f"line {number} behind byte {self.begin:,}"

    def _lines_before(self) -> int:
        if not self.begin:
            return 0
        count, left, last = 0, self.begin, b""
        with self.path.open("rb") as stream:
            while left and (block := stream.read(min(left, _BLOCK_BYTES))):
                count += block.count(b"\n")
                left -= len(block)
                last = block[-1:]
        return count + (last != b"\n")  # the line that goes over the edge counts too


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if file.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(file), _BLOCK_BYTES))
    return file.open("rb", buffering=_BLOCK_BYTES)


class _ZstdFile(io.RawIOBase):
    """Any number of zstd frames, one after the other.

    zstandard's own stream reader is not used: it takes a file that was cut short for its end, and what is missing
    would be dropped in silence.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.open("rb")
        self._frame = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._plain = self._plain or memoryview(self._decompress())
        part, self._plain = self._plain[: len(buffer)], self._plain[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self) -> bytes:
        while True:
            self._compressed = self._compressed or self._file.read(_ZSTD_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return b""
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                plain = self._frame.decompress(self._compressed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
            if plain:
                return plain
