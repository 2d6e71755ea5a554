"""Every kind of tokenizer against its own reference, and files that are of another kind."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama3.tokenizer import Tokenizer as Reference

from tests.data.vocabulary import write_json_tokenizer, write_pieces, write_tokenizer
from titan.config import tokenizer_files
from titan.config.schema import TokenizerConfig, TokenizerKind
from titan.config.tokenizer_files import find_llama3_file
from titan.config.vocabulary import check_fingerprint, compute_fingerprint, count_tokens
from titan.data.tokenizer import JsonTokenizer, Tokenizer, build_tokenizer, mend
from titan.errors import ConfigError

REFERENCE = Reference.get_instance()
SPELLED = "".join(REFERENCE.special_tokens) + "<s></s><unk><pad><|im_start|>user<|im_end|>[INST]<0x0A>"
EVERY_CHARACTER = [
    "".join(chr(code) for code in range(start, start + 0x1000) if not 0xD800 <= code < 0xE000)
    for start in (*range(0, 0x20000, 0x1000), 0x20000, 0xE0000, 0x10F000)
]
"""All of the first two planes: every script, emoji, private use, and what is no character."""
CORPUS = {
    "scripts": "Ünïcödé ελληνικά русский עברית العربية हिन्दी বাংলা ไทย 한국어 日本語 ქართული አማርኛ ᚠᛇᚻ 𒀀𒁀",
    "emoji": "🙂👩‍👩‍👧‍👦🇩🇪👍🏽❤️‍🔥 1️⃣",
    "control": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u2028\u2029\ufeff\r\n\r\r\n",
    "special": SPELLED,
    "code": "def f(x):\n    return  {'a': 1e-5,\t'b': \"it's\"}  \n\n\n# don't\r\n",
    "digits": "1 12 123 1234 12345678901234567890 ٣٤٥ ½ Ⅷ",
    "surrogates": "a\ud800b \udfff\ud800 \ud83d\ude00",
    "nothing": "",
}
LONG = {
    "half a million blanks": " " * 500_000,
    "blanks and a word": "a" + " \t" * 30_000 + "b",
    "one letter": "x" * 1_000_000,
    "exactly a run": "x" * 25_000 + " " * 25_000,
    "one more than a run": "x" * 25_001 + " " * 25_001 + "y",
    "runs just short of it": (" " * 24_999 + "x" * 24_999) * 12,
    "across chunks": "lorem ipsum dolor " * 60_000,
    "surrogates across chunks": "ab\ud83d\ude00\ud800" * 100_000,
}
any_text = st.text(st.characters(), max_size=200)
"""Lone surrogates too."""


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    """Llama 3's, from the package."""
    return build_tokenizer(TokenizerConfig(kind=TokenizerKind.llama3))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model like Llama 2's."""
    path = write_pieces(tmp_path_factory.mktemp("pieces") / "tokenizer.model")
    return build_tokenizer(TokenizerConfig(kind=TokenizerKind.sentencepiece, path=str(path)))


