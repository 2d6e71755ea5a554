"""Validations of whole runs: what they find, when they come, and that they come once, wherever a run is stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from tests.support.command import json_lines, results, validations
from titan.checkpoint.canonical import state_digests
from titan.checkpoint.manifest import step_folder
from titan.data.held_out import InOrder
from titan.data.loader import Share, build_loader
from titan.errors import DataError, Stopped
from titan.models.llama import LLAMA
from titan.trainer import validation
from titan.trainer.build import Trainer
from titan.trainer.validation import validate

from .conftest import Runs

WORDS = "".join(f"{number} lazy dogs sleep\n" for number in range(40))
"""Of 750 characters: 24 rows of 32 with the two tokens around them, the last one not full."""


@pytest.fixture
def held_out(tmp_path: Path) -> tuple[str, ...]:
    """What chooses some text to validate on, every third step."""
    path = tmp_path / "held_out.txt"
    path.write_text(WORDS)
    return ("validation=text", f"validation.data.path={path}", "validation.interval=3")


def by_hand(trainer: Trainer, rows: int | None = None) -> tuple[float, int]:
    """Return the mean loss of the bare model over all tokens, and their number, without any of titan's data code."""
    config, seq_len = trainer.config.model, trainer.config.training.seq_len
    bare = LLAMA.build(config, seq_len)
    bare.init_buffers("cpu")
    bare.load_state_dict({name: p.detach() for name, p in trainer.parameters})
    tokens = torch.tensor([256, *WORDS.encode(), 257])
    tokens = tokens[: None if rows is None else rows * seq_len + 1]
    losses = []
    for start in range(0, len(tokens) - 1, seq_len):
        piece = tokens[start : start + seq_len + 1]
        losses.append(F.cross_entropy(bare(piece[None, :-1])[0], piece[1:], reduction="none"))
    return torch.cat(losses).double().mean().item(), len(tokens) - 1


def test_it_is_the_mean_over_all_rows_by_hand(runs: Runs, held_out: tuple[str, ...]) -> None:
    """Loss, perplexity and bits a byte of the last weights are what the bare model and the definitions give."""
    trainer = runs.train("run", *held_out)
    row = json_lines(trainer.directory.metrics)[-1]
    loss, tokens = by_hand(trainer)
    assert (row["step"], row["validation_tokens"]) == (6, tokens)
    assert row["validation_loss"] == pytest.approx(loss, rel=1e-6)
    assert row["validation_perplexity"] == pytest.approx(math.e**loss, rel=1e-5)
    total_bits = tokens * loss * math.log2(math.e)
    assert row["validation_bits_per_byte"] == pytest.approx(total_bits / len(WORDS.encode()), rel=1e-6)
    assert row["validation_seconds"] > 0
    assert set(row) == {
        *("step", "time", "validation_loss", "validation_perplexity", "validation_bits_per_byte"),
        *("validation_tokens", "validation_seconds"),
    }


def test_some_rows_are_the_first(runs: Runs, held_out: tuple[str, ...]) -> None:
    """validation.rows takes so many from the first on, here an odd number of them in micro-batches of two."""
    trainer = runs.train("run", *held_out, "validation.rows=5", "data.num_workers=1")
    row = json_lines(trainer.directory.metrics)[-1]
    loss, tokens = by_hand(trainer, rows=5)
    assert (row["validation_tokens"], row["validation_loss"]) == (tokens, pytest.approx(loss, rel=1e-6))
    per_token = len(WORDS.encode()) / (len(WORDS.encode()) + 2)
    assert row["validation_bits_per_byte"] == pytest.approx(loss / math.log(2) / per_token, rel=1e-6)


def test_it_comes_at_its_interval_and_after_the_last_step(runs: Runs, held_out: tuple[str, ...]) -> None:
    """Behind the step's own row; once where both fall together; not at all without an interval."""
    for steps, expected in ((7, [3, 6, 7]), (6, [3, 6]), (2, [2])):
        trainer = runs.train(f"{steps}", *held_out, f"training.steps={steps}")
        rows = [(row["step"], "loss" in row) for row in json_lines(trainer.directory.metrics)]
        wanted = [each for step in range(1, steps + 1) for each in [(step, True), (step, False)]]
        assert rows == [each for each in wanted if each[1] or each[0] in expected]
    assert validations(runs.train("off", *held_out, "validation.interval=0").directory.path) == []


