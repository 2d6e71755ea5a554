"""What is in examples/ runs, and gives what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.notebook import NOTEBOOK, outputs_of
from tests.support.command import REPOSITORY, TINY, clean_environment, results

LOOP = REPOSITORY / "examples" / "own_loop.py"


def run_loop(here: Path, cache: Path, launcher: list[str], *overrides: str) -> list[tuple[int, float, float]]:
    """Run the loop; returns step, loss and norm of what it printed."""
    command = [sys.executable, *launcher, str(LOOP), *TINY, *overrides]
    done = subprocess.run(
        command, cwd=here, env=clean_environment(cache), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    return [(int(line[1]), float(line[3]), float(line[5])) for line in words]


def test_a_loop_of_ones_own_is_titans_run(here: Path, cache: Path, text_file: Path, trained: Path) -> None:
    """Losses and norms are those of `python -m titan.train` with the same config, to all digits that it prints."""
    own = run_loop(here, cache, [], f"data.path={text_file}")
    assert own == [(step, round(loss, 6), round(norm, 6)) for step, loss, norm in results(trained)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallelism.tp=2", "parallelism.pp=2", "parallelism.cp=2"])
def test_a_loop_of_ones_own_runs_on_any_layout(
    layout: str, here: Path, cache: Path, text_file: Path, trained: Path
) -> None:
    """Under torchrun, with two processes, it gives what one process gives."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    own = run_loop(here, cache, [*torchrun, "--rdzv-endpoint", "localhost:0"], f"data.path={text_file}", layout)
    assert [step for step, _, _ in own] == [step for step, _, _ in results(trained)]
    for (_, loss, norm), (_, other, other_norm) in zip(own, results(trained), strict=True):
        assert loss == pytest.approx(other, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)


def test_a_mistake_in_a_loop_of_ones_own_is_one_message(here: Path, cache: Path) -> None:
    """As of the command, and no traceback."""
    done = subprocess.run(
        [sys.executable, str(LOOP), "training.stps=1"],
        cwd=here,
        env=clean_environment(cache),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert "Nearest: training.steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_committed_notebook_was_run_from_top_to_bottom() -> None:
    """Every cell has its number in order, and none an error."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


@pytest.mark.slow
def test_the_outputs_in_the_notebook_are_what_it_gives(cache: Path) -> None:
    """Run in a kernel of its own: all outputs are equal, but for the numbers of cells that measure."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.examples.notebook"],
        cwd=REPOSITORY,
        env=clean_environment(cache),
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert json.loads(done.stdout.splitlines()[-1]) == [outputs_of(cell) for cell in cells]