@pytest.fixture(scope="module")
def by_json(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A folder with a tokenizer.json."""
    folder = write_json_tokenizer(tmp_path_factory.mktemp("json") / "folder")
    return build_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))


@pytest.fixture(params=["llama3", "pieces", "by_json"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each in turn."""
    return request.getfixturevalue(request.param)


# ---- Llama 3


def test_llama_3_has_the_reference_vocabulary(llama3: Tokenizer) -> None:
    """Every special token has the id that Meta's package gives it; bos, eos and the count are Meta's."""
    assert llama3.special == REFERENCE.special_tokens
    assert (llama3.n_tokens, llama3.bos, llama3.eos) == (REFERENCE.n_words, REFERENCE.bos_id, REFERENCE.eos_id)
    assert llama3.n_tokens == 128_256


@pytest.mark.parametrize("text", [*CORPUS.values(), *LONG.values()], ids=[*CORPUS, *LONG])
def test_llama_3_has_the_reference_ids(llama3: Tokenizer, text: str) -> None:
    """Token for token what Meta's tokenizer gives, however long the text and whatever is in it."""
    assert llama3.encode(text).tolist() == REFERENCE.encode(text, bos=True, eos=True)


def test_llama_3_has_the_reference_ids_of_every_character(llama3: Tokenizer) -> None:
    """All of the first two planes of Unicode, and they come back."""
    for text in EVERY_CHARACTER:
        tokens = llama3.encode_text(text).tolist()
        assert tokens == REFERENCE.encode(text, bos=False, eos=False)
        assert llama3.decode(tokens) == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(any_text)
def test_any_unicode_has_the_reference_ids_and_comes_back(llama3: Tokenizer, text: str) -> None:
    """Whatever hypothesis finds: the ids are Meta's, and decoding undoes encoding."""
    tokens = llama3.encode_text(text).tolist()
    assert tokens == REFERENCE.encode(text, bos=False, eos=False)
    assert llama3.decode(tokens) == mend(text)


def test_the_same_file_by_path_is_the_same_tokenizer(llama3: Tokenizer, tmp_path: Path) -> None:
    """tokenizer=tiktoken with the file that the package ships is tokenizer=llama3: one cache serves both."""
    path = shutil.copy(find_llama3_file(), tmp_path / "copy.model")
    config = TokenizerConfig(kind=TokenizerKind.tiktoken, path=str(path))
    assert compute_fingerprint(config) == llama3.fingerprint
    assert count_tokens(config) == llama3.n_tokens


def test_the_package_is_found_but_not_imported() -> None:
    """llama_models brings libraries for images and downloads; its file is all that is wanted."""
    code = (
        "import sys; from titan.config.vocabulary import *; from titan.config.schema import *\n"
        "config = TokenizerConfig(kind=TokenizerKind.llama3)\n"
        "print(count_tokens(config), compute_fingerprint(config)[:0])\n"
        "print({'llama_models', 'torch', 'tiktoken', 'tokenizers', 'sentencepiece'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["128256", "set()"]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizer=llama3 names the extra, and the way without it."""
    monkeypatch.setattr(tokenizer_files.importlib.util, "find_spec", lambda name: None)
    for ask in (build_tokenizer, count_tokens, compute_fingerprint):
        with pytest.raises(ConfigError, match=r"pip install 'titan\[llama3\]'"):
            ask(TokenizerConfig(kind=TokenizerKind.llama3))


# ---- SentencePiece and tokenizer.json


@pytest.mark.parametrize("text", [*CORPUS.values(), " " * 500_000], ids=[*CORPUS, "blanks"])
def test_sentencepiece_has_its_own_ids(pieces: Tokenizer, text: str) -> None:
    """Token for token what sentencepiece's processor gives with its own begin and end of text."""
    processor = sentencepiece.SentencePieceProcessor(model_file=pieces.config.path)
    expected = processor.encode(mend(text), add_bos=True, add_eos=True)
    assert pieces.encode(text).tolist() == expected
    assert pieces.decode(expected[1:-1]) == mend(text)
    assert pieces.n_tokens == processor.vocab_size() == count_tokens(pieces.config)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=200))
def test_sentencepiece_gives_text_back(pieces: Tokenizer, text: str) -> None:
    """With bytes for what it has no piece for, nothing is lost but the character that it writes blanks with."""
    assert pieces.decode(pieces.encode_text(text).tolist()) == text


@pytest.mark.parametrize("text", [*CORPUS.values(), " " * 500_000], ids=[*CORPUS, "blanks"])
def test_a_tokenizer_json_has_transformers_ids(by_json: Tokenizer, text: str) -> None:
    """Token for token what transformers gives where special tokens in a text are text, and the text comes back."""
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(by_json.config.path)
    expected = reference.encode(mend(text), add_special_tokens=False, split_special_tokens=True)
    assert by_json.encode(text).tolist() == [reference.bos_token_id, *expected, reference.eos_token_id]
    assert by_json.decode(expected) == mend(text)
    assert by_json.n_tokens == len(reference) == count_tokens(by_json.config)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(any_text)
