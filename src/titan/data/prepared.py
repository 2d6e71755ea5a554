"""Tokenised documents on disk: a folder that any row length and any order of rows can be read from.

    manifest.json          what it was made of and with, counts, checksums; written last: without it there is nothing
    part_00000.tokens      the tokens of one part after the other, each 16 or 32 bits
    part_00000.documents   where each document begins in its part, and where it came from
    part_00000.blocks      the first document that begins at or after every 4,096th token, to find documents at once
    part_00000.learned     of conversations: for every token whether it is learned, one byte each
    part_00000.json        the part's share of the manifest; a part that has it is whole, and is not made again

What is in a part depends on the source alone, so the folder is the same, to the byte, however many processes made it
and however often they were interrupted.

Files are read with `pread` by `titan.data.open_files`, not mapped into memory: pages that were read of a mapping count
as the process's own for as long as it runs, and its memory would seem to grow until all of the data had been seen.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from titan.data.open_files import OpenFiles
from titan.errors import DataError
from titan.run_directory import close_synced, unique_temporary, write_atomically

FORMAT = 2
MANIFEST = "manifest.json"
BLOCK_TOKENS = 4096
DOCUMENT = np.dtype([("start", "<u8"), ("record", "<u8"), ("shard", "<u4")])
"""Of a document: its first token in the part, its record in the shard, and which of the part's shards that is."""
_FLUSH_TOKENS = 1 << 20
_CHECK_BYTES = 1 << 22


@dataclass(frozen=True)
class Part:
    """The documents of some shards of the source, in their order."""

    name: str
    tokens: int
    """All tokens, begin and end of text included."""
    documents: int
    text_bytes: int
    """Bytes of the text in UTF-8."""
    longest_document_tokens: int
    skipped: dict[str, int]
    """Documents left out, by reason."""
    shards: list[str]
    """The names of the source's shards."""
    checksums: dict[str, str]
    """Of each file, by its suffix: XXH3, 128 bits, in hexadecimal."""

    def file(self, folder: Path, suffix: str) -> Path:
        """Return one of the part's files."""
        return folder / f"{self.name}.{suffix}"

    def sizes(self, vocab_size: int) -> dict[str, int]:
        """Return how many bytes each of the part's files has."""
        sizes = {
            "tokens": self.tokens * np.dtype(token_dtype(vocab_size)).itemsize,
            "documents": self.documents * DOCUMENT.itemsize,
            "blocks": -(-self.tokens // BLOCK_TOKENS) * 4,
            "learned": self.tokens,
        }
        return {suffix: sizes[suffix] for suffix in self.checksums}


@dataclass(frozen=True)
class Prepared:
    """A folder of tokenised documents."""

    path: Path
    tokenizer: str
    """The tokenizer's fingerprint."""
    vocab_size: int
    source: dict[str, Any]
    """What was read, as keys of the config."""
    identity: str
    """A hash of everything that the tokens depend on."""
    parts: list[Part] = field(repr=False)

    @property
    def tokens(self) -> int:
        """All tokens, begin and end of text included."""
        return sum(part.tokens for part in self.parts)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return sum(part.documents for part in self.parts)

    @property
    def text_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return sum(part.text_bytes for part in self.parts)

    @property
    def longest_document_tokens(self) -> int:
        """Tokens of the longest document."""
        return max((part.longest_document_tokens for part in self.parts), default=0)

    @property
    def skipped(self) -> dict[str, int]:
        """Documents left out, by reason."""
        return dict(sorted(sum((Counter(part.skipped) for part in self.parts), Counter()).items()))

    @property
    def has_learned(self) -> bool:
        """Whether only some tokens are learned."""
        return any("learned" in part.checksums for part in self.parts)

    @property
    def digest(self) -> str:
        """The checksum of all checksums."""
        told = [[part.name, part.checksums] for part in self.parts]
        return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True).encode())

    def open(self) -> TokenReader:
        """Open the tokens for reading."""
        return TokenReader(self)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the smallest type that holds every token."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def open_prepared(path: Path) -> Prepared:
    """Read the manifest of a folder and see that its files are there, as long as they should be.

    Raises:
        DataError: If it was not prepared, not to its end, or not by this version; or if it is damaged.
    """
    container = _read_manifest(path)
    told = dict(container)
    checksum = told.pop("checksum", "")
    if checksum != checksum_of(told):
        raise DataError(f"{path / MANIFEST} is damaged: its checksum is not that of its contents\n  {_anew(path)}")
    parts = [Part(**part) for part in told["parts"]]
    found = Prepared(path, told["tokenizer"], told["vocab_size"], told["source"], told["identity"], parts)
    for part in parts:
        for suffix, size in part.sizes(found.vocab_size).items():
            file = part.file(path, suffix)
            there = file.stat().st_size if file.is_file() else -1
            if there != size:
                what = "is missing" if there < 0 else f"has {there:,} bytes, where its manifest says {size:,}"
                raise DataError(f"{file} {what}\n  {_anew(path)}")
    return found


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        container = json.loads(file.read_text())
    except FileNotFoundError as error:
        why = "its preparation did not come to its end" if any(path.glob("part_*.json")) else "it was not prepared"
        raise DataError(
            f"{path} has no {MANIFEST}: {why}\n  Try  python -m titan.prepare --to {path} data=... tokenizer=..."
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}\n  {_anew(path)}") from error
    if not isinstance(container, dict) or container.get("format") != FORMAT:
        version = container.get("format") if isinstance(container, dict) else None
        raise DataError(f"{file} is of format {version}, and this version of titan reads {FORMAT}\n  {_anew(path)}")
    return container


