"""Spikes: what a run does about a loss that is no number, and that a resumed run does the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Command
from tests.support.command import FAULT, TINY, json_lines, results
from titan.checkpoint.canonical import state_digests
from titan.checkpoint.manifest import step_folder
from titan.config.schema import FaultToleranceConfig
from titan.errors import NonFiniteError, Stopped
from titan.run_directory import RunDirectory
from titan.trainer.build import Trainer
from titan.trainer.loop import fit
from titan.trainer.watchdog import Watchdog

from .conftest import Runs


def nan_at(*steps: int) -> Callable[[Trainer], None]:
    """Plant a loss that is no number in some steps, counted from 1."""

    def plant(trainer: Trainer) -> None:
        run = trainer.forward_backward

        def spoiled(batches, valid_tokens):
            loss = run(batches, valid_tokens)
            return loss * math.nan if trainer.state.step + 1 in steps else loss

        trainer.forward_backward = spoiled

    return plant


def state_of(trainer: Trainer) -> dict[str, str]:
    """Return the digests of a run's last checkpoint."""
    return state_digests(step_folder(trainer.directory.checkpoints, trainer.state.step))


def test_without_an_option_the_run_stops_and_no_weight_has_moved(runs: Runs) -> None:
    """Exit code 71 with the step; what was saved before is there."""
    trainer = runs.build(runs.config("run", "checkpoint.interval=3"))
    nan_at(4)(trainer)
    with pytest.raises(NonFiniteError, match="step 4: the loss is nan; no weight was moved") as caught:
        runs.fit(trainer)
    assert caught.value.exit_code == 71
    assert trainer.directory.read_ledger() == []
    assert [event["action"] for event in trainer.directory.read_events("spike")] == ["stop"]
    # the weights, and the optimizer's state, are those that were saved right before
    again = runs.build(runs.config("run", "checkpoint.interval=3"))
    assert again.state.step == trainer.state.step == 3
    for (name, now), (_, before) in zip(trainer.parameters, again.parameters, strict=True):
        assert torch.equal(now, before), name
        for key, value in trainer.optimizer.state[now].items():
            assert torch.equal(value, again.optimizer.state[before][key]), (name, key)


def test_a_batch_that_is_skipped_leaves_no_trace_in_the_weights(runs: Runs) -> None:
    """The step counts and its batch is gone: its rows come in no other step, its weights are those of before."""
    trainer = runs.train("run", "fault_tolerance.on_spike=skip", change=nan_at(3))
    rows = json_lines(trainer.directory.metrics)
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6]
    ((row),) = trainer.directory.read_ledger()
    assert (row["first_step"], row["last_step"], row["loss"]) == (3, 3, "nan")
    assert trainer.state.tokens == 5 * trainer.tokens_per_step
    whole = runs.train("whole")
    assert results(whole.directory.path)[:2] == results(trainer.directory.path)[:2]
    assert results(whole.directory.path)[3] != results(trainer.directory.path)[2]


@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
@pytest.mark.parametrize("stop_after", [2, 5])
def test_a_resumed_run_obeys_the_ledger(runs: Runs, on_spike: str, stop_after: int) -> None:
    """Stopped before the spike or after it, and without it the second time, a run leaves out the same batches."""
    options = (f"fault_tolerance.on_spike={on_spike}", "checkpoint.keep_latest=0")
    whole = runs.train("whole", *options, change=nan_at(4))
    first = runs.build(runs.config("stopped", *options))
    nan_at(4)(first)
    with pytest.raises(Stopped):
        runs.fit(first, stop_after)
    second = runs.train("stopped", *options, change=nan_at(4) if stop_after < 4 else lambda trainer: None)
    assert results(second.directory.path) == results(whole.directory.path)
    assert state_of(second) == state_of(whole)
    # and once more, from a checkpoint before the spike, with nothing planted: the ledger alone decides
    again = runs.train("stopped", *options, "checkpoint.load_step=2")
    assert results(again.directory.path) == results(whole.directory.path)
    assert state_of(again) == state_of(whole)


def test_rolling_back_goes_to_the_last_checkpoint_and_skips_from_there(runs: Runs) -> None:
    """A spike in step 4 after a checkpoint of step 2: steps 3 and 4 are left out, and their rows of metrics go."""
    trainer = runs.train("run", "fault_tolerance.on_spike=rollback", change=nan_at(4))
    assert [row["step"] for row in json_lines(trainer.directory.metrics)] == [1, 2, 5, 6]
    ((row),) = trainer.directory.read_ledger()
    assert (row["first_step"], row["last_step"]) == (3, 4)
    # the same as a run that was told beforehand
    told = runs.build(runs.config("told", "fault_tolerance.on_spike=rollback"))
    told.directory.append_ledger({"first_step": 3, "last_step": 4})
    runs.fit(told)
    assert results(told.directory.path) == results(trainer.directory.path)
    assert state_of(told) == state_of(trainer)