def test_the_run_is_the_run_without_it(runs: Runs, held_out: tuple[str, ...]) -> None:
    """Every loss, norm, weight, moment and generator is the same to the bit."""
    without, found = runs.train("without"), runs.train("with", *held_out, "validation.interval=1")
    assert results(found.directory.path) == results(without.directory.path)
    assert len(validations(found.directory.path)) == 6
    ours, theirs = (state_digests(step_folder(each.directory.checkpoints, 6)) for each in (found, without))
    assert ours == theirs


def test_nothing_is_left_behind(runs: Runs, held_out: tuple[str, ...], share: Callable[[], None]) -> None:
    """No gradient, no weight gathered, nothing that FSDP's next backward pass would act on, no generator moved."""
    share()
    trainer = runs.build(runs.config("run", *held_out))
    assert trainer.held_out is not None
    before = torch.get_rng_state()
    validate(trainer, trainer.held_out)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for _, parameter in trainer.parameters)
    modules = [module for part in trainer.parts for module in part.modules() if isinstance(module, FSDPModule)]
    groups: list[Any] = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]

    def is_as_before() -> bool:
        noted = [group._post_forward_indices + group.comm_ctx.post_forward_order for group in groups]
        return all(group.is_sharded for group in groups) and not any(noted)

    assert is_as_before()
    (step,) = build_loader(trainer.held_out, InOrder(2), Share(2, 2, 0, 1), 0, 0, 1)
    trainer.evaluate(step.batches)
    assert not is_as_before(), "there is something to leave behind"


