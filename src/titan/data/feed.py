"""What a run is fed with: the one interface that the trainer has of its data, prepared before or made while training.

A feed knows the rank's share and gives its part of every step from any step on. What has to be saved so that another
run can go on are its cursors, and prepared data has none.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from titan.config.schema import DataConfig, DataKind
from titan.data.batch import MixtureOrder, Order, RowOrder
from titan.data.encode import Encoder
from titan.data.loader import Share, Step, build_loader
from titan.data.mixture import MixtureRows, components_of, source_of
from titan.data.rows import Rows
from titan.data.source import Source, open_source
from titan.data.stream import Cursor, DocumentShare, Stream, count_streams
from titan.data.stream_loader import StreamPlan, Tokenised, build_stream_loader
from titan.data.tokenizer import Tokenizer
from titan.log import logger


class Feed(Protocol):
    """The data of a run, as one rank sees it."""

    cursors: np.ndarray | None
    """Where every stream of this rank stands after the step in hand, -1 for others'; None without streaming."""

    @property
    def tokens_to_bytes(self) -> tuple[int, int]:
        """Return some tokens and the bytes of text that made them: known before, or as found so far."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Return what says which data it is: digest, and its tokens where they are known."""
        ...

    def describe(self, steps: int) -> list[str]:
        """Return what a person wants to know before the first of so many steps, as lines."""
        ...

    def rows_by_component(self, step: int) -> dict[str, int] | None:
        """Return how many rows of a step, counted from 0, each component of a mixture gives; None without one."""
        ...

    def steps(self, first_step: int, last_step: int, left_out: Collection[int]) -> Generator[Step, None, None]:
        """Yield this rank's part of steps [first_step, last_step), counted from 0; those left out without rows."""
        ...


@dataclass
class PreparedFeed:
    """Data that was tokenised before."""

    rows: Rows
    order: Order
    share: Share
    padding: int
    num_workers: int
    prefetch: int
    cursors: np.ndarray | None = None

    @property
    def tokens_to_bytes(self) -> tuple[int, int]:
        """Return all tokens, and the bytes of all text."""
        return self.rows.tokens, self.rows.text_bytes

    @property
    def identity(self) -> dict[str, Any]:
        """Return the digest of all tokens, and how many they are."""
        return {"digest": self.rows.digest, "tokens": self.rows.tokens}

    def describe(self, steps: int) -> list[str]:
        """Return how much there is and how often that many steps go through it."""
        rows, trained = len(self.rows), steps * self.share.global_batch_size
        shares = self.rows.describe_shares(trained) if isinstance(self.rows, MixtureRows) else []
        return [*self.rows.describe(), *shares, f"{rows:,} rows; {steps} steps are {trained / rows:.3g} epochs"]

    def rows_by_component(self, step: int) -> dict[str, int] | None:
        """Return the rows of each component, by name; None without a mixture."""
        if not isinstance(self.order, MixtureOrder) or not isinstance(self.rows, MixtureRows):
            return None
        return _count_rows(self.order, list(self.rows.components), step)

    def steps(self, first_step: int, last_step: int, left_out: Collection[int]) -> Generator[Step, None, None]:
        """Yield this rank's part of each step."""
        return build_loader(
            self.rows,
            self.order,
            self.share,
            self.padding,
            first_step,
            last_step,
            self.num_workers,
            self.prefetch,
            left_out,
        )


@dataclass
class StreamedText:
    """The sources that a run with `data.streaming` reads, open."""

    config: DataConfig
    sources: dict[str, Source]
    """By the component's name; one without a name where the data is no mixture."""
    tokenizer: Tokenizer


def open_streams(config: DataConfig, tokenizer: Tokenizer) -> StreamedText:
    """Return the sources of a config, open.

    Raises:
        DataError: If one has nothing to read.
    """
    parts = {"": config}
    if config.kind is DataKind.mixture:
        parts = {name: source_of(component) for name, component in components_of(config).items()}
    return StreamedText(config, {name: open_source(part, streaming=True) for name, part in parts.items()}, tokenizer)


