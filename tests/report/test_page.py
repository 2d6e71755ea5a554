"""The page says what the files say, is small, and is safe to open."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import clean_environment
from titan.report.__main__ import main
from titan.report.curves import average, thin
from titan.report.mfu import flops_per_token
from titan.report.plot import Axis, format_number, log_ticks, round_ticks
from titan.report.runs import find_runs

from .made import eventful_run, sweep, training_row, write_run
from .page import read_page


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process; returns its exit code and what it wrote."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_the_pages_values_are_those_of_the_file(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every logged value of every curve, with all its digits, and the last one in words."""
    shutil.copytree(trained, here / "run")
    code, out, err = report(capsys, "run")
    assert (code, err) == (0, "")
    assert out.startswith("run/report.html  (step 2, ")
    page = read_page(here / "run" / "report.html")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_gib"):
        assert page.curve(name) == [(row["step"], row[name]) for row in rows]
    assert f"Last loss{rows[-1]['loss']:.4f}" in page.words
    assert "mfu" not in page.data["curves"]
    assert "No MFU: the peak of this device at this precision is not known." in page.words
    assert sum(page.data["goodput"][0]["seconds"].values()) == pytest.approx(page.data["goodput"][0]["wall_seconds"])


def test_everything_of_an_eventful_run_is_on_its_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves, validations, both MFUs with their formulas, times, restarts, the spike, samples and the config."""
    eventful_run(here / "run", steps=600)
    assert report(capsys, "run")[0] == 0
    page = read_page(here / "run" / "report.html")
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if "validation_loss" in row]
    assert page.curve("validation_loss") == [(row["step"], row["validation_loss"]) for row in validations]
    steps = [row for row in rows if "loss" in row]
    assert page.curve("mfu") == [(row["step"], 100 * row["mfu"]) for row in steps]
    causal = [point[1] / row["mfu"] / 100 for point, row in zip(page.curve("mfu_causal"), steps, strict=True)]
    config = find_runs([here / "run"])[0].config
    full, half = flops_per_token(config) or (0, 0)
    assert causal == pytest.approx([half / full] * len(steps))
    for words in (
        "6 x N + 12 x L x H x D x S",
        "6 x N + 6 x L x H x D x S",
        "resumestep 200",
        "spikeaction rollback, step 408, loss nan",
        ", after 300 steps, there was a loss.",
        "n_kv_heads: 8",
        "Starts2",
    ):
        assert words in page.words
    times = next(table for table in page.tables if table[0][-1] == "share")
    shares = [float(row[-1].rstrip("%")) for row in times[1:]]
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=0.5)
    assert page.count("polyline") == len(page.data["curves"])


def test_the_two_conventions_differ_by_half_of_attention() -> None:
    """By hand for Llama 3 8B at 8,192 tokens: 6 N + 12 L H D S, and half of the second term.

    Source:
        The shape is Llama 3's, https://arxiv.org/abs/2407.21783, table 3.
    """
    shape = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 14336, "vocab_size": 128256}
    config = {f"model.{key}": value for key, value in shape.items()} | {"training.seq_len": 8192}
    block = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    matrices, attention = 32 * block + 128256 * 4096, 32 * 32 * 128 * 8192
    expected = 6 * matrices + 12 * attention, 6 * matrices + 6 * attention
    assert flops_per_token(config | {"model.family": "llama"}) == expected
    assert flops_per_token(config | {"model.family": "mine:FAMILY"}) is None
    assert flops_per_token({"model.family": "llama"}) is None


def test_a_sweep_is_sorted_by_its_last_loss_and_shows_what_varies(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty points of a thousand rows: the best first, only the keys that differ, under 3 MB; extremes are kept."""
    sweep(here / "sweep", points=20, rows=1000)
    broken = here / "sweep" / "20"
    write_run(
        broken, [], state="failed", why="DataError: no text", overrides=["optimizer.lr=0.5", "training.steps=1000"]
    )
    assert report(capsys, "sweep")[0] == 0
    path = here / "sweep" / "report.html"
    assert path.stat().st_size < 3_000_000
    page = read_page(path)
    head, *lines = page.tables[0]
    assert head[:4] == ["run", "last loss", "optimizer.lr", "lr_scheduler.warmup_steps"]
    assert "training.seed" not in head
    losses = []
    for point in range(20):
        last = (here / "sweep" / str(point) / "metrics.jsonl").read_text().splitlines()[-1]
        losses.append((json.loads(last)["loss"], point))
    column = head.index("last loss")
    assert [(line[0], line[column]) for line in lines] == [
        *((str(point), f"{loss:.4f}") for loss, point in sorted(losses)),
        ("20", "-"),
    ]
    assert "20 has logged no step yet. It says: DataError: no text" in page.words
    for point in (0, 7, 19):
        rows = [json.loads(line) for line in (here / "sweep" / str(point) / "metrics.jsonl").read_text().splitlines()]
        curve, whole = page.curve("grad_norm", point), [(row["step"], row["grad_norm"]) for row in rows]
        assert set(curve) <= set(whole)
        values = [value for _, value in whole]
        assert {min(values), max(values)} <= {value for _, value in curve}


