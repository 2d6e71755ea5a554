"""`titan.compose` where Hydra is used by others too: nested, in threads, and beside a user's own groups."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase

import titan
from titan.errors import ConfigError


@pytest.fixture
def other_app(tmp_path: Path) -> Iterator[Path]:
    """The config folder of another application of Hydra's."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "app.yaml").write_text("greeting: hello\n")
    yield folder
    GlobalHydra.instance().clear()


def test_inside_another_application_of_hydras(other_app: Path) -> None:
    """A config is composed, and the other application goes on as if it had not: its groups, its version, its name."""
    with hydra.initialize_config_dir(str(other_app), job_name="other", version_base="1.2"):
        before = GlobalHydra.instance().hydra
        assert titan.compose("training.steps=7").training.steps == 7
        assert GlobalHydra.instance().hydra is before
        assert hydra.compose("app").greeting == "hello"
        assert str(VersionBase.instance().getbase()) == "1.2"
        assert JobRuntime.instance().get("name") == "other"


def test_a_mistake_leaves_the_other_application_as_it_was(other_app: Path) -> None:
    """Also where composing fails."""
    with hydra.initialize_config_dir(str(other_app), version_base=None):
        with pytest.raises(ConfigError, match=r"training\.stps"):
            titan.compose("training.stps=7")
        assert hydra.compose("app").greeting == "hello"


def test_before_and_after_another_application(other_app: Path) -> None:
    """Nothing is left behind that another `initialize` would stumble over."""
    GlobalHydra.instance().clear()
    first = titan.compose()
    assert not GlobalHydra.instance().is_initialized()
    with hydra.initialize_config_dir(str(other_app), version_base="1.3"):
        assert hydra.compose("app").greeting == "hello"
    assert titan.diff(first, titan.compose()) == {}


def test_in_threads() -> None:
    """Every thread has its own config, whatever the others compose at the same moment."""
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = [titan.compose(f"training.steps={number * 10 + turn}").training.steps for turn in range(2)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [number * 10, number * 10 + 1] for number in range(3)}


@pytest.mark.parametrize("kind", [str, Path])
def test_with_groups_of_ones_own(tmp_path: Path, kind: type) -> None:
    """An option of the user's may inherit from titan's, and titan's are still there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [llama3_debug]\nn_layers: 3\nname: mine\n")
    mine = titan.compose("model=mine", config_dir=kind(tmp_path))
    assert (mine.model.n_layers, mine.model.dim) == (3, titan.compose().model.dim)
    assert titan.compose("model=llama3_8b", config_dir=kind(tmp_path)).model.n_layers == 32
    with pytest.raises(ConfigError, match="mine"):
        titan.compose("model=mine")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Is said, with its path."""
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        titan.compose("model=mine", config_dir=tmp_path / "nowhere")
