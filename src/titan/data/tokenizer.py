"""Text to tokens and back, through tiktoken.

`bytes` is an encoding of 256 ranks, one a byte, with no merges: it needs no file and its loss reads as bits per
byte. `tiktoken` reads Llama 3's tokenizer.model with the pattern that Meta published for it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import tiktoken

from titan.config.schema import TokenizerConfig, TokenizerKind
from titan.config.vocabulary import BYTES_SPECIAL_TOKENS, LLAMA3_SPECIAL_TOKENS, read_ranks

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before merging.

Source:
    Meta's reference tokenizer for Llama 3.
"""
_MANY_BLANKS = re.compile(r"(\s{25000})")  # where Meta's reference cuts too


@dataclass(frozen=True)
class Tokenizer:
    """An encoding with a beginning and an end of text."""

    encoding: tiktoken.Encoding
    bos: int
    eos: int
    fingerprint: str
    """Changes when any token does."""

    @property
    def n_tokens(self) -> int:
        """Return the size of the vocabulary, special tokens included."""
        return self.encoding.n_vocab

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a document, begin and end of text around them. Shape: (tokens,), uint32.

        Special tokens that are spelled out in the text are text.
        """
        return np.concatenate(([self.bos], self._encode_text(text), [self.eos])).astype(np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens; bytes that are not UTF-8 become replacement characters."""
        return self.encoding.decode(tokens)

    def _encode_text(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell; tiktoken's own way to mend it
            return self._encode_text(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:  # the pattern's engine gives up on half a million blanks in a row
            pieces = [piece for piece in _MANY_BLANKS.split(text) if piece]
            if len(pieces) < 2:
                raise
            return np.concatenate([self._encode_text(piece) for piece in pieces])


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer of a config.

    Raises:
        ConfigError: If its file is missing or is not a tokenizer.model.
    """
    if config.kind is TokenizerKind.bytes:
        ranks = {bytes([i]): i for i in range(256)}
        return _build("bytes", r"(?s:.{1,4096})", ranks, BYTES_SPECIAL_TOKENS)
    return _build("llama3", LLAMA3_PATTERN, read_ranks(config.path), LLAMA3_SPECIAL_TOKENS)


def _build(name: str, pattern: str, ranks: dict[bytes, int], special: tuple[str, ...]) -> Tokenizer:
    ids = {token: len(ranks) + i for i, token in enumerate(special)}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids)
    digest = hashlib.sha256(pattern.encode())
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d:%b\n" % (rank, token.hex().encode()))
    digest.update(repr(ids).encode())
    return Tokenizer(encoding, ids[special[0]], ids[special[1]], digest.hexdigest())
