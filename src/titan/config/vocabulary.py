"""How many tokens a tokenizer has and which tokenizer it is, known without loading it.

The front end compares the count with the model's vocabulary before anything is started, and puts the fingerprint into
the frozen config; `titan.data.tokenizer` builds the encodings from the same lists.
"""

from __future__ import annotations

import hashlib
import json

from titan.config.schema import TokenizerConfig, TokenizerKind
from titan.config.tokenizer_files import find_llama3_file, read_bytes, read_json, read_pieces, read_ranks
from titan.errors import ConfigError, Problem

BYTES_SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")
"""Special tokens of tokenizer=bytes; their ids follow the 256 bytes."""

LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
"""The 256 special tokens of Llama 3, in order; their ids follow the ranks of tokenizer.model.

Source:
    Meta's package llama-models, 0.3.0.
"""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before merging.

Source:
    Meta's reference tokenizer for Llama 3.
"""

_VERSION = 1
"""Of titan's own part in what tokens a text becomes; a new one gives every tokenizer another fingerprint."""


def count_tokens(tokenizer: TokenizerConfig) -> int:
    """Return the size of the tokenizer's vocabulary, special tokens included.

    Raises:
        ConfigError: If the file is missing or is not one of the tokenizer's kind.
    """
    match tokenizer.kind:
        case TokenizerKind.bytes:
            return 256 + len(BYTES_SPECIAL_TOKENS)
        case TokenizerKind.sentencepiece:
            return read_pieces(tokenizer.path).n_tokens
        case TokenizerKind.huggingface:
            return read_json(tokenizer.path).n_tokens
        case _:
            return len(read_ranks(ranks_path(tokenizer))) + len(LLAMA3_SPECIAL_TOKENS)


def ranks_path(tokenizer: TokenizerConfig) -> str | None:
    """Return the tokenizer.model of tokenizer=tiktoken or tokenizer=llama3.

    Raises:
        ConfigError: If the package that ships it is not installed.
    """
    return str(find_llama3_file()) if tokenizer.kind is TokenizerKind.llama3 else tokenizer.path


def compute_fingerprint(tokenizer: TokenizerConfig) -> str:
    """Return what tells a tokenizer from every other, wherever its file lies: 64 hexadecimal digits.

    A hash over the kind, over titan's part in it and over the file. Of the files beside a tokenizer.json, only what
    titan takes from them counts. llama3 and tiktoken with the same file are one tokenizer.

    Raises:
        ConfigError: If the file is missing or cannot be read.
    """
    parts: list[object] = [_VERSION]
    content = b""
    match tokenizer.kind:
        case TokenizerKind.bytes:
            parts += ["bytes", BYTES_SPECIAL_TOKENS]
        case TokenizerKind.sentencepiece:
            parts += ["sentencepiece"]
            content = read_bytes(tokenizer.path, tokenizer.kind)
        case TokenizerKind.huggingface:
            found = read_json(tokenizer.path)
            parts += ["huggingface", found.bos, found.eos, sorted(found.variables.items()), found.chat_template]
            content = read_bytes(str(found.path), tokenizer.kind)
        case _:
            parts += ["llama3", LLAMA3_PATTERN, LLAMA3_SPECIAL_TOKENS]
            content = read_bytes(ranks_path(tokenizer), TokenizerKind.tiktoken)
    digest = hashlib.sha256(json.dumps(parts).encode() + b"\0")
    digest.update(content)
    return digest.hexdigest()


def check_fingerprint(tokenizer: TokenizerConfig) -> str:
    """Return the tokenizer's fingerprint, held against the one that the config names, if it does.

    Raises:
        ConfigError: If they differ, or if the file is missing or cannot be read.
    """
    found = compute_fingerprint(tokenizer)
    if tokenizer.fingerprint not in (None, found):
        where = f"tokenizer.path = {tokenizer.path}" if tokenizer.path else f"tokenizer={tokenizer.kind.name}"
        raise ConfigError(
            [
                Problem(
                    f"{where} is not the tokenizer with tokenizer.fingerprint = {tokenizer.fingerprint}",
                    f"Its own is {found}.",
                    "tokenizer.path=/path/to/that/one   or  tokenizer.fingerprint=null   to take this one",
                )
            ]
        )
    return found
