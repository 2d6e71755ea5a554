"""What is in the files of tokenizers, read without the libraries that tokenise with them.

Llama 3's tokenizer.model is text, a token in base64 and its rank on each line. Llama 2's, of the same name, is a
protocol buffer of SentencePiece. A tokenizer.json is JSON, and files beside it say which of its tokens begin and end a
text. One is easily taken for another, so each reader says what a file is when it is not its own.
"""

from __future__ import annotations

import base64
import binascii
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan.config.schema import TokenizerKind
from titan.errors import ConfigError, Problem

_WHAT = {
    TokenizerKind.tiktoken: "Llama 3's tokenizer.model",
    TokenizerKind.sentencepiece: "a SentencePiece model, such as Llama 2's tokenizer.model",
    TokenizerKind.huggingface: "a tokenizer.json, or the folder that holds one",
}
_SUGGESTED = {
    TokenizerKind.tiktoken: "tokenizer.path=/path/to/Llama-3/original/tokenizer.model   or  tokenizer=bytes",
    TokenizerKind.sentencepiece: "tokenizer.path=/path/to/Llama-2/tokenizer.model   or  tokenizer=bytes",
    TokenizerKind.huggingface: "tokenizer.path=/path/to/folder/with/tokenizer.json   or  tokenizer=bytes",
}
_BEGIN_OF_TEXT = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>")
_END_OF_TEXT = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")
"""Looked for where no file says which tokens begin and end a text."""


@dataclass(frozen=True)
class PiecesFile:
    """What the front end needs to know of a SentencePiece model."""

    n_tokens: int
    bos: int
    eos: int


@dataclass(frozen=True)
class JsonFile:
    """A tokenizer.json, and what the files beside it say."""

    path: Path
    """Of the tokenizer.json itself."""
    n_tokens: int
    """The highest id and one: what an embedding needs rows for."""
    bos: str
    eos: str
    """The tokens around a text; a tokenizer that begins texts with none has its eos for both."""
    variables: dict[str, str] = field(default_factory=dict)
    """bos_token, eos_token and the like, for the chat template."""
    chat_template: str | None = None


def find_llama3_file() -> Path:
    """Return the tokenizer.model that the package llama-models ships, without importing the package.

    Raises:
        ConfigError: If it is not installed.
    """
    spec = importlib.util.find_spec("llama_models")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "llama3" / "tokenizer.model"
        if path.is_file():
            return path
    raise ConfigError(
        [
            Problem(
                "tokenizer=llama3 needs the package llama-models, which is not installed",
                "It ships Llama 3's tokenizer.model.",
                "pip install 'titan[llama3]'   or  tokenizer=tiktoken tokenizer.path=/path/to/tokenizer.model",
            )
        ]
    )


def read_ranks(path: str | None) -> dict[bytes, int]:
    """Read Llama 3's tokenizer.model: one token in base64 and its rank on each line.

    Read here and not by tiktoken's own loader, which keeps a copy by path in the temporary folder and goes on using
    it when the file changes.

    Raises:
        ConfigError: If the file is missing or is not a tokenizer.model.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, TokenizerKind.tiktoken).split(b"\n"), 1):
        try:
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise _refuse(
                path, TokenizerKind.tiktoken, f"Line {number} is not a token in base64 and its rank."
            ) from None
    if not ranks:
        raise _refuse(path, TokenizerKind.tiktoken, "It is empty.")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _refuse(path, TokenizerKind.tiktoken, "Its ranks do not count from 0 without a gap.")
    return ranks


def read_pieces(path: str | None) -> PiecesFile:
    """Read what a SentencePiece model says of its vocabulary.

    Raises:
        ConfigError: If the file is missing, is no such model, or has no begin or end of text.

    Source:
        sentencepiece_model.proto: ModelProto.pieces = 1, .trainer_spec = 2; TrainerSpec.bos_id = 41, .eos_id = 42.
    """
    content = read_bytes(path, TokenizerKind.sentencepiece)
    try:
        found = _pieces(content)
    except ValueError as error:
        raise _refuse(path, TokenizerKind.sentencepiece, f"{error}.") from None
    if found.bos < 0 or found.eos < 0:
        raise _refuse(
            path, TokenizerKind.sentencepiece, "It was trained without a begin or end of text (bos_id, eos_id)."
        )
    return found


def read_json(path: str | None) -> JsonFile:
    """Read what a tokenizer.json and the files beside it say.

    Args:
        path: The file, or its folder.

    Raises:
        ConfigError: If it is missing, is no such file, or if nothing says which tokens begin and end a text.
    """
    file = json_path(path)
    # by what was last written, so that a sweep of a hundred points does not read megabytes a hundred times
    stamps = tuple((beside, *_stamp(beside)) for beside in json_files(file))
    return _read_json(path, file, stamps)


def json_path(path: str | None) -> Path:
    """Return the tokenizer.json that a path stands for.

    Raises:
        ConfigError: If the path is not set, or is a folder without one.
    """
    if path and Path(path).is_dir():
        inside = Path(path) / "tokenizer.json"
        if not inside.is_file():
            raise _refuse(path, TokenizerKind.huggingface, "The folder holds no tokenizer.json.")
        return inside
    return Path(path or "")


def json_files(file: Path) -> list[Path]:
    """Return a tokenizer.json and the files beside it that say more of it."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return [file, *(file.parent / name for name in names if (file.parent / name).is_file())]