def test_several_directories_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs and sweeps together, each once, with the keys in which they differ; the page goes where one stands."""
    write_run(here / "a", [training_row(1, 1.0)], overrides=["training.seed=3"])
    write_run(here / "b" / "0", [training_row(1, 1.0)], overrides=["training.seed=4"])
    code, out, _ = report(capsys, "a", "b", "./a")
    assert code == 0
    assert out.startswith("report.html  (2 runs, ")
    page = read_page(here / "report.html")
    assert [run["name"] for run in page.data["runs"]] == ["a  seed=3", "b/0  seed=4"]
    assert page.tables[-1] == [["key", "a", "b/0"], ["training.seed", "3", "4"]]


def test_many_differences_do_not_make_the_table_endless(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight keys have a column, all have a row below, and where a run is and whom it tells is no difference."""
    other = [f"model.{key}={value}" for key, value in (("dim", 64), ("n_layers", 2), ("n_heads", 4), ("ffn_dim", 128))]
    other += [f"training.{key}=3" for key in ("steps", "seq_len", "seed", "local_batch_size", "gc_interval")]
    write_run(here / "two" / "0", [training_row(1, 1.0)])
    write_run(here / "two" / "1", [training_row(1, 1.0)], overrides=[*other, "metrics.tensorboard=true"])
    assert report(capsys, "two", "--text", "--output", "page.html")[0] == 0
    page = read_page(here / "page.html")
    assert sum("." in title for title in page.tables[0][0]) == 8
    assert "1 more key differs" in page.words
    assert sorted(line[0] for line in page.tables[-1][1:]) == sorted(each.partition("=")[0] for each in other)


def test_a_run_that_still_goes_on_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While a process has the run's lock the page says so at the top; once it is gone, that it was killed."""
    write_run(here / "run", [training_row(1, 1.0), training_row(7, 7.0)], state="running")
    lock = here / "run" / ".lock"
    lock.write_text("")
    hold = f"import fcntl,sys; f=open({str(lock)!r},'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "1\n"
        code, out, _ = report(capsys, "run")
        owner.communicate("\n")
    assert code == 0
    assert "(step 7, still going on, " in out
    first = read_page(here / "run" / "report.html").words
    assert first.index("This run is still going on at step 7. The same command makes a newer page.") < 400
    assert report(capsys, "run")[0] == 0
    assert "run ended without a word, after step 7" in read_page(here / "run" / "report.html").words


