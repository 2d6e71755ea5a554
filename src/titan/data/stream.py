"""Rows made while training: every one a function of (seed, data, options), whoever makes it.

The rows of a step are shared out among V virtual streams: stream s makes the rows j of the global batch with
j // (G/V) = s, and it alone reads its share of the documents. V depends on the config only (`count_streams`), so ranks
and workers can share out the streams in any way, and a run that goes on with another number of them goes on exactly.

The documents of a stream. In every epoch the shards of the source are put into a new order. Where there are many more
shards than streams, stream s takes the shards at places s, s+V, … of that order, and nobody else opens them. Where
there are fewer, every stream reads all shards and keeps the records of its own: (record + shard) mod V = s. The others'
are passed over without being parsed. A stream that finds no document in its share of an epoch, because there are fewer
documents than streams, reads all of them instead in that epoch.

Inside a stream, windows of some documents each are shuffled, tokenised and packed. So the position is a few integers
(`Cursor`): the window, and how far in it. To go on from there, the documents of one window are read again.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from titan.config.schema import Packing
from titan.data.batch import IGNORED_LABEL, permute
from titan.data.conversation import BadConversation
from titan.data.encode import Encoded
from titan.data.packing import Segment, pack_best_fit
from titan.data.rows import Row
from titan.data.shard import Content, Document, Shard, count_bytes
from titan.data.source import Source
from titan.errors import DataError

SHARDS_PER_STREAM = 4
"""From so many shards a stream on, each is read by one stream alone; fewer would not come out even enough."""
FEWEST_TOKENS = 2
"""A document of fewer has nothing to predict, and is left out."""


class Cursor(NamedTuple):
    """Where in its documents a stream's next row begins."""

    epoch: int = 0
    reads_all: int = 0
    """1 in an epoch in which the stream reads all documents, for its own share holds none."""
    has_documents: int = 0
    """1 once the epoch has had a document for the stream."""
    window: int = 0
    """In the epoch."""
    place: int = 0
    """Of the shard in which the window begins, in the epoch's order of shards."""
    record: int = 0
    """Of that shard, from which on the window's documents are read."""
    item: int = 0
    """In the window: of the next document; with best_fit, of the next row."""
    offset: int = 0
    """Tokens of the next document that are used up."""


def count_streams(global_batch_size: int, most: int) -> int:
    """Return how many streams share out the rows of a step: the largest divisor that is not above `most`."""
    return max(n for n in range(1, min(global_batch_size, most) + 1) if global_batch_size % n == 0)


@dataclass(frozen=True)
class DocumentShare:
    """What one of V streams reads of a source."""

    source: Source
    stream: int
    streams: int
    key: str
    """Names the order: the seed, and what else is to make a difference."""

    @property
    def takes_shards(self) -> bool:
        """Return whether shards are read by one stream each."""
        return len(self.source.shards) >= SHARDS_PER_STREAM * self.streams

    def read(self, cursor: Cursor, skipped: Counter[str]) -> Iterator[tuple[int, Document]]:
        """Yield the epoch's documents of this stream from the beginning of a window on, each with its shard's place.

        Args:
            cursor: Where the window begins.
            skipped: Takes the count of documents that cannot be read, by reason.
        """
        shards = self.source.shards
        order = self._order(cursor.epoch)
        for place in range(cursor.place, len(shards)):
            index = int(order[place])
            shard = self._part_of(shards[index], index, place, bool(cursor.reads_all))
            if shard is None:
                continue
            for document in shard.read(cursor.record if place == cursor.place else 0, skipped):
                yield place, document

    def shard_at(self, epoch: int, place: int) -> Shard:
        """Return the shard at a place of an epoch's order."""
        return self.source.shards[int(self._order(epoch)[place])]

    def _order(self, epoch: int) -> np.ndarray:
        return _order_of_shards(len(self.source.shards), f"{self.key}/shards/{epoch}")

    def _part_of(self, shard: Shard, index: int, place: int, reads_all: bool) -> Shard | None:
        """Return a reader, with an account of its own, of what this stream takes of a shard."""
        shard = copy.copy(shard)
        if reads_all:
            return shard
        if self.takes_shards:
            return shard if place % self.streams == self.stream else None
        shard.share = ((self.stream - index) % self.streams, self.streams)
        return shard


@dataclass(frozen=True)
class _Window:
    """Some documents, shuffled."""

    documents: list[tuple[int, Document]]
    """Each with the place of its shard in the epoch's order."""
    next_place: int
    next_record: int
    is_last: bool
    """Whether the epoch ends with it."""