def read_bytes(path: str | None, kind: TokenizerKind) -> bytes:
    """Return the content of a tokenizer's file.

    Raises:
        ConfigError: If it is missing or cannot be read.
    """
    if not path or not Path(path).is_file():
        if path and Path(path).is_dir():
            raise _refuse(path, kind, "It is a folder.")
        raise ConfigError(
            [
                Problem(
                    f"tokenizer.path = {path} is not a file" if path else "tokenizer.path is not set",
                    f"tokenizer={kind.name} reads {_WHAT[kind]}.",
                    _SUGGESTED[kind],
                )
            ]
        )
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _refuse(path, kind, f"It cannot be read: {error.strerror or error}.") from error


def guess_kind(path: Path) -> tuple[TokenizerKind, Path] | None:
    """Return which kind a file, or the best one of a folder, looks like, and the path to give for it."""
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return TokenizerKind.huggingface, path
        inside = (path / "tokenizer.model", path / "original" / "tokenizer.model")
        return next((found for each in inside if each.is_file() and (found := guess_kind(each))), None)
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if content[:4096].lstrip()[:1] == b"{":
        return TokenizerKind.huggingface, path
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return TokenizerKind.tiktoken, path
    try:
        _pieces(content)
    except ValueError:
        return None
    return TokenizerKind.sentencepiece, path


def _refuse(path: str | None, kind: TokenizerKind, why: str) -> ConfigError:
    """Return what is wrong with a file, and which kind of tokenizer would take it."""
    suggestion, guessed = _SUGGESTED[kind], guess_kind(Path(path or ""))
    with_head = Path(path or "")
    if with_head.is_file() and _is_pointer(with_head):
        why, suggestion = "It is a pointer of Git LFS and not the file itself.", "git lfs pull   where it was cloned"
    elif guessed is not None and guessed[0] is not kind:
        why += f" It looks like {_WHAT[guessed[0]]}."
        suggestion = f"tokenizer={guessed[0].name} tokenizer.path={guessed[1]}"
    elif guessed is not None and str(guessed[1]) != path:
        suggestion = f"tokenizer.path={guessed[1]}"
    name = {TokenizerKind.tiktoken: "a tokenizer.model", TokenizerKind.sentencepiece: "a SentencePiece model"}
    return ConfigError(
        [Problem(f"tokenizer.path = {path} is not {name.get(kind, 'a tokenizer.json')}", why, suggestion)]
    )


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).startswith(b"version https://git-lfs")
    except OSError:
        return False


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


# ---- SentencePiece's protocol buffer


