"""From what a document says to tokens, and which of them are learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from titan.config.schema import SourceConfig
from titan.data.shard import Content
from titan.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """A document in tokens.

    Shape:
        tokens: (N,) uint32. learned: (N,) bool.
    """

    tokens: np.ndarray
    learned: np.ndarray | None = None
    """Whether each token counts as a label; None: all do."""


@dataclass(frozen=True)
class Encoder:
    """Encodes documents of one source."""

    tokenizer: Tokenizer
    config: SourceConfig

    def encode(self, content: Content) -> Encoded:
        """Return the tokens of a document."""
        assert isinstance(content, str)
        return Encoded(self.tokenizer.encode(content))
