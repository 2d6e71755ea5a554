"""What is installed, and the settings that programs inherit. Imports no torch: that may be what is broken."""

from __future__ import annotations

import locale
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from titan.config.load import compose, conf_dir
from titan.doctor.finding import Finding, note, ok, problem
from titan.errors import TitanError

LEAST_PYTHON = (3, 11)
LEAST_TORCH = Version("2.11")
OPTIONAL = {
    "tensorboard": "to watch metrics in TensorBoard",
    "transformers": "to read exported checkpoints",
    "pandas": "for titan.metrics(...).to_pandas()",
    "llama-models": "for the tests against Meta's tokenizer",
    "hydra-optuna-sweeper": "for sweeps that learn from losses",
}
"""Packages that titan does without, and what they are for."""


def version_of(package: str) -> Version | None:
    """Return a package's version, or None where it is not installed."""
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def find_python() -> Iterator[Finding]:
    """Look at the interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < LEAST_PYTHON:
        yield problem("python", f"{version}; titan needs 3.11 or later", "make an environment with a newer Python")
    else:
        yield ok("python", f"{version}, {sys.executable}")


def find_packages() -> Iterator[Finding]:
    """Look at what titan requires, and at what it can use."""
    torch = version_of("torch")
    if torch is None:
        yield problem("torch", "is not installed", "pip install -c constraints.txt -e .")
    elif torch.release < LEAST_TORCH.release:
        yield problem("torch", f"{torch}; titan needs {LEAST_TORCH} or later", f"pip install 'torch>={LEAST_TORCH}'")
    else:
        yield ok("torch", str(torch))
    wrong = []
    for text in metadata.requires("titan") or []:
        wanted = Requirement(text)
        if wanted.name == "torch" or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        found = version_of(wanted.name)
        if found is None:
            wrong.append(f"{wanted.name} is not installed")
        elif not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found}, but titan needs {wanted.specifier}")
    if wrong:
        yield problem("packages", "; ".join(wrong), "pip install -c constraints.txt -e .")
    else:
        yield ok("packages", "all that titan requires is here, in versions that it takes")
    there = {name: version_of(name) for name in OPTIONAL}
    missing = [f"{name} ({OPTIONAL[name]})" for name, version in there.items() if version is None]
    have = ", ".join(f"{name} {version}" for name, version in there.items() if version is not None)
    if missing:
        advice = "pip install NAME   for what you want of it"
        yield note("optional", f"not installed: {', '.join(missing)}" + (f"; here: {have}" if have else ""), advice)
    else:
        yield ok("optional", have)


def find_conf() -> Iterator[Finding]:
    """See that titan finds its own config groups, and that they compose."""
    try:
        config = compose()
    except TitanError as error:
        yield problem("conf", str(error), "install titan anew: its folder conf/ is not whole")
        return
    yield ok("conf", f"{conf_dir()}, which gives {config.model.name}")


def find_compiler() -> Iterator[Finding]:
    """Look for what torch.compile compiles with: C++ for a CPU, C for Triton's launchers on a GPU."""
    advice = "apt-get install g++   or  export CXX=/path/to/g++; until then, without compile=inductor"
    command = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if command is None or shutil.which(command.split()[0]) is None:
        named = f": CXX is {command}, which is not there" if command else ""
        yield note("compiler", f"no C++ compiler, which compile=inductor needs{named}", advice)
        return
    done = subprocess.run(
        [*command.split(), "-x", "c++", "-fsyntax-only", "-"],
        input="#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[0]
        yield note("compiler", f"{command} does not compile a small program: {said}", advice)
    elif not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        yield note("compiler", f"{command}; Python.h is missing, which Triton needs", "apt-get install python3-dev")
    else:
        yield ok("compiler", command)


def find_locale() -> Iterator[Finding]:
    """See that text files are read as UTF-8."""
    encoding = locale.getpreferredencoding(False)
    if re.sub("[-_]", "", encoding).lower() != "utf8":
        what = f"text is read as {encoding}, and not as UTF-8; configs and tokenizers are UTF-8"
        yield problem("locale", what, "export LC_ALL=C.UTF-8   or  PYTHONUTF8=1")
    else:
        yield ok("locale", encoding)
