"""docs/python.md and docs/doctor.md: what they show runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import titan
from tests.support.command import REPOSITORY, clean_environment
from titan.api.run import Run


def blocks(page: str, language: str) -> list[str]:
    """Return the blocks of code of a page of docs/, of one language."""
    text = (REPOSITORY / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_page_on_python_names_all_public_names() -> None:
    """Those of titan, and those of a handle."""
    text = (REPOSITORY / "docs" / "python.md").read_text()
    missing = [name for name in titan.__all__ if not name.startswith("_") and f"`titan.{name}(" not in text]
    missing += [name for name in vars(Run) if not name.startswith("_") and f"run.{name}" not in text]
    assert not missing


@pytest.mark.slow
def test_the_code_of_the_page_on_python_runs(here: Path, cache: Path) -> None:
    """From top to bottom, as one program in an empty folder; its assertions hold."""
    program = "\n".join(blocks("python.md", "python"))
    assert program.count("assert") > 5
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=here,
        env=clean_environment(cache),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_commands_of_the_page_on_the_doctor_run(here: Path, cache: Path) -> None:
    """And every finding that they give is in the page's table."""
    found: set[str] = set()
    commands = [line for block in blocks("doctor.md", "") for line in block.splitlines()]
    assert len(commands) == 2
    for line in commands:
        words = shlex.split(line)
        assert words.pop(0) == "python"
        done = subprocess.run(
            [sys.executable, *words],
            cwd=here,
            env=clean_environment(cache),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        found |= set(re.findall(r'"check": "(\w+)"', done.stdout))
    table = (REPOSITORY / "docs" / "doctor.md").read_text()
    assert found
    assert not [name for name in found if f"`{name}`" not in table]
