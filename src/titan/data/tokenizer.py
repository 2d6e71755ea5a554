"""Text to tokens and back: the one door to tiktoken, sentencepiece and tokenizers.

`bytes` is an encoding of 256 ranks, one a byte, with no merges: it needs no file and its loss reads as bits per
byte. `llama3` and `tiktoken` read Llama 3's tokenizer.model with the pattern that Meta published for it,
`sentencepiece` reads Llama 2's, `huggingface` any tokenizer.json.

All keep one rule: what a text spells is text. `<|eot_id|>` in a document becomes the letters, never the token.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken

from titan.config.schema import TokenizerConfig, TokenizerKind
from titan.config.tokenizer_files import JsonFile, read_json, read_pieces, read_ranks
from titan.config.vocabulary import (
    BYTES_SPECIAL_TOKENS,
    LLAMA3_PATTERN,
    LLAMA3_SPECIAL_TOKENS,
    check_fingerprint,
    ranks_path,
)
from titan.errors import ConfigError, Problem

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

_CHUNK = 400_000
_RUN = 25_000
"""Characters of a chunk, and of a run of blanks or of anything else, at which Meta's reference cuts a text."""


@dataclass(frozen=True)
class Tokenizer(ABC):
    """Text to tokens and back, with a beginning and an end of text."""

    config: TokenizerConfig
    """What it was built from; a copy in another process is built from it too."""
    n_tokens: int
    """Size of the vocabulary, special tokens included: one more than the highest id."""
    bos: int
    eos: int
    fingerprint: str
    """Changes when any token does."""
    special: dict[str, int] = field(repr=False)
    """Ids of the special tokens, by what they are called."""

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a document, begin and end of text around them. Shape: (tokens,), uint32.

        Special tokens that are spelled out in the text are text.
        """
        tokens = self.encode_text(text)
        document = np.empty(len(tokens) + 2, np.uint32)
        document[0], document[1:-1], document[-1] = self.bos, tokens, self.eos
        return document

    def encode_text(self, text: str) -> np.ndarray:
        """Return the tokens of a text and nothing else. Shape: (tokens,), uint32.

        A half of a surrogate pair, which JSON can spell but UTF-8 cannot, becomes a replacement character.
        """
        try:
            return self._encode(text)
        except (UnicodeEncodeError, TypeError, RuntimeError):  # as each of the libraries says it
            if (mended := mend(text)) == text:
                raise
            return self._encode(mended)

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray: ...

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens; bytes that are not UTF-8 become replacement characters."""

    def __reduce__(self) -> tuple[Any, ...]:
        return build_tokenizer, (self.config,)


def mend(text: str) -> str:
    """Return a text whose surrogate pairs are the characters they stand for, and halves of pairs are U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer of a config.

    Raises:
        ConfigError: If its file is missing, is of another kind, or is not the one whose fingerprint the config names.
    """
    fingerprint = check_fingerprint(config)
    match config.kind:
        case TokenizerKind.bytes:
            ranks = {bytes([i]): i for i in range(256)}
            return _build_ranks(config, r"(?s:.{1,4096})", ranks, BYTES_SPECIAL_TOKENS, fingerprint)
        case TokenizerKind.sentencepiece:
            return _build_pieces(config, fingerprint)
        case TokenizerKind.huggingface:
            return _build_json(config, fingerprint)
        case _:
            ranks = read_ranks(ranks_path(config))
            return _build_ranks(config, LLAMA3_PATTERN, ranks, LLAMA3_SPECIAL_TOKENS, fingerprint)


# ---- ranks of byte pairs, through tiktoken


