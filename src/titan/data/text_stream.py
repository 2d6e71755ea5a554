"""Text of tokens that come one at a time: every piece is whole characters, and all pieces together are the text.

A token need not be whole characters: an emoji is four tokens of `bytes`, and merged bytes end anywhere. And its text
need not be its own: SentencePiece drops the blank before the first word. So tokens are decoded together with some that
stood before them, and what ends in the middle of a character waits for the next token.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from titan.data.tokenizer import RanksTokenizer, Tokenizer

_CONTEXT = 8
"""Tokens before the new ones that are decoded with them."""
_REPLACEMENT = "�"


class TextStream:
    """The text behind a prompt.

    Args:
        tokenizer: Whose tokens come.
        prompt: The tokens that they come behind.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._told = len(self._tokens)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the characters that are whole with this token; empty where there are none yet."""
        if isinstance(self.tokenizer, RanksTokenizer):
            return self._bytes.decode(self.tokenizer.encoding.decode_single_token_bytes(token))
        self._tokens.append(token)
        before, now = self._decode(self._tokens[: self._told]), self._decode(self._tokens)
        if now.endswith(_REPLACEMENT):
            return ""
        self._tokens = self._tokens[-_CONTEXT:]
        self._told = len(self._tokens)
        return now[len(before) :]

    def finish(self) -> str:
        """Return what was waiting for the rest of a character that does not come."""
        if isinstance(self.tokenizer, RanksTokenizer):
            return self._bytes.decode(b"", final=True)
        before, now = self._decode(self._tokens[: self._told]), self._decode(self._tokens)
        self._told = len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)


def decode_behind(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text of tokens that stand behind a prompt."""
    stream = TextStream(tokenizer, prompt)
    return "".join([*(stream.push(token) for token in tokens), stream.finish()])