def test_a_tokenizer_json_of_bytes_gives_any_text_back(by_json: Tokenizer, text: str) -> None:
    """Whatever hypothesis finds comes back, halves of surrogate pairs as replacement characters."""
    assert by_json.decode(by_json.encode_text(text).tolist()) == mend(text)


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    """No text makes a control token, of whatever kind the tokenizer."""
    found = set(tokenizer.encode_text(SPELLED + "".join(tokenizer.special)).tolist())
    assert not found & set(tokenizer.special.values())
    assert {tokenizer.bos, tokenizer.eos} <= set(tokenizer.special.values())


def test_truncation_padding_and_dropout_in_a_file_do_not_count(by_json: Tokenizer, tmp_path: Path) -> None:
    """A tokenizer.json can say to cut texts, to fill them up and to draw merges by chance: all of it is left out."""
    folder = Path(shutil.copytree(by_json.config.path or "", tmp_path / "copy"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=500)
    backend.model.dropout = 0.5
    backend.save(str(folder / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog"
    other = build_tokenizer(replace(by_json.config, path=str(folder)))
    assert other.encode(text).tolist() == by_json.encode(text).tolist()


def test_a_copy_in_another_process_is_the_same(tokenizer: Tokenizer) -> None:
    """Workers get a tokenizer by pickling."""
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(SPELLED).tolist() == tokenizer.encode(SPELLED).tolist()
    assert copy.encode("x").dtype == np.uint32


ENDS = {
    "in the settings": ({"bos_token": "<s>", "eos_token": "</s>"}, None, "<s>", "</s>"),
    "as an object": ({"bos_token": {"content": "<|im_start|>"}, "eos_token": "</s>"}, None, "<|im_start|>", "</s>"),
    "no begin": ({"bos_token": None, "eos_token": "<|im_end|>"}, None, "<|im_end|>", "<|im_end|>"),
    "in the map": ({}, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, "<|im_start|>", "<|im_end|>"),
    "by name": ({}, None, "<s>", "</s>"),
    "no settings at all": (None, None, "<s>", "</s>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_begin_and_end_of_text_come_from_the_folder(tmp_path: Path, name: str) -> None:
    """As the settings say, with null for the begin that of the end; else by the usual names."""
    said, mapped, bos, eos = ENDS[name]
    folder = write_json_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    for file, content in (("tokenizer_config.json", said), ("special_tokens_map.json", mapped)):
        if content is not None:
            (folder / file).write_text(json.dumps(content))
    for path in (folder, folder / "tokenizer.json"):
        found = build_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(path)))
        assert isinstance(found, JsonTokenizer)
        assert (found.bos, found.eos) == (found.special[bos], found.special[eos])


# ---- which tokenizer it is


def test_the_fingerprint_is_of_the_tokenizer_and_not_of_its_place(tmp_path: Path) -> None:
    """Moving a file changes nothing; another file, another begin of text or another chat template does."""
    seen = set()
    for settings_ in ({}, {"bos_token": "</s>"}, {"chat_template": "{{ bos_token }}"}, {"model_max_length": 5}):
        folder = write_json_tokenizer(tmp_path / "here", **settings_)
        before = compute_fingerprint(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
        moved = folder.rename(tmp_path / "there")
        assert compute_fingerprint(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(moved))) == before
        shutil.rmtree(moved)
        seen.add(before)
    assert len(seen) == 3


def test_another_fingerprint_than_the_config_names_is_refused(tokenizer: Tokenizer) -> None:
    """A frozen config holds the tokenizer itself: a file that has changed since is an error, on every rank."""
    assert check_fingerprint(replace(tokenizer.config, fingerprint=tokenizer.fingerprint)) == tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 64
    with pytest.raises(ConfigError, match=r"is not the tokenizer with tokenizer\.fingerprint = 0123"):
        build_tokenizer(replace(tokenizer.config, fingerprint="0123"))


# ---- wrong files


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, one of each kind and broken ones."""
    folder = tmp_path_factory.mktemp("wrong")
    write_tokenizer(folder / "ranks.model")
    write_pieces(folder / "pieces.model")
    write_pieces(folder / "endless.model", bos_id=-1)
    write_json_tokenizer(folder / "json")
    (folder / "llama" / "original").mkdir(parents=True)
    write_tokenizer(folder / "llama" / "original" / "tokenizer.model")
    (folder / "cut.model").write_bytes((folder / "pieces.model").read_bytes()[:3001])
    (folder / "empty").touch()
    (folder / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (folder / "broken.json").write_text('{"model": ')
    (folder / "list.json").write_text("[]")
    (folder / "other.json").write_text("{}")
    (folder / "ends").mkdir()
    (folder / "ends" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "gone").mkdir()
    (folder / "gone" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "</s>": 1}}}')
    (folder / "gone" / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    ranks = (folder / "ranks.model").read_bytes().splitlines(keepends=True)
    (folder / "hole.model").write_bytes(b"".join(ranks[:10] + ranks[11:]))
    (folder / "future.json").write_text(json.dumps({"model": {"type": "New", "vocab": {"<s>": 0, "</s>": 1}}}))
    return folder


WRONG = {
    ("sentencepiece", "ranks.model"): ("is not a SentencePiece model", "tokenizer=tiktoken tokenizer.path="),
    ("sentencepiece", "json"): ("It is a folder", "tokenizer=huggingface tokenizer.path="),
    ("sentencepiece", "json/tokenizer.json"): ("is not a SentencePiece model", "tokenizer=huggingface tokenizer.path="),
    ("sentencepiece", "cut.model"): ("goes astray, before byte", "/path/to/Llama-2/tokenizer.model"),
    ("sentencepiece", "empty"): ("has no pieces", "/path/to/Llama-2/tokenizer.model"),
    ("sentencepiece", "endless.model"): ("without a begin or end of text", "/path/to/Llama-2/tokenizer.model"),
    ("sentencepiece", "pointer"): ("pointer of Git LFS", "git lfs pull"),
    ("sentencepiece", "nope"): ("is not a file", "Llama 2's tokenizer.model"),
    ("tiktoken", "pieces.model"): ("is not a token in base64", "tokenizer=sentencepiece tokenizer.path="),
    ("tiktoken", "json/tokenizer.json"): ("Line 1 is not a token", "tokenizer=huggingface tokenizer.path="),
    ("tiktoken", "llama"): ("It is a folder", "llama/original/tokenizer.model"),
    ("tiktoken", "hole.model"): ("do not count from 0", "tokenizer=bytes"),
    ("huggingface", "ranks.model"): ("is not JSON", "tokenizer=tiktoken tokenizer.path="),
    ("huggingface", "pieces.model"): ("is not JSON", "tokenizer=sentencepiece tokenizer.path="),
    ("huggingface", "llama"): ("holds no tokenizer.json", "tokenizer=tiktoken tokenizer.path="),
    ("huggingface", "broken.json"): ("is not JSON", "/path/to/folder/with/tokenizer.json"),
    ("huggingface", "list.json"): ("no object", "/path/to/folder/with/tokenizer.json"),
    ("huggingface", "other.json"): ("no vocabulary", "/path/to/folder/with/tokenizer.json"),
    ("huggingface", "ends"): ("Nothing says which of its tokens begins a text", "bos_token"),
    ("huggingface", "gone"): ("bos_token is <s>, which is none of its tokens", "tokenizer_config.json"),
    ("huggingface", "future.json"): ("cannot be loaded by tokenizers", "pip install --upgrade tokenizers"),
    ("huggingface", "nope"): ("is not a file", "the folder that holds one"),
}


@pytest.mark.parametrize(("kind", "name"), WRONG)
def test_a_wrong_file_is_refused_with_the_kind_that_takes_it(wrong: Path, kind: str, name: str) -> None:
    """Two formats share the name tokenizer.model: the error says which it is, and what to type."""
    words, suggestion = WRONG[kind, name]
    config = TokenizerConfig(kind=TokenizerKind[kind], path=str(wrong / name))
    with pytest.raises(ConfigError) as error:
        build_tokenizer(config)
    assert words in str(error.value)
    assert suggestion in str(error.value)