@dataclass(frozen=True)
class RanksTokenizer(Tokenizer):
    """Byte pairs merged by rank: `bytes`, `llama3` and `tiktoken`."""

    encoding: tiktoken.Encoding = field(repr=False)

    def _encode(self, text: str) -> np.ndarray:
        if self.config.kind is TokenizerKind.bytes:
            return self._encode_piece(text)
        pieces = [self._encode_piece(piece) for piece in cut_as_reference(text)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _encode_piece(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encoding.encode_to_numpy(mend(text), disallowed_special=())

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens; bytes that are not UTF-8 become replacement characters."""
        return self.encoding.decode(tokens)


def cut_as_reference(text: str) -> Iterator[str]:
    """Cut a text where Meta's reference for Llama 3 does: no chunk too long, and no run of one sort of characters.

    The pattern's engine gives up on half a million blanks in a row.

    Source:
        Meta's package llama-models, Tokenizer.encode.
    """
    for start in range(0, max(1, len(text)), _CHUNK):
        chunk = text[start : start + _CHUNK]
        if not _may_have_long_run(chunk):
            yield chunk
            continue
        last = 0
        for run in re.finditer(r"\s+|\S+", chunk):
            for at in range(run.start() + _RUN, run.end(), _RUN):
                yield chunk[last:at]
                last = at
        yield chunk[last:]


def _may_have_long_run(chunk: str) -> bool:
    """Whether any block is of one sort all through, as every run of twice its length has one that is."""
    block = _RUN // 2
    pieces = (chunk[start : start + block] for start in range(0, len(chunk) - block + 1, block))
    return len(chunk) > _RUN and any(piece.isspace() or not re.search(r"\s", piece) for piece in pieces)


def _build_ranks(
    config: TokenizerConfig, pattern: str, ranks: dict[bytes, int], special: tuple[str, ...], fingerprint: str
) -> Tokenizer:
    ids = {token: len(ranks) + i for i, token in enumerate(special)}
    encoding = tiktoken.Encoding(config.kind.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)
    return RanksTokenizer(config, encoding.n_vocab, ids[special[0]], ids[special[1]], fingerprint, ids, encoding)


# ---- SentencePiece


@dataclass(frozen=True)
class PiecesTokenizer(Tokenizer):
    """A model of SentencePiece, as Llama 2's.

    Its user-defined symbols are pieces of text and found in it, as their name says; control symbols never are.
    """

    processor: sentencepiece.SentencePieceProcessor = field(repr=False)

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.processor.encode(text), np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens; control symbols have none."""
        return self.processor.decode([int(token) for token in tokens])


def _build_pieces(config: TokenizerConfig, fingerprint: str) -> Tokenizer:
    import sentencepiece

    found = read_pieces(config.path)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(config.path)
    except (RuntimeError, OSError) as error:
        problem = Problem(f"tokenizer.path = {config.path} cannot be loaded by sentencepiece", str(error).strip())
        raise ConfigError([problem]) from error
    ids = range(processor.get_piece_size())
    special = {processor.id_to_piece(i): i for i in ids if processor.is_control(i)}
    return PiecesTokenizer(
        config, found.n_tokens, processor.bos_id(), processor.eos_id(), fingerprint, special, processor
    )


# ---- tokenizer.json


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """Anything that a tokenizer.json describes."""

    file: JsonFile = field(repr=False)
    backend: tokenizers.Tokenizer = field(repr=False)
    marked: dict[str, _Marked] = field(default_factory=dict, repr=False)
    """By the character that their marks are made of."""

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, special tokens included."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=False)

    def encode_marked(self, text: str, mark: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Tokenise a text in which some special tokens are marked, and all others are text.

        The whole text at once, as it would be if its special tokens were spelled out: what a tokenizer does to the
        begin of a text, it does not do after every special token.

        Args:
            text: With those of `marks_of` in the place of every special token that is meant.
            mark: The character that marks are made of; the text has it nowhere else.

        Returns:
            The tokens, and the first and one past the last character of each in `text`.
        """
        marked = self._marked(mark)
        found = marked.backend.encode(text, add_special_tokens=False)
        return marked.ids[found.ids], found.offsets

    def marks_of(self, mark: str) -> dict[str, str]:
        """Return what stands for each special token in a marked text."""
        return self._marked(mark).marks

    def _marked(self, mark: str) -> _Marked:
        if mark not in self.marked:
            self.marked[mark] = self._build_marked(mark)
        return self.marked[mark]

    def _build_marked(self, mark: str) -> _Marked:
        from tokenizers import AddedToken

        backend = _load_json(self.file)
        settings = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        marks = {token: f"{mark}{number}{mark}" for number, token in enumerate(self.special)}
        for token, spelled in marks.items():
            was = settings[token]
            backend.add_tokens(
                [AddedToken(spelled, lstrip=was.lstrip, rstrip=was.rstrip, normalized=False, special=False)]
            )
        assert backend.get_vocab_size() == self.backend.get_vocab_size() + len(self.special)
        ids = np.arange(self.n_tokens + len(self.special), dtype=np.uint32)
        for token, spelled in marks.items():
            ids[backend.token_to_id(spelled)] = self.special[token]
        return _Marked(backend, marks, ids)


@dataclass(frozen=True)
class _Marked:
    """A tokenizer that knows special tokens by a mark alone."""

    backend: tokenizers.Tokenizer
    marks: dict[str, str]
    """What stands for each special token."""
    ids: np.ndarray
    """The id of each of its tokens in the tokenizer itself."""


def _build_json(config: TokenizerConfig, fingerprint: str) -> Tokenizer:
    found = read_json(config.path)
    try:
        backend = _load_json(found)
    except Exception as error:  # tokenizers raises this and nothing narrower
        problem = Problem(
            f"tokenizer.path = {config.path} cannot be loaded by tokenizers",
            str(error),
            "pip install --upgrade tokenizers   if the file is of a newer version",
        )
        raise ConfigError([problem]) from error
    added = backend.get_added_tokens_decoder()
    special = {token.content: index for index, token in sorted(added.items()) if token.special}
    bos, eos = backend.token_to_id(found.bos), backend.token_to_id(found.eos)
    assert bos is not None and eos is not None, "found in the file before"  # noqa: PT018
    return JsonTokenizer(config, found.n_tokens, bos, eos, fingerprint, special, found, backend)


def _load_json(found: JsonFile) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(found.path))
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # or a text would have other tokens every time
    backend.encode_special_tokens = True
    return backend
