"""launchers/skypilot/titan.yaml, read by SkyPilot itself."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from titan.errors import ConfigError, StepHung, StorageError

from .files import SKYPILOT
from .skypilot_environment import read_task


@pytest.mark.parametrize("part", ["setup", "run"])
def test_its_scripts_are_bash(part: str) -> None:
    """Bash can read both scripts; SkyPilot runs them with it."""
    script = yaml.safe_load(SKYPILOT.read_text())[part]
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What SkyPilot reads in the file, with overrides as --env gives them."""
    return read_task(SKYPILOT, tmp_path_factory.mktemp("home"), TITAN_ARGS="model=llama3_70b")


@pytest.mark.slow
def test_skypilot_reads_what_is_meant(task: dict[str, Any]) -> None:
    """Two nodes of eight H100 on the spot market, the bucket where run.dir is, and no value for any secret."""
    assert task["tasks"] == 1
    assert (task["num_nodes"], task["accelerators"], task["use_spot"]) == (2, {"H100": 8}, True)
    assert task["envs"]["TITAN_ARGS"] == "model=llama3_70b"
    assert task["mount"] == ["/shared", task["envs"]["TITAN_BUCKET"], "MOUNT"]
    assert 'run.dir="/shared/' in task["run"]
    assert task["secrets"] == {"HF_TOKEN": "", "WANDB_API_KEY": ""}


@pytest.mark.slow
def test_skypilot_recovers_by_exit_code(task: dict[str, Any]) -> None:
    """What asks to be requeued and what storage did are started again; a wrong config is not."""
    assert task["job_recovery"]["recover_on_exit_codes"] == [StorageError.exit_code, StepHung.exit_code, 75]
    assert ConfigError.exit_code not in task["job_recovery"]["recover_on_exit_codes"]
    assert task["job_recovery"]["max_restarts_on_errors"] == 0


@pytest.mark.slow
def test_skypilot_sets_the_variables_that_are_read(task: dict[str, Any]) -> None:
    """Every SKYPILOT_ variable of the script is one that SkyPilot knows."""
    read = set(re.findall(r"SKYPILOT_\w+", task["run"] + task["setup"]))
    assert len(read) == 5
    assert read - set(task["sets"]) == set()


@pytest.mark.slow
def test_only_the_missing_cloud_stops_a_launch(task: dict[str, Any]) -> None:
    """SkyPilot goes as far as to look for a cloud, and would choose machines there."""
    assert task["stopped_by"] == "NoCloudAccessError"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("num_nodes:", "num_nodse:"), ("recover_on_exit_codes:", "recover_on_exit_code:"), ("mode: MOUNT", "mode: MUONT")],
)
def test_a_misspelt_field_is_refused(tmp_path: Path, right: str, wrong: str) -> None:
    """A letter wrong is found: SkyPilot's schema can say no."""
    spoilt = tmp_path / "titan.yaml"
    spoilt.write_text(SKYPILOT.read_text().replace(right, wrong))
    assert spoilt.read_text() != SKYPILOT.read_text()
    assert "refused" in read_task(spoilt, tmp_path)