def _anew(path: Path) -> str:
    return f"Delete {path} and prepare it anew:  python -m titan.prepare --to {path} data=... tokenizer=..."


def write_manifest(prepared: Prepared) -> None:
    """Write the manifest, which makes the folder whole."""
    told = {
        "format": FORMAT,
        "identity": prepared.identity,
        "tokenizer": prepared.tokenizer,
        "vocab_size": prepared.vocab_size,
        "source": prepared.source,
        "documents": prepared.documents,
        "tokens": prepared.tokens,
        "text_bytes": prepared.text_bytes,
        "longest_document_tokens": prepared.longest_document_tokens,
        "skipped": prepared.skipped,
        "digest": prepared.digest,
        "parts": [asdict(part) for part in prepared.parts],
    }
    text = json.dumps(told | {"checksum": checksum_of(told)}, indent=1)
    write_atomically(prepared.path / MANIFEST, text + "\n")


def checksum_of(told: dict[str, Any]) -> str:
    """Return the checksum of an object that is written as JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True).encode())


def find_damage(prepared: Prepared) -> Iterator[str]:
    """Read every byte and yield what is not as its checksum says."""
    for part in prepared.parts:
        yield from find_damaged(prepared.path, {f"{part.name}.{suffix}": sum for suffix, sum in part.checksums.items()})


def find_damaged(folder: Path, checksums: dict[str, str]) -> Iterator[str]:
    """Read files whole and yield what is not as its checksum says.

    Args:
        folder: Where they are.
        checksums: By name: XXH3, 128 bits, in hexadecimal.
    """
    for name, checksum in checksums.items():
        digest = xxhash.xxh3_128()
        try:
            with (folder / name).open("rb") as stream:
                while block := stream.read(_CHECK_BYTES):
                    digest.update(block)
        except OSError as error:
            yield f"{folder / name} cannot be read: {error.strerror or error}"
            continue
        if digest.hexdigest() != checksum:
            yield f"{folder / name} is damaged: its checksum is {digest.hexdigest()}, where it was made with {checksum}"


class PartWriter:
    """Writes one part, document by document, under other names until it is whole.

    Args:
        folder: Where to.
        name: What the part is called.
        shards: The names of its shards.
        vocab_size: Of the tokenizer.
        has_learned: Whether documents say which of their tokens are learned.
    """

    def __init__(self, folder: Path, name: str, shards: list[str], vocab_size: int, has_learned: bool) -> None:
        self.folder, self.name, self.shards, self.vocab_size = folder, name, shards, vocab_size
        self.dtype = token_dtype(vocab_size)
        suffixes = ["tokens", "documents", "blocks", *["learned"] * has_learned]
        self._temporary = {suffix: unique_temporary(folder / f"{name}.{suffix}") for suffix in suffixes}
        self._digests = {suffix: xxhash.xxh3_128() for suffix in suffixes}
        self._files: dict[str, BinaryIO] = {}
        try:
            for suffix, path in self._temporary.items():
                self._files[suffix] = path.open("wb")
        except OSError:
            self.abandon()
            raise
        self.tokens = self.documents = self.longest = 0
        self._held = {"tokens": np.empty(_FLUSH_TOKENS, self.dtype)}
        if has_learned:
            self._held["learned"] = np.empty(_FLUSH_TOKENS, np.uint8)
        self._told: list[tuple[int, int, int]] = []
        self._pending = self._blocks = 0

    def add(self, tokens: np.ndarray, learned: np.ndarray | None, record: int, shard: int) -> bool:
        """Append a document; returns whether that wrote to the disk."""
        count = len(tokens)
        is_full = self._pending + count > _FLUSH_TOKENS
        if is_full:
            self._flush()
        for suffix, held in self._held.items():
            values = tokens if suffix == "tokens" else np.True_ if learned is None else learned
            if count <= _FLUSH_TOKENS:
                held[self._pending : self._pending + count] = values
            else:
                self._write(suffix, np.broadcast_to(values, count).astype(held.dtype))
        if count <= _FLUSH_TOKENS:
            self._pending += count
        self._told.append((self.tokens, record, shard))
        self.tokens += count
        self.documents += 1
        self.longest = max(self.longest, count)
        return is_full

    def finish(self, text_bytes: int, skipped: dict[str, int]) -> Part:
        """Give the files their names, and write the part's own share of the manifest.

        Where the same part is there already, made by another machine, that one stays: it may be read by now.

        Args:
            text_bytes: Bytes of the text in UTF-8.
            skipped: Documents left out, by reason.
        """
        self._flush()
        for file in self._files.values():
            close_synced(file)
        part = Part(
            self.name,
            self.tokens,
            self.documents,
            text_bytes,
            self.longest,
            dict(sorted(skipped.items())),
            self.shards,
            {suffix: digest.hexdigest() for suffix, digest in self._digests.items()},
        )
        if read_part(self.folder, self.name, self.shards, self.vocab_size) == part:
            self.abandon()
            return part
        for suffix, path in self._temporary.items():
            os.replace(path, part.file(self.folder, suffix))
        write_atomically(part.file(self.folder, "json"), json.dumps(asdict(part), indent=1) + "\n")
        return part

    def abandon(self) -> None:
        """Leave nothing behind of a part that did not come to its end."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what it still holds may find no room
                file.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def _flush(self) -> None:
        for suffix, held in self._held.items():
            self._write(suffix, held[: self._pending])
        told = np.array(self._told, dtype=DOCUMENT)
        self._write("documents", told)
        edges = np.arange(self._blocks * BLOCK_TOKENS, self.tokens, BLOCK_TOKENS)
        before = self.documents - len(told)
        self._write("blocks", (before + np.searchsorted(told["start"], edges)).astype("<u4"))
        self._blocks += len(edges)
        self._told, self._pending = [], 0

    def _write(self, suffix: str, values: np.ndarray) -> None:
        self._files[suffix].write(values.data)
        self._digests[suffix].update(values.data)


