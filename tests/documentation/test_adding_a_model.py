"""docs/adding_a_model.md: the module and the shape that it shows are a family of models that titan trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import Command as Titan
from tests.support.command import REPOSITORY, TINY
from titan.config.load import compose
from titan.models.family import ModelFamily, load_family

from .commands import blocks, commands_of

PAGE = REPOSITORY / "docs" / "adding_a_model.md"


@pytest.fixture
def written(here: Path) -> Path:
    """A folder with the files of the page."""
    texts = {block.language: block.text for block in blocks(PAGE) if block.language}
    (here / "my_gpt.py").write_text(texts["python"])
    shape = here / "my_configs" / "model" / "my_gpt.yaml"
    shape.parent.mkdir(parents=True)
    assert texts["yaml"].startswith(f"# {shape.relative_to(here)}\n")
    shape.write_text(texts["yaml"])
    return here


@pytest.fixture
def family(written: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFamily:
    """The family of the page."""
    monkeypatch.syspath_prepend(str(written))
    monkeypatch.delitem(sys.modules, "my_gpt", raising=False)
    return load_family("my_gpt:MY_GPT")


def test_the_description_of_the_page_fits_its_model(family: ModelFamily, written: Path) -> None:
    """Every parameter is counted, drawn, and cut by tensor parallelism; nothing sees a later token."""
    config = compose(["model=my_gpt"], str(written / "my_configs")).model
    shapes = family.parameter_shapes(config)
    assert sum(shape.numel() for shape in shapes.values()) == family.count_parameters(config)
    assert [name for name in shapes if family.cut_of(name.rpartition(".")[0]) is None] == []
    model = family.build(config, 16)
    model.init_buffers("cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawing = family.draw(name, config)
        if drawing is None:
            torch.nn.init.ones_(parameter)
        else:
            drawing(parameter.data, generator)
    tokens = torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 9] = 77
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any()


def test_the_page_trains(titan_process: Titan, written: Path, text_file: Path) -> None:
    """The command of the page trains the model, here a smaller one on a smaller text."""
    command = next(command for block in blocks(PAGE) for command in commands_of(block))
    variable, *typed = command.words
    name, _, value = variable.partition("=")
    smaller = [text for text in TINY if not text.startswith("model.n_layers")]
    overrides = [*smaller, f"data.path={text_file}", "run.dir=run", "metrics.log_every=1"]
    finished = titan_process(*typed[3:], *overrides, **{name: value})
    assert finished.code == 0, finished.text
    assert "my_gpt" in finished.out
    assert "done: step 2" in finished.out


@pytest.mark.slow
def test_the_page_proves_its_layouts(titan_process: Titan, written: Path, text_file: Path) -> None:
    """The second command of the page finds two tensor-parallel ranks to be the same as one process."""
    _, command = [command for block in blocks(PAGE) for command in commands_of(block)]
    variable, *typed = command.words
    name, _, value = variable.partition("=")
    overrides = ["--shrink", "data=text", f"data.path={text_file}"]
    finished = titan_process(*typed[3:], *overrides, module="titan.verify", **{name: value})
    assert finished.code == 0, finished.text
    assert "verdict: the same" in finished.out
