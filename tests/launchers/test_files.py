"""What holds for every file of launchers/: nothing secret, nothing of one machine, nothing that titan refuses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import titan
from titan.errors import ConfigError

from ..support.command import REPOSITORY
from .files import SKYPILOT, all_files, commands, overrides_in

FILES = [pytest.param(path, id=str(path.relative_to(REPOSITORY / "launchers"))) for path in all_files()]
SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,}|-----BEGIN|\b[0-9a-f]{40}\b"
    r"|(?:TOKEN|API_KEY|PASSWORD)\s*[:=]\s*[\"']?\w{8,}"  # a value, where a name, a variable or nothing would do
)
SET_BY_OTHERS = {"PATH"}


@pytest.mark.parametrize("path", FILES)
def test_no_file_holds_a_secret(path: Path) -> None:
    """Credentials come from a Secret, a flag or the environment, and are never written down."""
    assert SECRET.search(path.read_text()) is None


@pytest.mark.parametrize("planted", ["hf_" + "a1" * 10, "  WANDB_API_KEY: " + "0f" * 5, "AKIA" + "A" * 16])
def test_a_planted_secret_is_found(planted: str) -> None:
    """The search finds what it is for."""
    assert SECRET.search(planted)


@pytest.mark.parametrize("path", FILES)
def test_no_file_names_a_place_of_this_machine(path: Path) -> None:
    """What works here only, such as the checkout's own path, is in no file."""
    places = [place for place in (REPOSITORY, Path.home(), Path(sys.prefix)) if len(place.parts) > 1]
    assert [place for place in places if re.search(rf"{re.escape(str(place))}\b", path.read_text())] == []


@pytest.mark.parametrize("path", FILES)
def test_every_command_line_composes(path: Path) -> None:
    """Titan accepts the overrides of every command that a file shows or runs."""
    for overrides in overrides_in(path.read_text()):
        assert titan.compose(*overrides).run.dir


def test_every_manifest_composes() -> None:
    """Titan accepts what the manifests give it, and their run directories are on the shared volume."""
    for command in commands().values():
        overrides = command[command.index("titan.train") + 1 :]
        assert titan.compose(*overrides).run.dir.startswith("/shared/")


def test_the_command_lines_are_found_and_can_fail() -> None:
    """The search reads comments, continued lines, quotes and variables; a misspelt override does not compose."""
    shown = 'python -m titan.train model=llama3_8b \\\n#    run.dir="/shared/${TITAN_RUN:-$OTHER}" --nnodes=2 NAME=x'
    assert list(overrides_in(shown)) == [["model=llama3_8b", "run.dir=/shared/x"]]
    assert any("model=llama3_8b" in overrides for overrides in overrides_in(SKYPILOT.read_text()))
    (planted,) = overrides_in("python -m titan.train modle=llama3_8b")
    with pytest.raises(ConfigError):
        titan.compose(*planted)


@pytest.mark.parametrize("path", FILES)
def test_every_variable_is_documented(path: Path) -> None:
    """A variable that a file reads is explained in docs/, by name."""
    documented = "".join(page.read_text() for page in (REPOSITORY / "docs").glob("*.md"))
    read = set(re.findall(r"\$[{(]?([A-Z][A-Z0-9_]+)", path.read_text())) - SET_BY_OTHERS
    read = {name for name in read if not name.startswith("SLURM_")}  # SLURM's manual has them
    assert {name for name in read if not re.search(rf"`{name}`", documented)} == set()
