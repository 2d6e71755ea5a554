"""What streams are tested against: the documented order, made the slow and plain way, in one process."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from titan.config.schema import ComponentConfig, DataConfig, DataKind, Packing, TokenizerConfig, TokenizerKind
from titan.data.batch import IGNORED_LABEL, permute
from titan.data.feed import StreamedFeed, build_stream_feed, open_streams
from titan.data.loader import Share
from titan.data.packing import pack_best_fit
from titan.data.rows import Row
from titan.data.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes))
SEQ_LEN = 16
GLOBAL_BATCH = 24
STREAMS = 4
"""Divides the global batch; for a source of a few shards, whose records the streams share out."""
WINDOW = 5
SEED = 7

Shards = list[list[str]]


def write_texts(folder: Path, name: str, shards: int, documents: int, seed: int = 0) -> Shards:
    """Write files of some documents each, of 1 to 60 letters; returns what they say, shard by shard."""
    generator = random.Random(f"{name}/{seed}")
    out: Shards = []
    (folder / name).mkdir()
    for shard in range(shards):
        texts = [
            f"{name}{shard}.{number} " + generator.choice("abcdef") * generator.randrange(60)
            for number in range(documents)
        ]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / name / f"{shard:03d}.jsonl").write_text(lines)
        out.append(texts)
    return out


def data_config(folder: Path, *names: str, **options) -> DataConfig:
    """Return a config that streams one folder of files, or a mixture of several."""
    options = {"streams": STREAMS, "shuffle_window": WINDOW, **options}
    if len(names) == 1:
        return DataConfig(kind=DataKind.jsonl, path=str(folder / names[0]), streaming=True, **options)
    components = {
        name: ComponentConfig(kind=DataKind.jsonl, path=str(folder / name), weight=2.0 if name == names[0] else 1.0)
        for name in names
    }
    return DataConfig(kind=DataKind.mixture, components=components, streaming=True, **options)


def components_of_rows(first: int, last: int) -> list[int]:
    """Return the components of some positions of a mixture of 2 to 1: whoever is then furthest behind its share."""
    shares, counts, out = (Fraction(2, 3), Fraction(1, 3)), [0, 0], []
    for position in range(1, last + 1):
        # the first has the floor of its share of all rows so far, with the share in 32 bits
        mine = (position * round(shares[0] * 2**32)) >> 32 > counts[0]
        component = 0 if mine else 1
        counts[component] += 1
        out.append(component)
    return out[first:]


def open_feed(config: DataConfig, rank: int = 0, ranks: int = 1, local: int | None = None) -> StreamedFeed:
    """Return what a data rank is fed with."""
    share = Share(GLOBAL_BATCH, local or GLOBAL_BATCH // ranks, rank, ranks)
    return build_stream_feed(open_streams(config, TOKENIZER), share, SEQ_LEN, SEED)


def tokens_of(text: str) -> list[int]:
    """Return a document's tokens, between begin and end of text."""
    return [TOKENIZER.bos, *text.encode(), TOKENIZER.eos]


def key_of(text: str) -> int:
    """Return the key of a permutation by its name."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def windows_of_stream(shards: Shards, name: str, stream: int, streams: int, window: int) -> Iterator[list[str]]:
    """Yield the windows of a stream without end, each in its shuffled order."""
    epoch = 0
    while True:
        order = permute(np.arange(len(shards)), len(shards), key_of(f"{SEED}/{name}/shards/{epoch}")).tolist()
        mine = []
        for place, shard in enumerate(order):
            for record, text in enumerate(shards[shard]):
                by_shard = len(shards) >= 4 * streams
                if (place if by_shard else record + shard) % streams == stream:
                    mine.append(text)
        mine = mine or [text for shard in order for text in shards[shard]]
        for number, first in enumerate(range(0, len(mine), window)):
            texts = mine[first : first + window]
            shuffled = permute(np.arange(len(texts)), len(texts), key_of(f"{SEED}/{name}/{stream}/{epoch}/{number}"))
            yield [texts[index] for index in shuffled]
        epoch += 1


def cut_rows(windows: Iterator[list[str]]) -> Iterator[Row]:
    """Yield rows of documents one after the other; the last token of a row begins the next."""
    held: list[tuple[int, bool]] = []
    for texts in windows:
        for text in texts:
            held += [(token, index == 0) for index, token in enumerate(tokens_of(text))]
        while len(held) > SEQ_LEN:
            starts, start = [], 0
            for position, (_, begins) in enumerate(held[:SEQ_LEN]):
                start = position if begins else start
                starts.append(start)
            tokens = [token for token, _ in held[: SEQ_LEN + 1]]
            yield Row(*(np.array(part) for part in (tokens[:-1], tokens[1:], starts)))
            held = held[SEQ_LEN:]


def fit_rows(windows: Iterator[list[str]]) -> Iterator[Row]:
    """Yield rows in which each window's documents are packed together."""
    for texts in windows:
        tokens = [tokens_of(text) for text in texts]
        for segments in pack_best_fit(np.array([len(each) for each in tokens]), SEQ_LEN):
            inputs, labels, starts = [], [], []
            for segment in segments:
                document, last = tokens[segment.document], segment.first + segment.length
                starts += [len(inputs)] * segment.length
                inputs += document[segment.first : last]
                labels += document[segment.first + 1 : last + 1]
            padding = SEQ_LEN - len(inputs)
            starts += [len(inputs)] * padding
            rows = (inputs + [TOKENIZER.eos] * padding, labels + [IGNORED_LABEL] * padding, starts)
            yield Row(*(np.array(part) for part in rows))


def expected_steps(
    config: DataConfig,
    shards: dict[str, Shards],
    steps: int,
) -> list[list[Row]]:
    """Return the rows of each step, in the order of the global batch."""
    names = list(config.components) or [""]
    make = cut_rows if config.packing is Packing.concat else fit_rows
    streams = max(n for n in range(1, config.streams + 1) if GLOBAL_BATCH % n == 0)
    rows = {
        (name, stream): make(windows_of_stream(shards[name], name, stream, streams, config.shuffle_window))
        for name in names
        for stream in range(streams)
    }
    out = []
    for step in range(steps):
        components = components_of_rows(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        out.append(
            [
                next(rows[names[components[place] if len(names) > 1 else 0], place * streams // GLOBAL_BATCH])
                for place in range(GLOBAL_BATCH)
            ]
        )
    return out
