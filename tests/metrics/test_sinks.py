"""metrics.jsonl through crashes and resumes, and the line on the console."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from titan.log import logger
from titan.metrics.meter import validation_row
from titan.metrics.sinks import Console, JsonLines, format_row, format_seconds, format_validation

ROW = {
    "step": 120,
    "loss": 2.41314159,
    "grad_norm": 0.8749,
    "learning_rate": 3e-4,
    "tokens": 1,
    "tokens_per_second": 41_210.4,
    "mfu": 0.4312,
    "memory_gib": 61.24,
    "step_seconds": 2.0,
}


def steps(path: Path) -> list[int]:
    """Return the steps in a file, in order; every line has to be whole."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, resumed_step: int, *numbers: int) -> None:
    """Write rows as a run does that resumed at some step."""
    sink = JsonLines(path, resumed_step)
    for number in numbers:
        sink.write({"step": number, "loss": 1 / 3})
    sink.close()


def test_rows_are_appended_and_seen_at_once(tmp_path: Path) -> None:
    """Another process sees a row as soon as it is written, with every digit of the loss."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    assert path.exists()
    loss = math.pi / 3
    for number in (1, 2):
        sink.write({"step": number, "loss": loss})
        assert steps(path)[-1] == number
    assert json.loads(path.read_text().splitlines()[0])["loss"] == loss
    sink.close()


def test_a_resumed_run_goes_on_and_repeats_no_step(tmp_path: Path) -> None:
    """Rows beyond the checkpoint are dropped, for they come again; those up to it stay as they were."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 10, 20, 30)
    before = path.read_text().splitlines()[:2]
    write(path, 10, 20, 30, 40)
    assert steps(path) == [1, 10, 20, 30, 40]
    assert path.read_text().splitlines()[:2] == before


def test_a_run_that_starts_over_starts_the_file_over(tmp_path: Path) -> None:
    """Without a checkpoint to resume from, nothing of the first attempt remains."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 10)
    write(path, 0, 1)
    assert steps(path) == [1]


@pytest.mark.parametrize(
    "rest", ['{"step": 30, "los', '{"step": 30}', "\x00\x00\x00", "", "[]", "30", '{"step": null}']
)
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path, rest: str) -> None:
    """The next run begins behind the last whole row of before, on a line of its own."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 10, 20)
    with path.open("a") as file:
        file.write(rest)
    write(path, 20, 30)
    assert steps(path) == [10, 20, 30]


def test_a_line_that_is_not_text_is_dropped(tmp_path: Path) -> None:
    """Blocks that a file system lost may hold any bytes; they do not keep a run from resuming."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 10)
    with path.open("ab") as file:
        file.write(b"\xff\xfe\x80\n")
    write(path, 10, 20)
    assert steps(path) == [10, 20]


def test_no_temporary_file_remains(tmp_path: Path) -> None:
    """The file is replaced as a whole, and that leaves nothing beside it."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1)
    write(path, 1, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_row_on_the_console_has_its_units() -> None:
    """Step, loss in nats, bits a byte, gradient norm, rate, tokens a second, MFU, memory, time left."""
    assert format_row(ROW, total_steps=1000, tokens=100, text_bytes=100) == (
        "step  120/1000  loss 2.4131  bits/byte 3.481  grad 0.87  lr 3.00e-04  41,210 tok/s  mfu 43.1%  "
        "peak 61.24 GiB  29:20 left"
    )


def test_a_validation_on_the_console_has_its_units() -> None:
    """Step, loss in nats, bits a byte, perplexity, tokens, seconds; what is null is said in words."""
    row = validation_row(120, math.log(8), tokens=12_345, text_bytes=12_345, seconds=1.234)
    assert format_validation(row, total_steps=1000) == (
        "step  120/1000  validation loss 2.0794  bits/byte 3.000  perplexity 8.00  12,345 tokens  in 1.23 s"
    )
    row = validation_row(120, math.nan, tokens=1, text_bytes=1, seconds=1)
    assert "validation loss not finite  bits/byte not finite" in format_validation(row, 1000)


def test_a_step_and_its_validation_are_two_rows_that_come_and_go_together(tmp_path: Path) -> None:
    """A run that resumes at a step keeps both, one that resumes before it drops both; neither comes twice."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, key: 1.0} for step in (10, 20, 30) for key in ("loss", "validation_loss")]

    def write_rows(resumed_step: int) -> list[dict[str, float]]:
        sink = JsonLines(path, resumed_step)
        for row in rows:
            if row["step"] > resumed_step:
                sink.write(row)
        sink.close()
        return [json.loads(line) for line in path.read_text().splitlines()]

    assert write_rows(0) == write_rows(20) == write_rows(5) == rows
    JsonLines(path, 20).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:4]


def test_an_unknown_peak_and_the_last_step_leave_their_columns_out() -> None:
    """No MFU without a peak, and nothing is left after the last step."""
    line = format_row({**ROW, "mfu": None, "step": 1000}, 1000, 100, 100)
    assert "mfu" not in line
    assert "left" not in line
    assert line.startswith("step 1000/1000  loss")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (6.6, "0:07"), (59.7, "1:00"), (754, "12:34"), (3600, "1:00:00"), (11_045, "3:04:05")],
)
def test_durations_read_as_clocks_do(seconds: float, text: str) -> None:
    """Minutes and seconds, and hours where there are any."""
    assert format_seconds(seconds) == text


def test_the_console_writes_plain_lines_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stdout is no terminal there is no progress bar, only lines."""
    handler = logging.StreamHandler()
    lines: list[str] = []
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        console = Console(1000, 0, lambda: (100, 100))
        console.step()
        console.write(ROW)
        console.close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert lines == [format_row(ROW, 1000, 100, 100)]
    assert "it/s" not in "".join(capsys.readouterr())


def test_a_terminal_gets_a_progress_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal a bar counts the steps from where the run resumed."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    console = Console(total_steps=10, first_step=4, tokens_to_bytes=lambda: (1, 1))
    assert console._bar is not None
    console.step()
    assert console._bar.n == 5
    assert console._bar.total == 10
    console.close()
    assert "4/10" in capsys.readouterr().err
