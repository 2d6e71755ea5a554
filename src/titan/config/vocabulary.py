"""How many tokens a tokenizer has, known without loading it.

The front end compares this with the model's vocabulary before anything is started; `titan.data.tokenizer` builds
the encodings from the same lists.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from titan.config.schema import TokenizerConfig, TokenizerKind
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
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
)
"""The 256 special tokens of Llama 3.1, in order; their ids follow the ranks of tokenizer.model."""


def count_tokens(tokenizer: TokenizerConfig) -> int:
    """Return the size of the tokenizer's vocabulary, special tokens included.

    Raises:
        ConfigError: If the file is missing or is not a tokenizer.model.
    """
    if tokenizer.kind is TokenizerKind.bytes:
        return 256 + len(BYTES_SPECIAL_TOKENS)
    return len(read_ranks(tokenizer.path)) + len(LLAMA3_SPECIAL_TOKENS)


def read_ranks(path: str | None) -> dict[bytes, int]:
    """Read a tokenizer.model: one token in base64 and its rank on each line.

    Read here and not by tiktoken's own loader, which keeps a copy by path in the temporary folder and goes on using
    it when the file changes.

    Raises:
        ConfigError: If the file is missing or is not a tokenizer.model.
    """
    if not path or not Path(path).is_file():
        raise ConfigError(
            [
                Problem(
                    f"tokenizer.path = {path} is not a file" if path else "tokenizer.path is not set",
                    "tokenizer=tiktoken reads Llama 3's tokenizer.model.",
                    "tokenizer.path=/path/to/tokenizer.model   or  tokenizer=bytes",
                )
            ]
        )
    ranks: dict[bytes, int] = {}
    number = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        reason = f"Line {number} is not a token in base64 and its rank."
    except OSError as error:
        reason = f"It cannot be read: {error.strerror or error}."
    else:
        reason = "" if ranks else "It is empty."
    if reason:
        raise ConfigError(
            [
                Problem(
                    f"tokenizer.path = {path} is not a tokenizer.model",
                    reason,
                    "tokenizer.path=/path/to/Llama-3/original/tokenizer.model   or  tokenizer=bytes",
                )
            ]
        )
    return ranks
