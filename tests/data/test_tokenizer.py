"""Text to tokens and back, with the bytes and with a tokenizer.model."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.vocabulary import MERGES, write_json_tokenizer, write_tokenizer
from titan.config.schema import TokenizerConfig, TokenizerKind
from titan.config.vocabulary import LLAMA3_SPECIAL_TOKENS, count_tokens
from titan.data.tokenizer import Tokenizer, build_tokenizer
from titan.errors import ConfigError

TEXTS = [
    "",
    "hello",
    " \t\r\n\n ",
    "".join(map(chr, range(128))),
    "zażółć gęślą jaźń, 漢字, العربية, 🙂👩‍👩‍👧‍👦",
    "\x00\x1b[31m\x7f\x85\u2028\ufeff\ufffe\U0010ffff",
    "<|begin_of_text|> is text, and so is <|eot_id|><|end_of_text|>",
    "e\u0301 is not é",
]


@pytest.fixture(scope="module")
def by_bytes() -> Tokenizer:
    """The tokenizer that needs no file."""
    return build_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes))


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer from a small tokenizer.model."""
    path = write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    return build_tokenizer(TokenizerConfig(kind=TokenizerKind.tiktoken, path=str(path)))


@pytest.fixture(scope="module")
def by_json(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer.json of byte pairs, in a folder with its settings."""
    folder = write_json_tokenizer(tmp_path_factory.mktemp("json"))
    return build_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))


@pytest.fixture(params=["by_bytes", "by_ranks", "by_json"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each tokenizer in turn."""
    return request.getfixturevalue(request.param)


def inner(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens between begin and end of text."""
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint32
    assert tokens[0] == tokenizer.bos
    assert tokens[-1] == tokenizer.eos
    return tokens[1:-1].tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    """Decoding undoes encoding for any Unicode, control characters and unassigned ones included."""
    assert tokenizer.decode(inner(tokenizer, text)) == text


def test_random_unicode_comes_back_as_it_was(tokenizer: Tokenizer) -> None:
    """Ten thousand characters from all planes survive, however the pattern splits them."""
    draw = random.Random(0)
    limits = [0x80, 0x800, 0x10000, sys.maxunicode + 1]
    for _ in range(20):
        codes = [draw.randrange(draw.choice(limits)) for _ in range(500)]
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        assert tokenizer.decode(inner(tokenizer, text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_the_bytes_of_the_text(by_bytes: Tokenizer, text: str) -> None:
    """Without merges, tokens are the UTF-8 bytes themselves, so a loss reads as bits a byte."""
    assert inner(by_bytes, text) == list(text.encode())


def test_special_tokens_follow_the_ranks(by_bytes: Tokenizer, by_ranks: Tokenizer) -> None:
    """Begin and end of text are the first two ids after the ranks; the front end counts the same vocabulary."""
    assert (by_bytes.bos, by_bytes.eos, by_bytes.n_tokens) == (256, 257, 258)
    ranks = 256 + len(MERGES)
    assert (by_ranks.bos, by_ranks.eos, by_ranks.n_tokens) == (ranks, ranks + 1, ranks + 256)
    assert len(LLAMA3_SPECIAL_TOKENS) == len(set(LLAMA3_SPECIAL_TOKENS)) == 256
    assert count_tokens(TokenizerConfig(kind=TokenizerKind.bytes)) == by_bytes.n_tokens


def test_a_real_llama_3_tokenizer_has_its_published_ids() -> None:
    """With 128,000 ranks the special tokens have the ids that Meta published."""
    ids = {token: 128_000 + index for index, token in enumerate(LLAMA3_SPECIAL_TOKENS)}
    assert ids["<|begin_of_text|>"] == 128_000
    assert ids["<|end_of_text|>"] == 128_001
    assert ids["<|finetune_right_pad_id|>"] == 128_004
    assert ids["<|start_header_id|>"] == 128_006
    assert ids["<|eom_id|>"] == 128_008
    assert ids["<|eot_id|>"] == 128_009
    assert ids["<|python_tag|>"] == 128_010
    assert ids["<|reserved_special_token_245|>"] == 128_255


def test_special_tokens_spelled_out_are_text(tokenizer: Tokenizer) -> None:
    """A document cannot end itself: no special id comes from its text."""
    text = "".join(LLAMA3_SPECIAL_TOKENS)
    first_special = min(tokenizer.bos, tokenizer.eos)
    assert max(inner(tokenizer, text)) < first_special


def test_merges_are_applied_in_their_order_within_the_pieces_of_the_pattern(by_ranks: Tokenizer) -> None:
    """Ranks merge as byte-pair encoding does, digits in groups of three at most, blanks before a word with it."""
    rank = {token: 256 + index for index, token in enumerate(MERGES)}
    a, e, four = ord("a"), ord("e"), ord("4")
    assert inner(by_ranks, "the the") == [rank[b"the"], rank[b" the"]]
    assert inner(by_ranks, "aaaaaaa") == [rank[b"aaaa"], rank[b"aa"], a]
    assert inner(by_ranks, "1234") == [rank[b"123"], four]
    assert inner(by_ranks, "é e") == [rank["é".encode()], ord(" "), e]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800", "\ud83d\ude00 and \ud83d"])
def test_half_a_surrogate_pair_becomes_a_replacement_character(tokenizer: Tokenizer, text: str) -> None:
    """JSON can spell what UTF-8 cannot: whole pairs become their character, halves are replaced, nothing fails."""
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(inner(tokenizer, text)) == expected


LONG = {
    "words": "the quick brown fox " * 100_000,
    "one letter": "a" * 2_000_000,
    "blanks": " " * 2_000_000,
    "blanks and tabs before a word": " \t" * 700_000 + "x",
    "lines": "\r\n" * 1_000_000,
    "digits": "7" * 2_000_000,
    "signs": "!?" * 1_000_000,
    "no spaces": "漢字" * 500_000,
}


@pytest.mark.parametrize("name", LONG)
def test_megabytes_without_a_break_are_no_problem(tokenizer: Tokenizer, name: str) -> None:
    """Long runs of one kind, which break naive byte-pair encoders, take a second or so and lose nothing."""
    start = time.perf_counter()
    tokens = inner(tokenizer, LONG[name])
    seconds = time.perf_counter() - start
    assert tokenizer.decode(tokens) == LONG[name]
    assert seconds < 60, "quadratic would take hours"


def test_the_fingerprint_changes_with_any_token(by_bytes: Tokenizer, by_ranks: Tokenizer, tmp_path: Path) -> None:
    """Two tokenizers share tokenised text only if they are the same; where the file lies does not matter."""
    path = write_tokenizer(tmp_path / "other.model")
    config = TokenizerConfig(kind=TokenizerKind.tiktoken, path=str(path))
    assert build_tokenizer(config).fingerprint == by_ranks.fingerprint
    write_tokenizer(path, [*MERGES[:-1], b"zz"])
    assert len({by_bytes.fingerprint, by_ranks.fingerprint, build_tokenizer(config).fingerprint}) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a file"),
        (b"", "It is empty"),
        (b"dGhl 0\nnot base64! 1\n", "Line 2 is not a token"),
        (b"dGhl\n", "Line 1 is not a token"),
        (b"dGhl zero\n", "Line 1 is not a token"),
        (b"\x0a\x0e\x0a\x05<unk>\x15\x00", "is not a token in base64"),  # as a SentencePiece model begins
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    """A missing or foreign file is a config error that says where it stops making sense."""
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        build_tokenizer(TokenizerConfig(kind=TokenizerKind.tiktoken, path=str(path)))