def test_a_failed_run_says_why_at_the_top(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reason in status.json is the first thing to read."""
    write_run(here / "run", [training_row(1, 1.0)], state="failed", why="NonFiniteError: step 2")
    report(capsys, "run")
    assert "run failed: NonFiniteError: step 2" in read_page(here / "run" / "report.html").words


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m"


def test_no_text_of_a_run_becomes_part_of_the_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, config, events, samples and reasons are shown as they are, and are never elements or scripts."""
    evil = EVIL.replace("/", "|")
    events = [{"time": EVIL, "event": EVIL, EVIL: EVIL}, {"time": "2026-01-01T00:00:00+00:00", "event": "start"}]
    samples = [{"step": EVIL, "prompt": EVIL, "text": EVIL}, {"text": None}, {}]
    for name in (evil, f"{evil}2"):
        write_run(here / "all" / name, [training_row(1, 1.0)], events, "failed", (), samples, why=EVIL)
        config = here / "all" / name / "config.yaml"
        config.write_text(config.read_text().replace("name: llama3_1_8b", f"name: {json.dumps(EVIL + name[-1])}"))
        assert "alert(1)" in config.read_text()
    for path in (Path("all") / evil, Path("all")):
        assert report(capsys, path)[0] == 0
        page = read_page(path / "report.html")
        assert page.count("script") == 2
        assert page.count("img") == 0
        assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert "<img src=x onerror=alert(2)>" in page.words
        assert EVIL in page.words
    code, out, _ = report(capsys, Path("all") / evil, "--text")
    assert code == 0
    assert "\x1b" not in out


def test_a_page_asks_for_nothing_from_elsewhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No address, no file: it is whole by itself, and its policy would let nothing in."""
    eventful_run(here / "run", steps=300)
    report(capsys, "run")
    page = read_page(here / "run" / "report.html")
    assert not any({"src", "href", "srcset", "action"} & set(attributes) for _, attributes in page.elements)
    assert not re.search(r"url\(|@import|https?://", page.text)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], ["rnu: there is no such directory", "Try  run"]),
        (["empty"], ["is empty: no run has written there"]),
        (["other"], ["is not a run's directory", "run.dir=..."]),
        (["run", "--output", "empty"], ["empty cannot be written: it is a directory", "Try  --output"]),
        (["run", "--output", "other/notes.txt/page.html"], ["cannot be written", "Try  --output"]),
    ],
)
def test_a_newcomers_mistake_ends_with_2_and_what_to_type(
    arguments: list[str], said: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, and nothing is written."""
    for name in ("empty", "other"):
        (here / name).mkdir()
    (here / "other" / "notes.txt").write_text("")
    write_run(here / "run", [training_row(1, 1.0)])
    before = sorted(here.rglob("*"))
    code, out, err = report(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    for text in said:
        assert text in err
    assert sorted(here.rglob("*")) == before


def test_a_run_that_has_logged_nothing_has_a_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says so, and shows the config."""
    write_run(here / "run", [], state="failed", why="DataError: no text")
    assert report(capsys, "run")[0] == 0
    page = read_page(here / "run" / "report.html")
    assert "run has logged no step yet. It says: DataError: no text" in page.words
    assert "n_kv_heads" in page.words


@pytest.mark.parametrize("damage", ["config.yaml", "status.json", "events.jsonl"])
def test_a_damaged_file_hides_no_other(damage: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where one file is garbled or gone, the page shows the rest."""
    for name, content in (("garbled", b"\xff{[\n"), ("gone", None)):
        run = eventful_run(here / name, steps=300)
        if content is None:
            (run / damage).unlink()
        else:
            (run / damage).write_bytes(content)
        assert report(capsys, name)[0] == 0, name
        assert len(read_page(run / "report.html").curve("loss")) > 200


def test_a_page_can_be_put_elsewhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--output takes a path, whose folder is made; a reader sees a whole page or none."""
    write_run(here / "run", [training_row(1, 1.0)])
    assert report(capsys, "run", "--output", "pages/one.html")[0] == 0
    assert [path.name for path in (here / "pages").iterdir()] == ["one.html"]
    assert not (here / "run" / "report.html").exists()


def test_the_terminal_shows_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run as curves and times, a sweep as a table, best first; no page unless it is asked for."""
    eventful_run(here / "run", steps=300)
    code, out, _ = report(capsys, "run", "--text")
    assert code == 0
    assert out.startswith("run  complete, step 300 of 300\nTraining loss")
    assert "goodput" in out
    assert "█" in out
    assert not (here / "run" / "report.html").exists()
    sweep(here / "sweep", points=3, rows=30)
    code, out, _ = report(capsys, "sweep", "--text", "--output", "page.html")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["run", "1", "0", "2"]
    assert (here / "page.html").exists()


def test_the_command_imports_no_torch(here: Path, cache: Path) -> None:
    """It answers at once, also on a machine without PyTorch's weight."""
    write_run(here / "run", [training_row(1, 1.0)])
    code = (
        "import sys; from titan.report.__main__ import main; code = main(['run']);"
        "print(sorted({'torch', 'numpy', 'pandas', 'hydra'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=clean_environment(cache), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_run_directory_that_cannot_be_written_to_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another user's run can be looked at all the same, with --output."""
    run = write_run(here / "run", [training_row(1, 1.0)])
    (run / "report.html").mkdir()
    assert stat.S_ISDIR(os.stat(run / "report.html").st_mode)
    code, _, err = report(capsys, "run")
    assert code == 2
    assert "Try  --output /tmp/report.html" in err


def test_thinning_keeps_what_one_looks_for() -> None:
    """First, last and every stretch's extremes, in order; a short curve is left alone."""
    steps, values = list(range(1, 10_001)), [math.sin(step / 50) for step in range(1, 10_001)]
    values[4321], values[8765] = 99.0, -99.0
    thinned = list(zip(*thin((steps, values), 300), strict=True))
    assert len(thinned) <= 300
    assert thinned == sorted(thinned)
    assert {(4322, 99.0), (8766, -99.0), (1, values[0]), (10_000, values[-1])} <= set(thinned)
    assert thin((steps[:300], values[:300]), 300) == (steps[:300], values[:300])


def test_means_are_of_equal_stretches() -> None:
    """Every value counts once."""
    steps, values = average((list(range(10)), [float(value) for value in range(10)]), 5)
    assert values == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert steps == [1, 3, 5, 7, 9]


def test_axes_have_round_ticks() -> None:
    """Multiples of 1, 2 or 5 within the range; powers of ten on a logarithmic axis, equal ratios equally far apart."""
    assert round_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert round_ticks(2.13, 2.31, 4) == pytest.approx([2.15, 2.2, 2.25, 2.3])
    assert log_ticks(0.5, 2000, 5) == [1, 10, 100, 1000]
    assert log_ticks(1.5, 8, 5) == [2, 5]
    axis = Axis(1, 100, 0, 10, is_log=True)
    assert axis.at(10) == pytest.approx(5)
    numbers = {
        0: "0",
        12_000: "12k",
        3.5e6: "3.5M",
        2e-4: "2e-4",
        0.25: "0.25",
        -3: "-3",
        999.9: "999.9",
        123.4: "123.4",
    }
    assert {number: format_number(number) for number in numbers} == numbers