@pytest.mark.parametrize("stop_after", [2, 3, 4])
def test_each_is_done_once_wherever_the_run_is_stopped(runs: Runs, held_out: tuple[str, ...], stop_after: int) -> None:
    """Before one, right at one (which the run then does when it goes on) and behind one: the same rows."""
    whole = runs.train("whole", *held_out)
    stopped = runs.build(runs.config("stopped", *held_out))
    with pytest.raises(Stopped):
        runs.fit(stopped, stop_after)
    assert [step for step, *_ in validations(stopped.directory.path)] == [3] * (stop_after > 3)
    again = runs.train("stopped", *held_out)
    assert validations(again.directory.path) == validations(whole.directory.path)
    assert results(again.directory.path) == results(whole.directory.path)


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_is_stopped_in_a_validation(runs: Runs, held_out: tuple[str, ...], step: int) -> None:
    """It does not wait for the end of it, loses no step, and does it when it goes on; in the last one too."""
    whole = runs.train("whole", *held_out)
    trainer, seen, told = runs.build(runs.config("run", *held_out)), 0, 0
    evaluate = trainer.evaluate

    def stop_in_the_midst(batches: Any) -> torch.Tensor:
        nonlocal seen, told
        seen += len(batches)
        told = 15 if trainer.state.step == step else 0
        return evaluate(batches)

    trainer.evaluate = stop_in_the_midst
    with pytest.raises(Stopped) as stopped:
        runs.fit(trainer, warning=lambda: told)
    assert (stopped.value.step, stopped.value.saved_step) == (step, step)
    rounds = 12  # of two rows
    assert rounds * (step // 3 - 1) < seen < rounds * (step // 3)
    assert [each for each, *_ in validations(trainer.directory.path)] == [3] * (step // 3 - 1)
    again = runs.train("run", *held_out)
    assert validations(again.directory.path) == validations(whole.directory.path)
    assert results(again.directory.path) == results(whole.directory.path)


def test_weights_alone_are_saved_after_the_last_validation(
    runs: Runs, held_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From weights alone no run could go on and validate, so a run that dies in its last one has not saved them yet."""

    def die(*given: Any) -> None:
        raise RuntimeError("a planted error")

    config = ("checkpoint.last_content=weights", "validation.interval=100", *held_out[:2])
    with monkeypatch.context() as patched:
        patched.setattr(validation, "validate", die)
        with pytest.raises(RuntimeError, match="planted"):
            runs.train("run", *config)
    assert runs.build(runs.config("run", *config)).state.step == 4
    assert [step for step, *_ in validations(runs.train("run", *config).directory.path)] == [6]


def test_going_back_to_a_step_repeats_no_row(runs: Runs, held_out: tuple[str, ...]) -> None:
    """With load_step the rows behind it go, validations too, and come again; its own stays."""
    first = runs.train("run", *held_out, "checkpoint.interval=3", "validation.interval=1", "checkpoint.keep_latest=0")
    before = validations(first.directory.path)
    again = runs.train("run", *held_out, "validation.interval=1", "checkpoint.load_step=3", "checkpoint.keep_latest=0")
    assert validations(again.directory.path) == before
    assert len(before) == 6


def test_a_spike_that_takes_the_run_back_repeats_no_row(runs: Runs, held_out: tuple[str, ...]) -> None:
    """After a rollback the steps that are left out are validated as any: the run stands there with its weights."""

    def spike(trainer: Trainer) -> None:
        run, fresh = trainer.forward_backward, [True]

        def step(*given: Any) -> torch.Tensor:
            loss = run(*given)
            if trainer.state.step == 3 and fresh:
                fresh.clear()
                return loss * float("nan")
            return loss

        trainer.forward_backward = step

    options = ("fault_tolerance.on_spike=rollback", "validation.interval=1", *held_out[:2])
    trainer = runs.train("run", *options, change=spike)
    rows = validations(trainer.directory.path)
    assert [step for step, *_ in rows] == [1, 2, 3, 4, 5, 6]
    losses = [loss for _, loss, _ in rows]
    assert losses[1] == losses[2] == losses[3], "steps 3 and 4 were left out"


def test_its_time_is_not_that_of_training(runs: Runs, held_out: tuple[str, ...]) -> None:
    """Steps between two validations take on paper what they take without."""
    clock = [0.0]

    def taking(seconds: float, work: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def slow(*given: Any) -> torch.Tensor:
            clock[0] += seconds
            return work(*given)

        return slow

    def wait(trainer: Trainer) -> None:
        trainer.forward_backward = taking(1, trainer.forward_backward)
        trainer.evaluate = taking(100, trainer.evaluate)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.perf_counter", lambda: clock[0])
        trainer = runs.train("run", *held_out, change=wait)
    rows = json_lines(trainer.directory.metrics)
    assert [row["step_seconds"] for row in rows if "loss" in row][1:] == [1.0] * 5, "the first began by the real clock"
    assert [row["validation_seconds"] for row in rows if "loss" not in row] == [300.0] * 2, "in three parts"


def test_a_loss_that_is_no_number_is_null_and_told(
    runs: Runs, held_out: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """JSON has no NaN; the run goes on, for no weight is concerned."""

    def spoil(trainer: Trainer) -> None:
        trainer.evaluate = lambda batches: torch.tensor(float("nan"), dtype=torch.float64)

    trainer = runs.train("run", *held_out, change=spoil)
    row = json_lines(trainer.directory.metrics)[-1]
    assert row["validation_loss"] is row["validation_perplexity"] is row["validation_bits_per_byte"] is None
    assert "step 6: the validation loss is nan" in caplog.text
    assert "NaN" not in trainer.directory.metrics.read_text()


def test_text_without_anything_to_predict_is_told(runs: Runs, held_out: tuple[str, ...]) -> None:
    """Where no label counts there is no mean: bad data, with what to do about it."""
    trainer = runs.build(runs.config("run", *held_out))
    assert trainer.held_out is not None
    trainer.held_out.count = 0
    with pytest.raises(DataError, match=r"validation\.data has no token to predict"):
        validate(trainer, trainer.held_out)
