"""Tokens a second of streamed text: what one process makes, and one with workers.

    python benchmarks/data_streaming.py [--megabytes 64] [--streams 64] [--workers 0 1] [data and tokenizer overrides]

Documents of a few kilobytes, of the Python standard library's text, in jsonl. A row is timed from when it is asked for;
the first step, in which every stream reads its first window, is apart.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from record import OtherLoad, describe_machine, write_result

from titan.config.files import find_standard_library
from titan.config.load import compose
from titan.data.feed import build_stream_feed, open_streams
from titan.data.loader import Share
from titan.data.tokenizer import build_tokenizer

SEQ_LEN, ROWS = 2048, 64


def main() -> None:
    """Measure, print one line of JSON for each number of workers, and write the figures."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("overrides", nargs="*")
    command.add_argument("--megabytes", type=int, default=64)
    command.add_argument("--shards", type=int, default=1)
    command.add_argument("--streams", type=int, default=64)
    command.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    command.add_argument("--steps", type=int, default=20)
    given = command.parse_args()
    machine, load, cases = describe_machine(), OtherLoad(), []
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder), given.megabytes * 10**6, given.shards)
        for workers in given.workers:
            overrides = ["run.dir=none", "data=jsonl", f"data.path={folder}", "data.streaming=true"]
            overrides += [f"data.streams={given.streams}", f"data.num_workers={workers}", *given.overrides]
            config = compose(overrides)
            tokenizer = build_tokenizer(config.tokenizer)
            feed = build_stream_feed(open_streams(config.data, tokenizer), Share(ROWS, ROWS, 0, 1), SEQ_LEN, 0)
            steps = feed.steps(0, given.steps + 1, ())
            began = time.perf_counter()
            next(steps)
            first = time.perf_counter() - began
            for _ in steps:
                pass
            seconds = time.perf_counter() - began - first
            cases.append(
                {
                    "workers": workers,
                    "streams": feed.plan.streams,
                    "shards": given.shards,
                    "tokenizer": config.tokenizer.kind.name,
                    "tokens_per_second": round(given.steps * ROWS * SEQ_LEN / seconds),
                    "first_step_seconds": round(first, 2),
                }
            )
            print(json.dumps(cases[-1]), flush=True)
    write_result("data_streaming", machine, cores_busy_elsewhere=load.cores(), cases=cases)


def write_documents(folder: Path, size: int, shards: int) -> None:
    """Write documents of 1 to 8 kB, `size` bytes in all."""
    texts = "\n".join(path.read_text("utf-8", "replace") for path in find_standard_library()[:300])
    generator = random.Random(0)
    for shard in range(shards):
        with (folder / f"{shard:04d}.jsonl").open("w") as file:
            written = 0
            while written < size // shards:
                length = generator.randrange(1000, 8000)
                at = generator.randrange(len(texts) - length)
                file.write(json.dumps({"text": texts[at : at + length]}) + "\n")
                written += length


if __name__ == "__main__":
    main()
