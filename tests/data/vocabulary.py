"""A tokenizer.model small enough to reason about."""

from __future__ import annotations

import base64
from pathlib import Path

MERGES = [b"he", b"the", b" t", b" the", b"aa", b"aaaa", b"12", b"123", b"  ", "é".encode()]
"""What is merged, in this order, after the 256 single bytes."""


def write_tokenizer(path: Path, merges: list[bytes] = MERGES) -> Path:
    """Write a tokenizer.model as Meta's are: one token in base64 and its rank on each line."""
    tokens = [bytes([number]) for number in range(256)] + merges
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path