@dataclass(frozen=True)
class StreamedPiece:
    """A piece of a document in a row."""

    shard: Shard
    """That the document is from."""
    record: int
    """Which record of the shard."""
    first: int
    """The piece's first token in the document."""
    position: int
    """Where in the row it is."""
    length: int
    """Positions that it takes."""
    tokens: np.ndarray
    """Of the whole document. Shape: (N,)."""


@dataclass
class _Piece:
    """What is left of a document."""

    encoded: Encoded
    document: tuple[int, Document]
    cursor: Cursor
    """Of its first token."""
    first: int

    @property
    def tokens(self) -> np.ndarray:
        return self.encoded.tokens


class Stream:
    """The endless rows of one stream.

    Args:
        share: Its documents.
        encode: Makes tokens of one.
        seq_len: Tokens of a row.
        window: Documents that are shuffled together.
        packing: How documents become rows.
        padding: The token that fills rows.
        with_starts: Whether rows say where documents begin.
        cursor: Where to begin.
    """

    def __init__(
        self,
        share: DocumentShare,
        encode: Callable[[Content], Encoded],
        seq_len: int,
        window: int,
        packing: Packing,
        padding: int,
        with_starts: bool,
        cursor: Cursor,
    ) -> None:
        self.share, self.encode, self.seq_len, self.window_size = share, encode, seq_len, window
        self.packing, self.padding, self.with_starts = packing, padding, with_starts
        self.cursor = cursor
        """Where the next row begins."""
        self.text_bytes = self.tokens = 0
        """What has been tokenised so far."""
        self.skipped: Counter[str] = Counter()
        """Documents left out, by reason."""
        self._next = cursor  # of the next document; with best_fit, of the next row
        self._window: _Window | None = None
        self._documents: Iterator[tuple[int, Document]] | None = None
        self._pieces: deque[_Piece] = deque()
        self._rows: list[tuple[Row, list[StreamedPiece]]] | None = None
        self.pieces: list[StreamedPiece] = []
        """What the row that was made last is made of."""

    def next_row(self) -> Row:
        """Make the next row.

        Raises:
            DataError: If a document cannot be read, or if there is none with anything to learn.
        """
        return self._next_cut() if self.packing is Packing.concat else self._next_fitted()

    def _next_cut(self) -> Row:
        """Return the next piece of the documents in a row, of which the last token begins the row after it."""
        held = sum(len(piece.tokens) - piece.first for piece in self._pieces)
        while held <= self.seq_len:
            piece = self._next_piece()
            self._pieces.append(piece)
            held += len(piece.tokens) - piece.first
        # the last piece may be a book: no more of it is touched than the row takes
        parts = [piece.tokens[piece.first :][: self.seq_len + 1] for piece in self._pieces]
        tokens = np.concatenate(parts)[: self.seq_len + 1].astype(np.int64)
        labels = tokens[1:].copy()
        starts = np.zeros(self.seq_len, dtype=np.int64) if self.with_starts else None
        at, self.pieces = 0, []
        for piece in self._pieces:
            end = at + len(piece.tokens) - piece.first
            if at < self.seq_len:
                self.pieces.append(self._tell(piece, piece.first, at, min(end, self.seq_len) - at))
            if piece.encoded.learned is not None:
                learned = piece.encoded.learned[piece.first :][max(0, 1 - at) : self.seq_len + 1 - at]
                labels[max(at - 1, 0) : end - 1][~learned] = IGNORED_LABEL
            if starts is not None:
                starts[at:end] = at
            at = end
        self._advance()
        return Row(tokens[:-1], labels, starts)

    def _tell(self, piece: _Piece, first: int, position: int, length: int) -> StreamedPiece:
        place, document = piece.document
        shard = self.share.shard_at(piece.cursor.epoch, place)
        return StreamedPiece(shard, document.record, first, position, length, piece.tokens)

    def _advance(self) -> None:
        left = self.seq_len
        while left:
            piece = self._pieces[0]
            step = min(left, len(piece.tokens) - piece.first)
            piece.first += step
            left -= step
            if piece.first == len(piece.tokens):
                self._pieces.popleft()
        self.cursor = self._pieces[0].cursor._replace(offset=self._pieces[0].first)

    def _next_piece(self) -> _Piece:
        while True:
            window = self._open_window()
            at = self._next
            if at.item >= len(window.documents):
                self._leave_window(window)
                continue
            self._next = at._replace(item=at.item + 1, offset=0)
            document = window.documents[at.item]
            encoded = self._encode(*document)
            if encoded is not None:
                self._next = self._next._replace(has_documents=1)
                return _Piece(encoded, document, at._replace(has_documents=1), at.offset)

    def _next_fitted(self) -> Row:
        """Return the next row of the window's documents, which are packed together."""
        while True:
            window = self._open_window()
            if self._rows is None:
                self._rows = self._fit(window)
                if self._rows:
                    self._next = self._next._replace(has_documents=1)
            if self._next.item < len(self._rows):
                row, self.pieces = self._rows[self._next.item]
                self._next = self._next._replace(item=self._next.item + 1)
                if self._next.item == len(self._rows):  # or going on would read a window for nothing
                    self._leave_window(window)
                self.cursor = self._next
                return row
            self._leave_window(window)

    def _fit(self, window: _Window) -> list[tuple[Row, list[StreamedPiece]]]:
        found = [
            _Piece(encoded, document, self._next, 0)
            for document in window.documents
            if (encoded := self._encode(*document)) is not None
        ]
        rows = pack_best_fit(np.array([len(piece.tokens) for piece in found], dtype=np.int64), self.seq_len)
        return [self._fill(found, segments) for segments in rows]

    def _fill(self, found: list[_Piece], segments: Sequence[Segment]) -> tuple[Row, list[StreamedPiece]]:
        parts = [(found[segment.document].encoded, segment) for segment in segments]
        row = fill_row(parts, self.seq_len, self.padding, self.with_starts)
        ends = np.cumsum([0, *(segment.length for segment in segments)]).tolist()
        return row, [
            self._tell(found[segment.document], segment.first, position, segment.length)
            for segment, position in zip(segments, ends[:-1], strict=True)
        ]

    def _encode(self, place: int, document: Document) -> Encoded | None:
        try:
            encoded = self.encode(document.content)
        except BadConversation as error:
            shard = copy.copy(self.share.shard_at(self._next.epoch, place))  # with an account of its own
            shard.refuse_document(document, str(error), error.reason)
            self.skipped[error.reason] += 1
            return None
        if len(encoded.tokens) < FEWEST_TOKENS:
            self.skipped[f"shorter than {FEWEST_TOKENS} tokens"] += 1
            return None
        self.text_bytes += count_bytes(document.content)
        self.tokens += len(encoded.tokens)
        return encoded

    def _open_window(self) -> _Window:
        """Return the window of the next document, read if it is not there."""
        if self._window is not None:
            return self._window
        at = self._next
        if self._documents is None:
            self._documents = self.share.read(at, self.skipped)
        documents: list[tuple[int, Document]] = []
        place, record = at.place, at.record
        for found, document in self._documents:
            documents.append((found, document))
            place, record = found, document.record + 1
            if len(documents) == self.window_size:
                break
        key = _key(f"{self.share.key}/{self.share.stream}/{at.epoch}/{at.window}")
        order = permute(np.arange(len(documents)), len(documents), key) if documents else []
        is_last = len(documents) < self.window_size
        self._window = _Window([documents[index] for index in order], place, record, is_last)
        return self._window

    def _leave_window(self, window: _Window) -> None:
        at = self._next
        self._window, self._rows = None, None
        if not window.is_last:
            place, record = window.next_place, window.next_record
            self._next = at._replace(window=at.window + 1, place=place, record=record, item=0, offset=0)
            return
        self._documents = None
        if at.has_documents:
            self._next = Cursor(at.epoch + 1)
        elif not at.reads_all:
            self._next = Cursor(at.epoch, reads_all=1)
        else:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            names = ", ".join(shard.name for shard in self.share.source.shards[:3])
            count = len(self.share.source.shards)
            raise DataError(f"no text to train on in {count} shards ({names}){': ' + reasons if reasons else ''}")


def fill_row(parts: Sequence[tuple[Encoded, Segment]], seq_len: int, padding: int, with_starts: bool) -> Row:
    """Return the row of some segments of documents, one after the other, and padding behind them."""
    inputs = np.full(seq_len, padding, dtype=np.int64)
    labels = np.full(seq_len, IGNORED_LABEL, dtype=np.int64)
    starts = np.zeros(seq_len, dtype=np.int64) if with_starts else None
    at = 0
    for document, segment in parts:
        first, end = segment.first, at + segment.length
        inputs[at:end] = document.tokens[first : first + segment.length]
        labels[at:end] = document.tokens[first + 1 : first + 1 + segment.length]
        if document.learned is not None:
            labels[at:end][~document.learned[first + 1 : first + 1 + segment.length]] = IGNORED_LABEL
        if starts is not None:
            starts[at:] = at
        at = end
    if starts is not None:
        starts[at:] = at
    return Row(inputs, labels, starts)


@functools.lru_cache(maxsize=64)  # asked for with every piece of a row
def _order_of_shards(count: int, name: str) -> np.ndarray:
    return permute(np.arange(count), count, _key(name))


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
