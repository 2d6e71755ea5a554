"""Samples of whole runs: what is written down, once whatever happens, and that training does not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.support.command import json_lines, results, validations
from titan.checkpoint.canonical import state_digests
from titan.checkpoint.manifest import step_folder
from titan.errors import ConfigError, Stopped
from titan.trainer import samples, validation
from titan.trainer.build import Trainer

from .conftest import Runs

PROMPTS = ["the quick", "", "lazy\ndogs"]


@pytest.fixture
def speaking(tmp_path: Path) -> tuple[str, ...]:
    """What validates every third step, and lets the model speak."""
    path = tmp_path / "held_out.txt"
    path.write_text("seven lazy dogs sleep\n" * 9)
    texts = r'validation.sample_prompts=["the quick","","lazy\ndogs"]'.replace(r"\n", "\n")
    return (
        *("validation=text", f"validation.data.path={path}", "validation.interval=3"),
        *(texts, "validation.sample_tokens=5"),
    )


def rows_of(trainer: Trainer) -> list[tuple[int, str, str]]:
    """Return step, prompt and text of every sample."""
    return [(row["step"], row["prompt"], row["text"]) for row in json_lines(trainer.directory.samples)]


def test_each_validation_has_a_row_for_each_prompt(
    runs: Runs, speaking: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """With the text behind it, and a short line on the console; and the run is the run without, to the bit."""
    with caplog.at_level("INFO", "titan"):
        trainer, without = runs.train("with", *speaking), runs.train("without", *speaking[:3])
    rows = json_lines(trainer.directory.samples)
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, text) for step in (3, 6) for text in PROMPTS]
    assert all(set(row) == {"step", "prompt", "text", "time"} for row in rows)
    assert any(row["text"] for row in rows)
    shown = [line.partition(" | ")[0] for line in caplog.messages if "  sample  " in line]
    assert shown[:3] == ["step 3/6  sample  the quick", "step 3/6  sample  ", "step 3/6  sample  lazy\\ndogs"]
    assert not without.directory.samples.exists()
    assert results(trainer.directory.path) == results(without.directory.path)
    assert validations(trainer.directory.path) == validations(without.directory.path)
    ours, theirs = (state_digests(step_folder(each.directory.checkpoints, 6)) for each in (trainer, without))
    assert ours == theirs


def test_nothing_is_left_behind(runs: Runs, speaking: tuple[str, ...], share: Callable[[], None]) -> None:
    """The model computes its loss again, at its own positions; no weight is gathered and no generator has moved."""
    share()
    trainer = runs.build(runs.config("run", *speaking))
    (part,) = trainer.parts
    before, loss = torch.get_rng_state(), part.loss
    told: list[int] = []
    samples.Samples(trainer).take(3, lambda: told.append(1))
    assert told, "asked whether the run is to stop"
    assert torch.equal(torch.get_rng_state(), before)
    assert (part.loss, part.positions) == (loss, None)
    groups: list[Any] = [
        group
        for module in part.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]
    assert all(group.is_sharded for group in groups)
    assert not any(group._post_forward_indices + group.comm_ctx.post_forward_order for group in groups)


@pytest.mark.parametrize("stop_after", [2, 3, 4])
def test_no_row_comes_twice_wherever_the_run_is_stopped(runs: Runs, speaking: tuple[str, ...], stop_after: int) -> None:
    """Before a validation, at it and behind it."""
    whole = runs.train("whole", *speaking)
    stopped = runs.build(runs.config("stopped", *speaking))
    with pytest.raises(Stopped):
        runs.fit(stopped, stop_after)
    assert rows_of(runs.train("stopped", *speaking)) == rows_of(whole)


def test_no_row_comes_twice_after_a_death_in_the_midst(
    runs: Runs, speaking: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind the samples and before the validation's own row, a run does both again; going back, too."""

    def die(*given: Any) -> None:
        raise RuntimeError("a planted error")

    whole = runs.train("whole", *speaking, "checkpoint.interval=3", "checkpoint.keep_latest=0")
    with monkeypatch.context() as patched:
        patched.setattr(validation, "validation_row", die)
        with pytest.raises(RuntimeError, match="planted"):
            runs.train("run", *speaking, "checkpoint.interval=3")
    assert len(json_lines(runs.folder / "run" / "samples.jsonl")) == 3
    assert rows_of(runs.train("run", *speaking)) == rows_of(whole)
    assert rows_of(runs.train("whole", *speaking, "checkpoint.load_step=3")) == rows_of(whole)


def test_a_failure_is_a_warning(
    runs: Runs, speaking: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is, the run goes on to its end, and its numbers are the same."""
    whole = runs.train("whole", *speaking)

    def fail(*given: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(samples, "continue_rows", fail)
    trainer = runs.train("run", *speaking)
    assert "step 3: no samples: MemoryError: no room" in caplog.text
    assert results(trainer.directory.path) == results(whole.directory.path)
    assert validations(trainer.directory.path) == validations(whole.directory.path)
    assert rows_of(trainer) == []


def test_a_prompt_that_does_not_fit_is_told_before_the_first_step(runs: Runs, speaking: tuple[str, ...]) -> None:
    """In tokens, of which the front end knows nothing."""
    config = runs.config("run", *speaking[:3], f"validation.sample_prompts=[{'x' * 30}]", "validation.sample_tokens=5")
    with pytest.raises(ConfigError, match=r"a prompt of 31 tokens: x+\n.* than training\.seq_len = 32") as error:
        runs.fit(runs.build(config))
    assert "Try  validation.sample_tokens=1" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("validation=none",), "validation.sample_prompts is set, but nothing is validated"),
        (("validation.sample_tokens=0",), "validation.sample_tokens = 0 is not between 1 and 31"),
        (("validation.sample_tokens=32",), "validation.sample_tokens = 32 is not between 1 and 31"),
        (("validation.sample_temperature=-1",), "validation.sample_temperature = -1 is below 0"),
        (("validation.sample_top_p=0",), "validation.sample_top_p = 0 is not above 0 and at most 1"),
        (("validation.sample_top_p=0.9",), "validation.sample_temperature = 0 draws nothing"),
    ],
)
def test_wrong_settings_are_refused(
    runs: Runs, speaking: tuple[str, ...], overrides: tuple[str, ...], words: str
) -> None:
    """By the front end."""
    common = speaking if overrides[0] != "validation=none" else speaking[3:]
    with pytest.raises(ConfigError) as error:
        runs.config("run", *common, *overrides)
    assert words in str(error.value)