@dataclass
class StreamedFeed:
    """Data that is tokenised while training."""

    text: StreamedText
    plan: StreamPlan
    share: Share
    mixture: MixtureOrder | None
    """Which component each row comes from; None without a mixture."""
    cursors: np.ndarray | None
    _tokenised: Tokenised = field(default_factory=Tokenised)
    _told: int = 0

    @property
    def tokens_to_bytes(self) -> tuple[int, int]:
        """Return what this rank has tokenised so far."""
        return self._tokenised.tokens, self._tokenised.text_bytes

    @property
    def identity(self) -> dict[str, Any]:
        """Return a digest of the tokenizer, of what the sources are, and of how many streams share them out."""
        described = {
            "tokenizer": self.text.tokenizer.fingerprint,
            "streams": self.plan.streams,
            "sources": {
                name: [source.config.kind.name, [(shard.name, shard.size_bytes) for shard in source.shards]]
                for name, source in self.text.sources.items()
            },
        }
        text = json.dumps(described, sort_keys=True)
        return {"digest": hashlib.sha256(text.encode()).hexdigest()[:32], "tokens": None}

    def describe(self, steps: int) -> list[str]:
        """Return how the sources are shared out."""
        lines = []
        for name, source in self.text.sources.items():
            shards, streams = len(source.shards), self.plan.streams
            share = DocumentShare(source, 0, streams, "")
            by = "whole shards" if share.takes_shards else "records of every shard"
            label = f"{name}: " * bool(name)
            lines.append(
                f"{label}streamed from {shards:,} shard{'s' * (shards != 1)} in {streams} "
                f"stream{'s' * (streams != 1)} ({by}), shuffled over {self.text.config.shuffle_window:,} documents"
            )
        return lines

    def rows_by_component(self, step: int) -> dict[str, int] | None:
        """Return the rows of each component, by name."""
        return None if self.mixture is None else _count_rows(self.mixture, list(self.text.sources), step)

    def steps(self, first_step: int, last_step: int, left_out: Collection[int]) -> Generator[Step, None, None]:
        """Yield this rank's part of each step, from where the cursors stand."""
        assert self.cursors is not None, "set at the beginning"
        config = self.text.config
        return build_stream_loader(
            self.plan,
            self.share,
            self.cursors,
            first_step,
            last_step,
            config.num_workers,
            config.prefetch,
            left_out,
            self._note,
        )

    def _note(self, found: Tokenised) -> None:
        self._tokenised = found
        skipped = found.skipped or Counter()
        if skipped.total() >= max(1, 2 * self._told):
            self._told = skipped.total()
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
            logger.warning(f"documents that this rank has left out so far: {reasons}")


def build_stream_feed(text: StreamedText, share: Share, seq_len: int, seed: int) -> StreamedFeed:
    """Return the feed of streamed text.

    Args:
        text: What to read.
        share: What this rank takes of each step.
        seq_len: Tokens of a row.
        seed: Fixes the order of the documents.
    """
    config, names = text.config, list(text.sources)
    size = share.global_batch_size
    streams = count_streams(size, config.streams)
    mixture = None
    if config.kind is DataKind.mixture:
        weights = tuple(config.components[name].weight for name in names)
        mixture = MixtureOrder(tuple(RowOrder(1, size, seed, name) for name in names), weights, size)

    def components_at(positions: np.ndarray) -> np.ndarray:
        return np.zeros_like(positions) if mixture is None else mixture.components_at(positions)[0]

    def build(component: int, stream: int, cursor: Cursor) -> Stream:
        name = names[component]
        source = text.sources[name]
        return Stream(
            DocumentShare(source, stream, streams, f"{seed}/{name}"),
            Encoder(text.tokenizer, source.config).encode,
            seq_len,
            config.shuffle_window,
            config.packing,
            text.tokenizer.eos,
            config.mask_documents,
            cursor,
        )

    plan = StreamPlan(size, streams, len(names), components_at, text.tokenizer.eos, build)
    return StreamedFeed(text, plan, share, mixture, plan.initial_cursors())


def _count_rows(order: MixtureOrder, names: list[str], step: int) -> dict[str, int]:
    """Return how many rows of a step each component gives, by name."""
    size = order.global_batch_size
    components, _ = order.components_at(np.arange(step * size, (step + 1) * size))
    return dict(zip(names, np.bincount(components, minlength=len(names)).tolist(), strict=True))
