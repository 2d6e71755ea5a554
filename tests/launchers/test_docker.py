"""launchers/docker/Dockerfile: clean for the linter, and complete where there is no engine to build it."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ..support.command import REPOSITORY
from .files import DOCKERFILE

BAD = """\
FROM python
ADD . /app
RUN cd /app && pip install torch
RUN sudo apt-get install git
"""


def lint(path: Path) -> tuple[int, set[str]]:
    """Return hadolint's exit code and the rules that a Dockerfile breaks."""
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, timeout=60)
    return done.returncode, set(re.findall(r"\b(?:DL|SC)\d{4}\b", done.stdout + done.stderr))


def test_the_linter_has_nothing_to_say() -> None:
    """Hadolint finds no fault: the base is tagged, nothing runs as root, nothing is left in a cache."""
    assert lint(DOCKERFILE) == (0, set())


def test_the_linter_refuses_a_bad_one(tmp_path: Path) -> None:
    """Of a bad Dockerfile, the linter names the missing tag, the unpinned package, sudo, and ADD."""
    (tmp_path / "Dockerfile").write_text(BAD)
    code, rules = lint(tmp_path / "Dockerfile")
    assert code == 1
    assert {"DL3006", "DL3013", "DL3004", "DL3020"} <= rules


def instructions(name: str) -> list[list[str]]:
    """Return the words of every instruction of a kind."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    return [shlex.split(line)[1:] for line in joined.splitlines() if line.startswith(f"{name} ")]


def copied() -> list[str]:
    """Return what the Dockerfile copies out of the checkout."""
    return [source for words in instructions("COPY") for source in words[:-1] if not source.startswith("--")]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build: the last pattern that fits it or a folder of it decides."""
    ignored = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        parents = [path, *(str(parent) for parent in Path(path).parents)]
        names = [Path(each).name for each in parents] if "**/" in line else parents
        if any(fnmatch.fnmatchcase(name, pattern) for name in names if name != "."):
            ignored = not line.startswith("!")
    return ignored


def test_the_build_context_is_what_is_copied() -> None:
    """Whatever is copied is let into the build, and nothing else of the checkout is: no run, no history, no secret."""
    assert {source for source in copied() if is_ignored(source)} == set()
    outside = [".git/config", ".env", ".venv/bin/python", "runs/a/config.yaml", "tests/conftest.py", "launchers/x.pem"]
    assert [path for path in outside if not is_ignored(path)] == []
    assert is_ignored("src/titan/__pycache__/train.cpython-311.pyc")


def test_the_first_stage_builds_the_wheel(tmp_path: Path) -> None:
    """From the files that the first stage copies, and no others, comes a wheel with the code and conf/."""
    stage, _, _ = DOCKERFILE.read_text().partition("\nFROM ${BASE}\n")
    for source in " ".join(re.findall(r"^COPY (.+) \S+$", stage, re.M)).split():
        copy = shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy
        copy(REPOSITORY / source, tmp_path / source)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {"titan/train.py", "titan/conf/train.yaml"} <= inside


def test_versions_are_pinned_and_the_user_is_not_root() -> None:
    """The default base has an exact version, packages those of constraints.txt, and the last user is a number."""
    defaults = dict(words[0].split("=", 1) for words in instructions("ARG"))
    assert re.fullmatch(r"python:3\.\d+\.\d+-\w+-\w+", defaults["BASE"])
    assert "constraints.txt" in copied()
    assert "--constraint /opt/titan/constraints.txt" in DOCKERFILE.read_text()
    assert int(instructions("USER")[-1][0]) > 0


@pytest.mark.parametrize("version", re.findall(r"pytorch/pytorch:([\d.]+)-", DOCKERFILE.read_text()))
def test_the_base_with_torch_has_the_pinned_one(version: str) -> None:
    """The base shown for GPUs brings the torch of constraints.txt, or pip would replace it."""
    assert f"\ntorch=={version}\n" in (REPOSITORY / "constraints.txt").read_text()
