"""Tokenise once, pack into one long row of tokens on disk, and read it piece by piece ever after.

Documents follow each other, each between its begin and end of text, and the whole is cut into rows of equal length:
a document longer than a row goes on in the next one, and only the last row of all is padded. The file is named by a
hash of everything it depends on (the source files with their sizes and times, the tokenizer, the options), so a
changed source makes a new one. One process of a machine writes it, under another name until it is whole; the
others wait for it to appear.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from titan.config.schema import SourceConfig
from titan.data.source import Source, open_source
from titan.data.tokenizer import Tokenizer
from titan.errors import DataError

_FORMAT = 2
_POLL_SECONDS = 0.1


class TokenFile:
    """Tokens on disk, read piece by piece.

    Not mapped into memory: pages that were read would count as the process's own for as long as it runs, and its
    memory would seem to grow until the whole file had been seen.
    """

    def __init__(self, path: Path, tokens: int, dtype: type[np.unsignedinteger]) -> None:
        self.tokens, self.dtype = tokens, np.dtype(dtype)
        self.path, self._descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, piece: slice) -> np.ndarray:
        """Read tokens [start, stop). Shape: (stop - start,), uint16 or uint32.

        Raises:
            DataError: If the file ends before.
        """
        start, stop, _ = piece.indices(self.tokens)
        wanted = max(0, stop - start) * self.dtype.itemsize
        read = os.pread(self._descriptor, wanted, start * self.dtype.itemsize)
        if len(read) < wanted:
            raise DataError(f"{self.path} ends before token {stop:,}; delete its folder to tokenise anew")
        return np.frombuffer(read, self.dtype)


@dataclass(frozen=True)
class PackedTokens:
    """Tokenised text on disk."""

    path: Path
    tokens: int
    """All tokens, begin and end of text included."""
    documents: int
    text_bytes: int
    """Bytes of the text in UTF-8."""
    skipped: dict[str, int]
    """Documents left out, by reason."""
    longest_document_tokens: int
    vocab_size: int
    digest: str = ""
    """Of all tokens: XXH3, 128 bits, in hexadecimal."""

    def open(self) -> TokenFile:
        """Open the tokens for reading."""
        return TokenFile(self.path, self.tokens, token_dtype(self.vocab_size))

    def describe(self, seq_len: int) -> list[str]:
        """Return what a person wants to know of the data, as lines."""
        lines = [
            f"{self.documents:,} document{'s' * (self.documents != 1)}, {_size(self.text_bytes)} of text, "
            f"{self.tokens:,} tokens ({self.text_bytes / max(1, self.tokens):.2f} bytes a token)"
        ]
        if self.longest_document_tokens > seq_len:
            lines.append(
                f"documents longer than a row of {seq_len} go on in the next; the longest has "
                f"{self.longest_document_tokens:,} tokens"
            )
        lines += [
            f"left out {count:,} document{'s' * (count != 1)}: {reason}"
            for reason, count in sorted(self.skipped.items())
        ]
        return lines


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the smallest type that holds every token."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def pack_tokens(
    config: SourceConfig, cache_dir: str, tokenizer: Tokenizer, is_writer: bool, timeout_seconds: float
) -> PackedTokens:
    """Return the tokenised text, from the cache or made now.

    Args:
        config: The documents.
        cache_dir: Where tokenised text is kept.
        tokenizer: What to tokenise with.
        is_writer: Whether this process makes the file where it is missing; others wait.
        timeout_seconds: How long the others wait without a sign of life from the writer.

    Raises:
        DataError: If a document is bad (see `Source`), if there is no text at all, if the cache cannot be written, or
            if the wait is in vain.
    """
    source = open_source(config)
    folder = Path(cache_dir) / "tokens" / fingerprint(source, tokenizer)
    if not (folder / "index.json").exists():
        if is_writer:
            try:
                _write(source, tokenizer, folder)
            except OSError as error:
                raise DataError(
                    f"data.cache_dir = {cache_dir} cannot be written: {error.strerror or error}\n"
                    "  Try  data.cache_dir=/path/with/space"
                ) from error
        else:
            _wait_for(folder, timeout_seconds)
    return PackedTokens(folder / "tokens.bin", **json.loads((folder / "index.json").read_text()))


def fingerprint(source: Source, tokenizer: Tokenizer) -> str:
    """Return a hash of everything that the tokenised text depends on."""
    digest = hashlib.sha256()
    described = {
        "format": _FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "kind": source.config.kind.name,
        "text_field": source.config.text_field,
        "bad_documents": source.config.bad_documents.name,
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    for file in source.files:
        status = file.stat()
        digest.update(f"\n{file}\t{status.st_size}\t{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(tokenizer.n_tokens)
    temporary = folder / f".tokens.{os.uname().nodename}.{os.getpid()}.tmp"
    digest, total, longest = xxhash.xxh3_128(), 0, 0
    try:
        with temporary.open("wb") as file:
            for document in source:
                assert isinstance(document.content, str)
                tokens = tokenizer.encode(document.content)
                piece = tokens.astype(dtype).tobytes()
                file.write(piece)
                digest.update(piece)
                total += len(tokens)
                longest = max(longest, len(tokens))
        if not source.documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in source.skipped.items())
            names = ", ".join(str(file) for file in source.files[:3])
            raise DataError(f"no text in {len(source.files)} files ({names}){': ' + reasons if reasons else ''}")
        os.replace(temporary, folder / "tokens.bin")
    finally:
        temporary.unlink(missing_ok=True)
    packed = PackedTokens(
        folder,
        total,
        source.documents,
        source.text_bytes,
        dict(source.skipped),
        longest,
        tokenizer.n_tokens,
        digest.hexdigest(),
    )
    index = {key: value for key, value in asdict(packed).items() if key != "path"}
    temporary = folder / f".index.{os.uname().nodename}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(index))
    os.replace(temporary, folder / "index.json")


def _wait_for(folder: Path, timeout_seconds: float) -> None:
    def size() -> int:
        return sum(file.stat().st_size for file in folder.glob(".tokens.*")) if folder.exists() else 0

    seen, since = size(), time.monotonic()
    while not (folder / "index.json").exists():
        time.sleep(_POLL_SECONDS)
        try:
            now = size()
        except FileNotFoundError:  # renamed between listing and looking
            continue
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > timeout_seconds:
            raise DataError(f"waited {timeout_seconds:.0f} s for another rank to tokenise the data into {folder}")
