"""Ranks that raise, readers that are killed, and data that changes under a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import INTERVAL, SHORT, MakeReference, MakeRun
from tests.faults.damage import cut
from tests.support.command import Started, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_ranks_and_readers_that_end(make_run: MakeRun, undisturbed: MakeReference) -> None:
    """A rank that raises, and one whose reader of data is killed: all end, the cause is said, and the run goes on."""
    run = make_run(undisturbed(SHORT), "checkpoint=async", "data.num_workers=1", lost_intervals=2)
    rank, step = run.draw.randrange(2), run.draw.randrange(INTERVAL + 1, 3 * INTERVAL)
    raised = run.survive("a rank raises", f"error:{rank}:step:{step}").finished
    assert f"rank {rank} failed first: RuntimeError: a planted error" in raised.err
    read = run.draw.randrange(INTERVAL + 1, 3 * INTERVAL)
    killed = run.survive("SIGKILL of a reader of data", f"kill:{rank}:row:{read}").finished
    assert f"rank {rank} failed first" in killed.err
    assert "data worker 0 of this rank's 1 (process " in killed.err
    assert ") was killed by SIGKILL" in killed.err
    run.complete()


def test_tokens_cut_short_under_a_run(make_run: MakeRun, undisturbed: MakeReference, tmp_path: Path) -> None:
    """Tokens that end too early end the run with 65 and the file's name; made anew, they are the same data."""
    cache = tmp_path / "cache"
    run = make_run(undisturbed(SHORT), "checkpoint=sync", cache=cache)

    def cut_tokens(process: Started) -> None:
        wait_until(lambda: run.last_row() > INTERVAL, "some steps")
        (tokens,) = cache.rglob("*.tokens")
        cut(tokens, run.draw.randrange(tokens.stat().st_size // 4))

    struck = run.survive("the token cache is cut short", "slow:0:0.2", (65,), cut_tokens).finished
    assert ".tokens ends before entry" in struck.err
    assert "Traceback" not in struck.text
    shutil.rmtree(cache)
    run.complete()


def test_a_broken_line(make_run: MakeRun, undisturbed: MakeReference, tmp_path: Path, text_file: Path) -> None:
    """A line that is no JSON ends the run with 65 before a step, with file and line; mended, it is the same run."""
    document = json.dumps({"text": text_file.read_text()})
    data = tmp_path / "data.jsonl"
    data.write_text(f"{document}\n{document[: len(document) // 2]}\n")
    run = make_run(undisturbed(SHORT), "checkpoint=sync", data=data)
    broken = run.survive("a line of the data is broken", "", (65,)).finished
    assert f"{data}, line 2: broken JSON" in broken.err
    assert run.rows() == []
    data.write_text(f"{document}\n")
    run.complete()