def _pieces(content: bytes) -> PiecesFile:
    count, trainer = 0, b""
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            count += 1
        elif number == 2 and isinstance(value, bytes):
            trainer = value
    if not count:
        raise ValueError("It has no pieces")
    ids = {number: _signed(value) for number, value in _fields(trainer) if isinstance(value, int)}
    return PiecesFile(count, ids.get(41, 1), ids.get(42, 2))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message in the protocol buffers' wire format, by number."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire in (1, 2, 5):
            length = {1: 8, 5: 4}.get(wire, 0)
            if wire == 2:
                length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            raise ValueError(f"Byte {at - 1:,} begins no field of a protocol buffer")
        if at > len(message) or not number:
            raise ValueError(f"It ends, or goes astray, before byte {at:,}")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError(f"It ends, or goes astray, before byte {at:,}")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# ---- tokenizer.json


@functools.lru_cache(maxsize=8)
def _read_json(path: str | None, file: Path, stamps: tuple[tuple[Path, int, int], ...]) -> JsonFile:
    content = _object(path, file, read_bytes(str(file), TokenizerKind.huggingface))
    ids = _ids(content)
    if not ids:
        raise _refuse(path, TokenizerKind.huggingface, "It has no vocabulary (model.vocab).")
    beside = {each.name: each for each, *_ in stamps}
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in beside:
            settings |= _object(path, beside[name], beside[name].read_bytes())
    variables = {
        name: text for name, value in settings.items() if name.endswith("_token") and (text := _token_text(value))
    }
    bos, eos = _ends(content, settings, variables, ids)
    for name, token in (("bos_token", bos), ("eos_token", eos)):
        if token is None:
            why = f"Nothing says which of its tokens {'begins' if name == 'bos_token' else 'ends'} a text."
            raise _without_ends(path, why)
        if token not in ids:
            raise _without_ends(path, f"{name} is {token}, which is none of its tokens.")
    assert bos is not None
    assert eos is not None
    return JsonFile(file, max(ids.values()) + 1, bos, eos, variables, _template(settings, beside))


def _object(path: str | None, file: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, TokenizerKind.huggingface, f"{file.name} is not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise _refuse(path, TokenizerKind.huggingface, f"{file.name} is JSON, but no object.")
    return found


def _ids(content: dict[str, Any]) -> dict[str, int]:
    model, ids = content.get("model"), {}
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids |= {token: index for token, index in vocabulary.items() if isinstance(index, int)}
    elif isinstance(vocabulary, list):  # of SentencePiece's unigrams, with their scores
        ids |= {piece[0]: index for index, piece in enumerate(vocabulary) if isinstance(piece, list) and piece}
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("id"), int) and ids:
            ids[str(token.get("content"))] = token["id"]
    return ids


def _ends(
    content: dict[str, Any], settings: dict[str, Any], variables: dict[str, str], ids: dict[str, int]
) -> tuple[str | None, str | None]:
    """Return the tokens that begin and end a text: as the files beside it say, else as it says itself, else by name."""
    eos = variables.get("eos_token")
    bos = variables.get("bos_token")
    if "bos_token" in settings:  # null: texts begin with nothing, so with what ended the one before
        bos = bos or eos
    single = _single(content.get("post_processor"))
    if bos is None and single and "SpecialToken" in single[0]:
        bos = single[0]["SpecialToken"].get("id")
    if eos is None and single and "SpecialToken" in single[-1]:
        eos = single[-1]["SpecialToken"].get("id")
    return (
        bos or next((token for token in _BEGIN_OF_TEXT if token in ids), None),
        eos or next((token for token in _END_OF_TEXT if token in ids), None),
    )


def _single(processor: Any) -> list[dict[str, Any]]:
    """Return the template of one text, where the post-processor has one."""
    if not isinstance(processor, dict):
        return []
    if processor.get("type") == "Sequence":
        return next((found for each in processor.get("processors", []) if (found := _single(each))), [])
    single = processor.get("single") if processor.get("type") == "TemplateProcessing" else None
    return single if isinstance(single, list) and all(isinstance(part, dict) for part in single) else []


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _template(settings: dict[str, Any], beside: dict[str, Path]) -> str | None:
    if "chat_template.jinja" in beside:
        return beside["chat_template.jinja"].read_text("utf-8", "replace")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _without_ends(path: str | None, why: str) -> ConfigError:
    return ConfigError(
        [
            Problem(
                f"tokenizer.path = {path} has no begin or end of text",
                why,
                'a tokenizer_config.json beside it with {"bos_token": "...", "eos_token": "..."}',
            )
        ]
    )