def read_part(folder: Path, name: str, shards: list[str], vocab_size: int) -> Part | None:
    """Return a part that is there and whole; None where it has to be made."""
    try:
        part = Part(**json.loads((folder / f"{name}.json").read_text()))
        sizes = part.sizes(vocab_size)
        is_whole = all(part.file(folder, suffix).stat().st_size == size for suffix, size in sizes.items())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return part if is_whole and part.shards == shards else None


def write_documents(folder: Path, documents: Iterable[np.ndarray], vocab_size: int, tokenizer: str = "") -> Prepared:
    """Prepare documents that are tokens already, in one part.

    Shape:
        documents: (N,) each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = PartWriter(folder, "part_00000", ["given"], vocab_size, has_learned=False)
    for record, tokens in enumerate(documents):
        writer.add(tokens, None, record, 0)
    prepared = Prepared(folder, tokenizer, vocab_size, {}, "", [writer.finish(writer.tokens, {})])
    write_manifest(prepared)
    return prepared


class TokenReader:
    """The tokens of all parts as one long row, and the documents in it, read piece by piece."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.dtype = np.dtype(token_dtype(prepared.vocab_size))
        self.tokens = prepared.tokens
        self.part_starts = np.cumsum([0, *(part.tokens for part in prepared.parts)])
        self.document_starts = np.cumsum([0, *(part.documents for part in prepared.parts)])
        self._files = OpenFiles(prepared.path, _anew(prepared.path))

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, piece: slice) -> np.ndarray:
        """Read tokens [start, stop). Shape: (stop - start,), uint16 or uint32."""
        start, stop, _ = piece.indices(self.tokens)
        out = np.empty(max(0, stop - start), self.dtype)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, start: int, suffix: str = "tokens") -> None:
        """Fill `out` with what begins at token `start`.

        Args:
            out: Of `dtype`, or bytes for `learned`.
            start: Over all parts.
            suffix: tokens or learned.

        Raises:
            DataError: If a file cannot be read, or ends before.
        """
        part = int(np.searchsorted(self.part_starts, start, side="right")) - 1
        done, count = 0, len(out)
        while done < count:
            inside = start + done - int(self.part_starts[part])
            take = min(count - done, self.prepared.parts[part].tokens - inside)
            self._pread(part, suffix, out[done : done + take], inside)
            done += take
            part += 1

    def documents_in(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """Return the documents that begin in tokens [start, stop).

        Returns:
            The number of the first of them, over all parts, and of each its DOCUMENT, `start` being over all parts.
        """
        first, found = -1, []
        part = int(np.searchsorted(self.part_starts, start, side="right")) - 1
        while part < len(self.prepared.parts) and self.part_starts[part] < stop:
            base, tokens = int(self.part_starts[part]), self.prepared.parts[part].tokens
            if tokens == 0:
                part += 1
                continue
            low, high = max(0, start - base), min(tokens, stop - base)
            ordinal, documents = self._documents_of_part(part, low, high)
            if first < 0:
                first = int(self.document_starts[part]) + ordinal
            documents["start"] += np.uint64(base)
            found.append(documents)
            part += 1
        return first, np.concatenate(found) if found else np.empty(0, DOCUMENT)

    def document_at(self, token: int) -> tuple[int, int, np.void, int]:
        """Return the document that a token belongs to: number, part, DOCUMENT, and end over all parts."""
        part = int(np.searchsorted(self.part_starts, token, side="right")) - 1
        base = int(self.part_starts[part])
        after, _ = self._documents_of_part(part, token - base + 1, token - base + 1)
        ordinal = after - 1
        count = min(2, self.prepared.parts[part].documents - ordinal)
        found = self.read_documents(part, ordinal, count)
        end = int(found[1]["start"]) if count == 2 else self.prepared.parts[part].tokens
        found["start"] += np.uint64(base)
        return int(self.document_starts[part]) + ordinal, part, found[0], base + end

    def document_lengths(self, documents: int = 1 << 16) -> Iterator[np.ndarray]:
        """Yield the tokens of every document, in order, of at most so many at a time."""
        for part, told in enumerate(self.prepared.parts):
            for first in range(0, told.documents, documents):
                count = min(documents, told.documents - first)
                more = min(count + 1, told.documents - first)
                starts = self.read_documents(part, first, more)["start"].astype(np.int64)
                if more == count:
                    starts = np.append(starts, told.tokens)
                yield np.diff(starts)

    def read_documents(self, part: int, first: int, count: int) -> np.ndarray:
        """Return some of a part's documents. Shape: (count,), DOCUMENT."""
        out = np.empty(count, DOCUMENT)
        if count:
            self._pread(part, "documents", out, first)
        return out

    def _documents_of_part(self, part: int, low: int, high: int) -> tuple[int, np.ndarray]:
        """Return the first document at or after token `low` of a part, and those from there to before `high`."""
        told = self.prepared.parts[part]
        edges = -(-told.tokens // BLOCK_TOKENS)
        block = min(low // BLOCK_TOKENS, edges - 1)
        last = -(-high // BLOCK_TOKENS)
        count = min(last, edges - 1) - block + 1
        bounds = np.empty(max(1, count), "<u4")
        self._pread(part, "blocks", bounds, block)
        begin = int(bounds[0])
        end = told.documents if last > edges - 1 else int(bounds[-1])
        documents = self.read_documents(part, begin, end - begin)
        left, right = np.searchsorted(documents["start"], [low, high])
        return begin + int(left), documents[left:right]

    def _pread(self, part: int, suffix: str, out: np.ndarray, first: int) -> None:
        self._files.read_into(f"{self.prepared.parts[part].name}.{suffix}", out, first)
