"""What a user installs: the wheel brings everything that composing a config needs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .support.command import REPOSITORY, clean_environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_every_module_and_every_group(wheel: Path) -> None:
    """Nothing of src/ and conf/ is left behind, and nothing else comes along."""
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source, conf = REPOSITORY / "src", REPOSITORY / "conf"
    expected = {str(path.relative_to(source)) for path in source.rglob("*") if path.suffix in (".py", ".cpp")}
    expected |= {f"titan/conf/{path.relative_to(conf)}" for path in conf.rglob("*.yaml")}
    assert inside - {"titan/py.typed"} == expected


ISOLATED = """
import sys
sys.path[:0] = [sys.argv.pop(1)]
import titan.train
sys.argv[0] = "titan"
print(titan.train.__file__, titan.train.conf_dir(), file=sys.stderr)
titan.train.main()
"""


def test_an_installed_titan_composes_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """From the wheel alone, conf/ is found: `--cfg job` composes a shipped experiment."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True, timeout=120)
    assert (site / "bin" / "titan").is_file()

    # -I keeps PYTHONPATH and the folder stood in out; the editable install of the checkout comes after `site`.
    typed = ["experiment=llama3_8b_8gpu", "--cfg", "job"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED, str(site), *typed],
        cwd=elsewhere,
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == [f"{site}/titan/train.py", f"{site}/titan/conf"]
    assert "name: llama3_1_8b" in done.stdout
    assert os.listdir(elsewhere) == []
