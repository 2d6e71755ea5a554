"""Text of tokens that come one at a time: whole characters, and together the text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from titan.config.schema import TokenizerConfig, TokenizerKind
from titan.data.text_stream import TextStream, decode_behind
from titan.data.tokenizer import Tokenizer, build_tokenizer

from .vocabulary import TEXT, write_json_tokenizer, write_pieces, write_tokenizer

WORDS = f"{TEXT}  👩🏽‍🚀 naïve \n\t漢字 the end"


@pytest.fixture(params=["bytes", "tiktoken", "sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """One of each kind."""
    kind = TokenizerKind[request.param]
    path = {
        "tiktoken": lambda: write_tokenizer(tmp_path / "ranks"),
        "sentencepiece": lambda: write_pieces(tmp_path / "pieces.model"),
        "huggingface": lambda: write_json_tokenizer(tmp_path / "json"),
    }.get(request.param)
    return build_tokenizer(TokenizerConfig(kind, str(path()) if path is not None else None))


def test_all_pieces_are_the_text_and_each_is_of_whole_characters(tokenizer: Tokenizer) -> None:
    """Behind a prompt of any length, blanks at the seam included."""
    tokens = [tokenizer.bos, *map(int, tokenizer.encode_text(WORDS))]
    whole = tokenizer.decode(tokens)
    for cut in (1, 2, 9, len(tokens) - 3):
        before = tokenizer.decode(tokens[:cut])
        if before.endswith("�"):
            continue
        stream = TextStream(tokenizer, tokens[:cut])
        pieces = [stream.push(token) for token in tokens[cut:]]
        assert before + "".join(pieces) + stream.finish() == whole
        assert not any("�" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer: Tokenizer) -> None:
    """Nothing is shown of one that is not whole; it is at the end, if nothing more comes."""
    tokens = [int(token) for token in tokenizer.encode_text("x👍")]
    stream = TextStream(tokenizer, [tokenizer.bos])
    pieces = [stream.push(token) for token in tokens]
    assert (pieces[-1][-1], "".join(pieces).strip(), stream.finish()) == ("👍", "x👍", "")
    if len(tokens) > 2:
        assert decode_behind(tokenizer, [tokenizer.bos], tokens[:-1]).strip().rstrip("�") == "x"


def test_bytes_that_are_no_text_become_what_decoding_all_of_them_gives() -> None:
    """Whatever a model says in bytes, pieces together are the text."""
    tokenizer, numbers = build_tokenizer(TokenizerConfig(TokenizerKind.bytes)), random.Random(0)
    for _ in range(200):
        tokens = [numbers.choice((97, 200, 240, 159, 145, 141, 255)) for _ in range(numbers.randrange(1, 20))]
        assert decode_behind(tokenizer, [256], tokens) == tokenizer.decode(tokens)
