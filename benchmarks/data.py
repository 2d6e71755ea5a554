"""Speed of data: tokenising beside `datasets.map`, reading prepared rows, and memory against the size of the data.

Tokenising: from a jsonl file to tokens on the disk, the same documents, the same tokenizer, two processes each, in
turns; and beside it `datasets.map` alone, without the loading of its table that titan's figure includes. Reading: rows
in the order of training, with labels and collation, by one process. Memory: the peak of a process that reads so many
steps of a small and of a large prepared folder, beyond what importing takes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import OtherLoad, describe_machine, environment, spread, write_result

LEAST_RATIO = 1.0
LEAST_TOKENS_PER_SECOND = 20_000_000
PROCESSES = 2
ROWS = 32


def main() -> int:
    """Measure, print and write the figures; 1 where a mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["prepare"], default="prepare")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=256, help="of text to tokenise (default: %(default)s)")
    parser.add_argument("--run", choices=["titan", "datasets", "read", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seq-len", type=int, default=2048, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        runs = {"titan": prepare_by_titan, "datasets": prepare_by_datasets, "read": read_rows, "memory": read_memory}
        print(json.dumps(runs[given.run](given.folder, given.seq_len)))
        return 0
    machine, load = describe_machine(), OtherLoad()
    rates: dict[str, list[float]] = {"titan": [], "datasets": [], "datasets_and_loading": []}
    reading: dict[str, dict[str, float]] = {}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts.jsonl", given.megabytes)
        for _ in range(given.repeats):
            rates["titan"].append(_child("titan", folder)["tokens_per_second"])
            theirs = _child("datasets", folder)
            rates["datasets"].append(theirs["tokens_per_second"])
            rates["datasets_and_loading"].append(theirs["with_loading"])
        for label, tokens in (("small", 1 << 22), ("large", 1 << 27)):
            write_tokens(folder / label, tokens)
        for seq_len in (2048, 8192):
            turns = [_child("read", folder / "large", seq_len)["tokens_per_second"] for _ in range(given.repeats)]
            reading[str(seq_len)] = spread(turns, 0)
        memory = {label: _child("memory", folder / label)["mib"] for label in ("small", "large")}
    figures = {side: spread(found, 0) for side, found in rates.items()}
    ratio, with_loading = (
        statistics.median(ours / theirs for ours, theirs in zip(rates["titan"], rates[side], strict=True))
        for side in ("datasets", "datasets_and_loading")
    )
    path = write_result(
        "data_prepare",
        machine,
        cores_busy_elsewhere=load.cores(),
        tokenising_tokens_per_second=figures,
        ratio=round(ratio, 3),
        ratio_with_loading=round(with_loading, 3),
        reading_tokens_per_second=reading,
        memory_mib=memory,
    )
    print(
        f"tokenising  titan {figures['titan']['median']:,.0f} tok/s, datasets.map {figures['datasets']['median']:,.0f}"
    )
    print(f"            ratio {with_loading:.2f} with what datasets takes to load the file, {ratio:.2f} without")
    for seq_len, found in reading.items():
        print(f"reading     {found['median']:,.0f} tok/s at seq_len {seq_len}")
    print(f"memory      {memory['small']:.1f} MiB of 8 MiB of tokens, {memory['large']:.1f} MiB of 256 MiB")
    print(f"written to {path.name}")
    is_fast = with_loading >= LEAST_RATIO and all(
        found["median"] >= LEAST_TOKENS_PER_SECOND for found in reading.values()
    )
    if not is_fast:
        print(f"FAILED: at least {LEAST_RATIO} and {LEAST_TOKENS_PER_SECOND:,} are wanted", file=sys.stderr)
    return 0 if is_fast else 1


def write_texts(path: Path, megabytes: int) -> None:
    """Write documents of some kilobytes, as web pages are, out of Python's own sources."""
    from titan.config.files import find_standard_library

    text = "\n".join(file.read_text(errors="replace") for file in find_standard_library()[:800])
    draw, written = random.Random(0), 0
    with path.open("w") as file:
        while written < megabytes * 1_000_000:
            start, length = draw.randrange(len(text)), int(draw.lognormvariate(7.5, 0.8))
            written += file.write(json.dumps({"text": text[start : start + length]}) + "\n")


def write_tokens(folder: Path, tokens: int) -> None:
    """Write prepared documents of random tokens."""
    from titan.data.prepared import write_documents

    generator = np.random.default_rng(0)
    write_documents(folder, (generator.integers(0, 50_000, 1024) for _ in range(tokens // 1024)), 50_000)


def prepare_by_titan(folder: Path, seq_len: int) -> dict[str, float]:
    """Tokenise as titan.prepare does."""
    from titan.config.schema import DataConfig, DataKind
    from titan.data.prepare import Preparation, prepare_source
    from titan.data.tokenizer import build_tokenizer

    preparation = Preparation(build_tokenizer(tokenizer_config(folder)), str(folder), workers=PROCESSES)
    config = DataConfig(kind=DataKind.jsonl, path=str(folder / "texts.jsonl"))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        began = time.perf_counter()
        prepared = prepare_source(config, Path(out) / "to", preparation)
        return {"tokens_per_second": prepared.tokens / (time.perf_counter() - began)}


def prepare_by_datasets(folder: Path, seq_len: int) -> dict[str, float]:
    """Tokenise the same documents with the same tokenizer through datasets.map, with and without loading the table."""
    import datasets

    from titan.data.tokenizer import build_tokenizer

    datasets.disable_progress_bars()
    tokenizer = build_tokenizer(tokenizer_config(folder))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        loading = time.perf_counter()
        table = datasets.load_dataset("json", data_files=str(folder / "texts.jsonl"), split="train", cache_dir=out)
        began = time.perf_counter()
        mapped = table.map(
            lambda batch: {"tokens": [tokenizer.encode(text) for text in batch["text"]]},
            batched=True,
            num_proc=PROCESSES,
            remove_columns=table.column_names,
        )
        done = time.perf_counter()
        counts = mapped.map(lambda batch: {"count": [len(t) for t in batch["tokens"]]}, batched=True)["count"]
        return {"tokens_per_second": sum(counts) / (done - began), "with_loading": sum(counts) / (done - loading)}


def tokenizer_config(folder: Path) -> Any:
    """Return GPT-like byte pairs of our own: 256 bytes and merges that Python's sources are full of."""
    import base64
    from collections import Counter

    from titan.config.schema import TokenizerConfig, TokenizerKind

    path = folder / "tokenizer.model"
    if not path.exists():
        with (folder / "texts.jsonl").open() as file:
            text = file.read(4_000_000).encode()
        merges: Counter[bytes] = Counter()
        for word in text.split(b" "):
            for end in range(2, min(len(word), 12) + 1):
                merges[b" " + word[:end]] += 1
                merges[word[:end]] += 1
        tokens = [bytes([number]) for number in range(256)] + [merge for merge, _ in merges.most_common(30_000)]
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return TokenizerConfig(kind=TokenizerKind.tiktoken, path=str(path))


def read_rows(folder: Path, seq_len: int) -> dict[str, float]:
    """Read steps as a loader does: rows in their order, labels, collation."""
    from titan.data.loader import collate
    from titan.data.prepared import open_prepared
    from titan.data.rows import PreparedRows

    rows = PreparedRows(open_prepared(folder), seq_len, padding=0)
    order = rows.order(ROWS, seed=0)
    steps = 20_000_000 // (ROWS * seq_len)
    collate(rows.read(order.rows_of_step(0)))
    began = time.perf_counter()
    for step in range(1, steps + 1):
        collate(rows.read(order.rows_of_step(step)))
    return {"tokens_per_second": steps * ROWS * seq_len / (time.perf_counter() - began)}


def read_memory(folder: Path, seq_len: int) -> dict[str, float]:
    """Return by how much the resident memory grows while many steps are read."""
    from titan.data.loader import collate
    from titan.data.prepared import open_prepared
    from titan.data.rows import PreparedRows

    before = _resident_bytes()
    rows = PreparedRows(open_prepared(folder), seq_len, padding=0)
    order = rows.order(ROWS, seed=0)
    for step in range(400):
        collate(rows.read(order.rows_of_step(step)))
    return {"mib": (_resident_bytes() - before) / (1 << 20)}


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _child(run: str, folder: Path, seq_len: int = 2048) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", run, "--folder", str(folder), "--seq-len", str(seq_len)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
