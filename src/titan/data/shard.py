"""A part of a source that is read from its beginning to its end, and an account of what was in it.

A document that cannot be read is either an error that names file and line, or it is counted under its reason and
reported at the end: nothing is dropped in silence.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from titan.config.schema import BadDocuments, RecordFormat, SourceConfig
from titan.data.conversation import BadConversation, check_messages
from titan.errors import DataError

LEAST_PORTION_BYTES, MOST_PORTION_BYTES = 4 << 20, 256 << 20
_PORTIONS = 256
Content = str | list[dict[str, Any]]
"""What a document says: a text, or the messages of a conversation."""


def portion_bytes(total_bytes: int) -> int:
    """Return how much of a source is read, or tokenised, at a time: it depends on the source's size alone.

    Enough portions to keep many processes busy to the end, yet not so many that a large source becomes a crowd of
    files. A change of this changes where every document is found.
    """
    fair = 1 << (total_bytes // _PORTIONS).bit_length()
    return max(LEAST_PORTION_BYTES, min(MOST_PORTION_BYTES, fair))


@dataclass(frozen=True)
class Document:
    """One record of a shard."""

    content: Content
    record: int
    """Which one of the shard, from 0, also counting those that are left out: a line, or a row of a table."""


@dataclass
class Shard:
    """A file, or a part of one, or some rows of a table.

    Reading starts anew every time; `documents`, `text_bytes` and `skipped` then describe what was read.
    """

    config: SourceConfig
    name: str
    """What it is called in messages and manifests: always the same for the same data."""
    size_bytes: int
    """How much there is to read, as it is stored; only to plan by."""
    documents: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Documents left out, by reason."""
    share: tuple[int, int] = (0, 1)
    """Only records whose number, divided by the second, leaves the first are read and accounted for."""

    def read(self, start: int = 0, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Yield the documents from record `start` on.

        Args:
            start: Counted from 0.
            skipped: Takes the account of those that are left out, beside what is in it; None for one of its own.

        Raises:
            DataError: At one that cannot be read, unless such are to be skipped; and where reading itself fails.
        """
        self.documents = self.text_bytes = 0
        self.skipped = Counter() if skipped is None else skipped
        for document in self._read(start):
            if not self.is_in_share(document.record):
                continue
            if not document.content:
                self.skipped["empty"] += 1
                continue
            self.documents += 1
            self.text_bytes += count_bytes(document.content)
            yield document

    def is_in_share(self, record: int) -> bool:
        """Return whether a record is one of those that are read."""
        return record % self.share[1] == self.share[0]

    def locate(self, record: int) -> str:
        """Return where a record is, for people: the file and the line."""
        raise NotImplementedError

    def _read(self, start: int) -> Iterator[Document]:
        raise NotImplementedError

    @property
    def naming(self) -> str:
        """What to type to read another field."""
        return f"data.{'messages' if self.config.format is RecordFormat.chat else 'text'}_field=NAME"

    def pick(self, values: Mapping[str, Any], record: int) -> Iterator[Document]:
        """Yield what a record holds under the field that is to be read; nothing where that is refused."""
        name = field_of(self.config)
        if name not in values:
            return self.refuse(record, no_field(name, values), f"no field {name!r}", self.naming)
        content = values[name]
        if self.config.format is RecordFormat.chat:
            try:
                check_messages(content)
            except BadConversation as error:
                return self.refuse(record, f"field {name!r} is no conversation: {error}", error.reason)
        elif not isinstance(content, str):
            kind = type(content).__name__
            return self.refuse(record, f"field {name!r} is of type {kind}, not text", f"{name!r} is not text")
        yield Document(content, record)

    def refuse(self, record: int, message: str, reason: str, naming: str = "") -> None:
        """Refuse a record; see `refuse_at`."""
        if self.is_in_share(record):
            self.refuse_at(lambda: self.locate(record), message, reason, naming)

    def records_of_share(self, first: int, stop: int) -> range:
        """Return those of some records that are read."""
        place, count = self.share
        return range(first + (place - first) % count, stop, count)

    def refuse_rest(self, record: int, locate: Callable[[], str], error: Exception) -> None:
        """Refuse what is left of a shard that cannot be read on; counted once, by the share that the record is in.

        Args:
            record: The first that could not be read.
            locate: Returns how far reading came; only asked for an error.
            error: What stopped it.

        Raises:
            DataError: Unless bad documents are to be skipped, and what is stored is bad. That a file is away or a
                network down says nothing about documents: they would be lost without being bad.
        """
        if not is_damage(error):
            raise DataError(
                f"{locate()}: {gist(error)}\n  This is no bad document, and data.bad_documents=skip does not pass over "
                "it: the same command goes on when it can be read"
            ) from error
        if self.config.bad_documents is BadDocuments.error or self.is_in_share(record):
            self.refuse_at(locate, gist(error), "unreadable file")

    def refuse_document(self, document: Document, message: str, reason: str) -> None:
        """Refuse a document that was read, and counted, but cannot be encoded; see `refuse_at`."""
        self.documents -= 1
        self.text_bytes -= count_bytes(document.content)
        self.refuse(document.record, message, reason)

    def refuse_at(self, locate: Callable[[], str], message: str, reason: str, naming: str = "") -> None:
        """Raise, or count where bad documents are to be skipped.

        Args:
            locate: Returns where it is; only asked for an error.
            message: What is wrong with it, for an error.
            reason: The same, to count it under.
            naming: What to type to read another field.

        Raises:
            DataError: Unless bad documents are to be skipped.
        """
        if self.config.bad_documents is BadDocuments.error:
            hint = "data.bad_documents=skip leaves such documents out, counted and reported"
            if naming:
                hint = f"{naming} names the field to read; {hint}"
            raise DataError(f"{locate()}: {message}\n  {hint}")
        self.skipped[reason] += 1


def field_of(config: SourceConfig) -> str:
    """Return the field of a record that holds the document."""
    return config.messages_field if config.format is RecordFormat.chat else config.text_field


def is_damage(error: BaseException) -> bool:
    """Return whether what was read is bad, and not the way to it: the disk, the network, permissions, memory."""
    cause: BaseException | None = error
    while cause is not None:
        if not isinstance(cause, _DAMAGE):
            return False
        # at bad contents pyarrow, gzip and titan's own reader of zstd raise it without a number of the system's
        if isinstance(cause, OSError) and (cause.errno is not None or type(cause) not in (OSError, gzip.BadGzipFile)):
            return False
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return True


_DAMAGE = (OSError, EOFError, ValueError, TypeError, LookupError, NotImplementedError, zlib.error)
"""What libraries raise at bad contents; the first also for everything else."""


def gist(error: BaseException) -> str:
    """Return the first line of what an error says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def no_field(name: str, there: Iterable[str]) -> str:
    """Return that a field is missing, and which are there."""
    return f"no field {name!r} (it has {', '.join(map(repr, there))})"


def count_bytes(content: Content) -> int:
    """Return the bytes of a document's text in UTF-8."""
    if isinstance(content, str):
        return len(content) if content.isascii() else len(content.encode("utf-8", "surrogatepass"))
    return sum(count_bytes(message["content"]) for message in content)