def test_rolling_back_to_the_first_step_forgets_the_moments(runs: Runs) -> None:
    """Step 0 was saved without an optimizer: what the steps since have made of it goes, and the run begins anew."""
    options = ("fault_tolerance.on_spike=rollback", "checkpoint.save_initial=true", "checkpoint.interval=100")
    trainer = runs.train("run", *options, change=nan_at(3))
    ((row),) = trainer.directory.read_ledger()
    assert (row["first_step"], row["last_step"]) == (1, 3)
    told = runs.build(runs.config("told", *options))
    told.directory.append_ledger({"first_step": 1, "last_step": 3})
    runs.fit(told)
    assert results(told.directory.path) == results(trainer.directory.path)
    assert state_of(told) == state_of(trainer)


def test_rolling_back_needs_a_checkpoint(runs: Runs) -> None:
    """Without one the run stops, and says so."""
    with pytest.raises(NonFiniteError, match="there is no checkpoint to go back to"):
        runs.train("run", "fault_tolerance.on_spike=rollback", change=nan_at(1))


def test_spikes_without_end_end_the_run(runs: Runs) -> None:
    """After max_spikes, those of earlier attempts included, the run stops."""
    options = ("fault_tolerance.on_spike=skip", "fault_tolerance.max_spikes=2")
    with pytest.raises(NonFiniteError, match=r"step 5: .* there were 2 before: fault_tolerance\.max_spikes"):
        runs.train("run", *options, change=nan_at(2, 3, 5))
    with pytest.raises(NonFiniteError, match="step 6"):
        runs.train("run", *options, change=nan_at(6))


def test_a_norm_above_its_limit_is_a_spike(runs: Runs) -> None:
    """spike_grad_norm: a finite step too large is treated alike."""
    norms = [norm for _, _, norm in results(runs.train("whole").directory.path)]
    limit = max(norms) * 0.999
    trainer = runs.train("run", "fault_tolerance.on_spike=skip", f"fault_tolerance.spike_grad_norm={limit}")
    first = next(row for row in trainer.directory.read_ledger())
    assert first["first_step"] == next(step for step, norm in enumerate(norms, 1) if norm > limit)
    assert float(first["grad_norm"]) > limit


@pytest.mark.parametrize("on_spike", ["skip", pytest.param("stop", marks=pytest.mark.slow)])
def test_all_ranks_find_the_spike_of_one(titan_process: Command, here: Path, text_file: Path, on_spike: str) -> None:
    """A number that is wrong on one tensor-parallel rank alone: both leave the step out, or both stop."""
    finished = titan_process(
        *(*TINY, f"data.path={text_file}", "run.dir=run", "cluster.devices_per_node=2", "parallelism.tp=2"),
        *("training.steps=5", f"fault_tolerance.on_spike={on_spike}", "metrics.log_every=1"),
        PYTHONPATH=str(FAULT),
        PLANTED_FAULT="nan:1:step:3",
    )
    assert finished.code == (0 if on_spike == "skip" else NonFiniteError.exit_code), finished.text
    directory = RunDirectory(here / "run")
    if on_spike == "skip":
        assert [row["first_step"] for row in directory.read_ledger()] == [3]
        assert [step for step, _, _ in results(directory.path)] == [1, 2, 4, 5]
    else:
        # the launcher may end one rank before it has said so; whichever it is, it has not taken the step either
        logs = [directory.log(rank, 0).read_text() for rank in (0, 1)]
        assert any("no weight was moved" in text for text in logs)
        assert "no weight was moved" in finished.err
        assert [step for step, _, _ in results(directory.path)] == [1, 2]


def test_the_first_step_after_a_resume_has_its_own_limit(runs: Runs) -> None:
    """Steps that are left out do not start the clock of a steady step: the first one compiles."""
    trainer = runs.build(runs.config("run", "fault_tolerance.on_spike=skip"))
    trainer.directory.append_ledger({"first_step": 1, "last_step": 2})
    begun: list[tuple[int, str]] = []

    class Noting(Watchdog):
        def step(self, number: int) -> None:
            super().step(number)
            begun.append((number, self._stage.key))

    settings = FaultToleranceConfig(step_timeout_seconds=100, first_step_timeout_seconds=200)
    fit(trainer, Noting(settings, trainer.directory, 0, 1, 0, report=lambda hung: None))
    assert begun[:2] == [(3, "first_step_timeout_seconds"), (4, "step_timeout_seconds")]
