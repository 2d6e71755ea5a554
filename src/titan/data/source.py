"""Documents from files, one after the other, always in the same order.

A document that cannot be read is either an error that names file and line, or it is counted under its reason and
reported at the end: nothing is dropped in silence.
"""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from titan.config.files import find_files, find_standard_library
from titan.config.schema import BadDocuments, DataKind, SourceConfig
from titan.errors import DataError


@dataclass
class Source:
    """The documents of a data config, and an account of them.

    Iterating reads the files anew; `documents`, `text_bytes` and `skipped` then describe what was read.
    """

    config: SourceConfig
    files: list[Path]
    documents: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Documents left out, by reason."""

    def __iter__(self) -> Iterator[str]:
        self.documents = self.text_bytes = 0
        self.skipped = Counter()
        read = self._read_lines if self.config.kind is DataKind.jsonl else self._read_whole
        for file in self.files:
            for text in read(file):
                if not text:
                    self.skipped["empty"] += 1
                    continue
                self.documents += 1
                self.text_bytes += len(text.encode("utf-8", "surrogatepass"))
                yield text

    def _read_whole(self, file: Path) -> Iterator[str]:
        try:
            content = b"".join(_open_blocks(file))
        except _UNREADABLE as error:
            self._refuse(f"{file}: {_reason(error)}", "unreadable file")
            return
        try:
            yield content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            self._refuse(f"{file}, line {line}: not UTF-8 ({error.reason} at byte {error.start})", "not UTF-8")

    def _read_lines(self, file: Path) -> Iterator[str]:
        lines = _open_lines(file)
        number = 0
        while True:
            try:
                line = next(lines, None)
            except _UNREADABLE as error:
                self._refuse(f"{file}, after line {number}: {_reason(error)}", "unreadable file")
                return
            if line is None:
                return
            number += 1
            if line.strip():
                yield from self._parse_line(line, f"{file}, line {number}")

    def _parse_line(self, line: bytes, where: str) -> Iterator[str]:
        name = self.config.text_field
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            return self._refuse(f"{where}: not UTF-8 ({error.reason} at byte {error.start})", "not UTF-8")
        except (ValueError, RecursionError) as error:
            return self._refuse(f"{where}: broken JSON ({error})", "broken JSON")
        if not isinstance(record, dict) or name not in record:
            there = f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no object"
            return self._refuse(f"{where}: no field {name!r} ({there})", f"no field {name!r}")
        text = record[name]
        if not isinstance(text, str):
            kind = type(text).__name__
            return self._refuse(f"{where}: field {name!r} is of type {kind}, not text", f"{name!r} is not text")
        yield text

    def _refuse(self, message: str, reason: str) -> None:
        if self.config.bad_documents is BadDocuments.error:
            hint = "data.bad_documents=skip leaves such documents out, counted and reported"
            if reason.startswith("no field"):
                hint = f"data.text_field=NAME names the field to read; {hint}"
            raise DataError(f"{message}\n  {hint}")
        self.skipped[reason] += 1


def open_source(config: SourceConfig) -> Source:
    """Return the documents that a data config stands for.

    Raises:
        DataError: If there is no file.
    """
    if config.kind is DataKind.python_stdlib:
        files = find_standard_library()
    else:
        assert config.path is not None, "checked before anything was started"
        files = find_files(config.path, config.kind.name)
    if not files:
        raise DataError(f"no files to read for data={config.kind.name}, data.path={config.path}")
    return Source(config, files)


_UNREADABLE = (OSError, EOFError, zstandard.ZstdError, gzip.zlib.error)  # type: ignore[attr-defined]
_BLOCK_BYTES = 1 << 20
_ZSTD_BYTES = zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE


def _open_blocks(file: Path) -> Iterator[bytes]:
    with _open(file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


def _open_lines(file: Path) -> Iterator[bytes]:
    with _open(file) as stream:
        yield from stream


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
            plain = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
            if plain:
                return plain


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
