"""Replay of real runs: the documents that it names are those that the run has trained on, prepared or streamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import json_lines
from titan.data.feed import PreparedFeed
from titan.prepare import replay

from .conftest import Runs

STREAMED = ("data.streaming=true", "data.streams=2", "data.shuffle_window=3")


@pytest.fixture
def documents(tmp_path: Path) -> list[str]:
    """Forty short documents, and overrides that read them."""
    path = tmp_path / "documents.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"document {number} " * (number % 7 + 1)}) + "\n" for number in range(40))
    )
    return ["data=jsonl", f"data.path={path}"]


@pytest.mark.parametrize("options", [(), ("data.packing=best_fit",), STREAMED, (*STREAMED, "data.packing=best_fit")])
def test_every_step_is_what_the_run_has_written_down(
    runs: Runs, documents: list[str], options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """From a checkpoint on or from the beginning, the digest is the run's; and each text is in the line it names."""
    trainer = runs.train("run", *documents, *options)
    lines = (trainer.directory.path.parent / "documents.jsonl").read_text().splitlines()
    recorded = {row["step"]: row["digest"] for row in json_lines(trainer.directory.rows)}
    assert sorted(recorded) == [1, 2, 3, 4, 5, 6]
    for step in (1, 4, 6):  # steps 2 and 4 were saved: from the beginning, from step 2, from step 4
        capsys.readouterr()
        assert replay.main([str(trainer.directory.path), "--step", str(step), "--json"])
        told = json.loads(capsys.readouterr().out)
        assert told["digest"] == told["recorded_digest"] == recorded[step]
        assert [row["row"] for row in told["rows"]] == list(range(trainer.config.training.global_batch_size))
        pieces = [piece for row in told["rows"] for piece in row["pieces"]]
        for piece in pieces:
            text = json.loads(lines[piece["record"]])["text"]
            assert piece["text"] in f"<|begin_of_text|>{text}<|end_of_text|>"
            assert piece["where"].endswith(f"documents.jsonl, line {piece['record'] + 1}")
            assert piece["document_tokens"] == len(text) + 2
        if "data.packing=best_fit" not in options:
            for row in told["rows"]:
                ends = [piece["position"] + piece["length"] for piece in row["pieces"]]
                assert [piece["position"] for piece in row["pieces"]] == [0, *ends[:-1]]
                is_last = isinstance(trainer.data, PreparedFeed) and row["number"] == len(trainer.data.rows) - 1
                assert ends[-1] == trainer.config.training.seq_len or is_last


def test_the_text_of_a_streamed_step_is_printed(
    runs: Runs, documents: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As for people; with --whole the whole of a document; a digest that differs turns the exit code."""
    trainer = runs.train("run", *documents, *STREAMED)
    capsys.readouterr()
    assert replay.main([str(trainer.directory.path), "--step", "3", "--rows", "0", "--whole"])
    out = capsys.readouterr().out
    assert "documents.jsonl, line " in out
    assert "| <|begin_of_text|>document " in out
    assert "as the run has written down" in out
    rows = json_lines(trainer.directory.rows)
    rows[2]["digest"] = "0" * 16
    trainer.directory.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not replay.main([str(trainer.directory.path), "--step", "3"])
