"""Runs that save, stop and go on: what the trainer makes of the checkpoint options."""

from __future__ import annotations

import errno
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo

from tests.support.command import json_lines, results
from titan.checkpoint.canonical import state_digests
from titan.checkpoint.files import TensorInfo, read_metadata, tensor_infos
from titan.checkpoint.manifest import Manifest, committed_steps, step_folder
from titan.checkpoint.state import MODEL, OPTIMIZER
from titan.config.schema import FaultToleranceConfig
from titan.errors import CheckpointError, ConfigError, Stopped, StorageError
from titan.launch.dispatch import Frozen, freeze
from titan.models.llama import LLAMA
from titan.run_directory import RunDirectory
from titan.trainer import loop, saving
from titan.trainer.build import Trainer
from titan.trainer.loop import fit
from titan.trainer.watchdog import Watchdog

from .conftest import Runs


def steps_of(trainer: Trainer) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return committed_steps(trainer.directory.checkpoints)


def state_of(trainer: Trainer, step: int) -> dict[str, str]:
    """Return the digests of a run's checkpoint."""
    return state_digests(step_folder(trainer.directory.checkpoints, step))


@pytest.mark.parametrize("mode", ["sync", "async", "async_pinned"])
@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_run_that_was_stopped_anywhere_is_the_undisturbed_run(runs: Runs, mode: str, stop_after: int) -> None:
    """Every loss, norm, weight and moment, to the bit; at an interval and between two, in every mode."""
    whole = runs.train("whole", "checkpoint=sync")
    first = runs.build(runs.config("stopped", f"checkpoint={mode}"))
    with pytest.raises(Stopped) as stopped:
        runs.fit(first, stop_after)
    assert stopped.value.saved_step == stop_after
    second = runs.train("stopped", f"checkpoint={mode}")
    assert results(second.directory.path) == results(whole.directory.path)
    assert state_of(second, 6) == state_of(whole, 6)
    assert second.state == whole.state


def test_it_is_known_what_a_checkpoint_is(runs: Runs) -> None:
    """The manifest says step, tokens, mesh, versions, and where in which data the next step begins."""
    trainer = runs.train("run")
    manifest = Manifest.read(step_folder(trainer.directory.checkpoints, 4))
    assert (manifest.step, manifest.content, manifest.tokens) == (4, "all", 4 * trainer.tokens_per_step)
    assert manifest.mesh == {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.data == {**trainer.data.identity, "rows": 4 * 2}
    assert manifest.run == trainer.directory.read_identity() != ""
    assert set(manifest.files) == {".metadata", "__0_0.distcp", "config.yaml"}


def test_the_waiting_is_told_every_time(
    runs: Runs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log and events say how long training waited for each save: for the disk with sync, for the copy with async."""
    from titan.checkpoint import store

    write, seconds = store.write_tensors, 0.3

    def slow(*given, **named):
        time.sleep(seconds)
        return write(*given, **named)

    def slow_steps(trainer: Trainer) -> None:
        run = trainer.forward_backward

        def step(*given):
            time.sleep(seconds)
            return run(*given)

        trainer.forward_backward = step

    monkeypatch.setattr(store, "write_tensors", slow)
    caplog.set_level("INFO", "titan")
    waited = {
        mode: [event["waited_seconds"] for event in trainer.directory.read_events("save")]
        for mode in ("sync", "async")
        for trainer in [runs.train(mode, f"checkpoint={mode}", "training.steps=4", change=slow_steps)]
    }
    assert all(each >= seconds for each in waited["sync"])
    assert waited["async"][0] < seconds <= waited["async"][1], "the end waits for the last"
    assert sum("training waited" in record.getMessage() for record in caplog.records) == 4
    rows = json_lines(runs.folder / "sync" / "metrics.jsonl")
    assert sum(row["checkpoint_seconds"] for row in rows) >= seconds


def test_time_brings_a_checkpoint_too(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """interval_minutes saves between two intervals of steps; the clock begins anew with every save."""
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])

    def slow(trainer: Trainer) -> None:
        run = trainer.forward_backward

        def step(batches, valid_tokens):
            now[0] += 25  # seconds a step
            return run(batches, valid_tokens)

        trainer.forward_backward = step

    trainer = runs.train("run", "checkpoint.interval=100", "checkpoint.interval_minutes=1", change=slow)
    assert steps_of(trainer) == [3, 6]


def test_the_seed_is_the_weights_before_training(runs: Runs) -> None:
    """save_initial keeps step 0, from which another run begins as this one did, and this one can go on."""
    first = runs.train("first", "checkpoint.save_initial=true", "checkpoint.keep_latest=0")
    assert steps_of(first) == [0, 2, 4, 6]
    seed = step_folder(first.directory.checkpoints, 0)
    second = runs.train("second", f"checkpoint.initial_load={seed}", "training.seed=0")
    assert results(second.directory.path) == results(first.directory.path)
    for step in (2, 4, 6):
        shutil.rmtree(step_folder(first.directory.checkpoints, step))
    again = runs.train("first", "checkpoint.save_initial=true", "checkpoint.keep_latest=0")
    assert results(again.directory.path) == results(second.directory.path)


def test_the_last_checkpoint_can_be_weights_alone(runs: Runs) -> None:
    """last_content and last_dtype: half the bytes, no optimizer; a run can start from it but not go on."""
    trainer = runs.train("run", "checkpoint.last_content=weights", "checkpoint.last_dtype=bfloat16")
    path = step_folder(trainer.directory.checkpoints, 6)
    assert Manifest.read(path).content == "weights"
    shapes = LLAMA.parameter_shapes(trainer.config.model)
    assert tensor_infos(read_metadata(path)) == {
        f"{MODEL}{name}": TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()
    }
    other = runs.build(runs.config("other", f"checkpoint.initial_load={path}", "training.seed=9"))
    for (name, ours), (_, theirs) in zip(other.parameters, trainer.parameters, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.bfloat16().float()), name
    # more steps go on from the newest that holds everything
    further = runs.build(runs.config("run", "training.steps=8"))
    assert further.state.step == 4


def test_all_of_another_run_can_be_taken(runs: Runs) -> None:
    """initial_content=all goes on from there, with another learning rate for instance, in a folder of its own."""
    first = runs.train("first", "training.steps=4", "lr_scheduler.decay_ratio=0.0")
    second = runs.train(
        "second",
        f"checkpoint.initial_load={step_folder(first.directory.checkpoints, 4)}",
        "checkpoint.initial_content=all",
        "lr_scheduler.decay_ratio=0.0",
    )
    whole = runs.train("whole", "lr_scheduler.decay_ratio=0.0")
    assert results(second.directory.path) == results(whole.directory.path)[4:]
    assert state_of(second, 6) == state_of(whole, 6)


def test_what_is_excluded_stays_as_it_was(runs: Runs) -> None:
    """Exclude names tensors of an initial load by patterns: of the optimizer, and of the weights."""
    first = runs.train("first", "training.steps=4")
    path = step_folder(first.directory.checkpoints, 4)
    fresh = runs.build(runs.config("fresh", "training.seed=3"))
    common = (f"checkpoint.initial_load={path}", "training.seed=3")
    without = runs.build(runs.config("without", *common, "checkpoint.exclude=[model.output.*]"))
    for (name, ours), (_, trained), (_, drawn) in zip(
        without.parameters, first.parameters, fresh.parameters, strict=True
    ):
        assert torch.equal(ours, drawn if name.startswith("output.") else trained), name
    every = runs.build(
        runs.config("all", *common, "checkpoint.initial_content=all", "checkpoint.exclude=[optimizer.*]")
    )
    assert every.state.step == 4
    assert not every.optimizer.state
    # what is left out does not hide what does not fit besides
    with pytest.raises(ConfigError, match=r"model\.n_layers = 1, and it was saved with 2"):
        runs.build(runs.config("fewer", *common, "model.n_layers=1", "checkpoint.exclude=[model.output.*]"))
    # other words, other output: what does not fit can be left out
    shape = ("model.vocab_size=300", "checkpoint.exclude=[model.output.*,model.tok_embeddings.*]")
    assert runs.build(runs.config("words", *common, *shape)).state.step == 0


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("model.ffn_dim=96", "model.ffn_dim = 96, and it was saved with 64"),
        ("model.n_heads=2", "model.n_heads = 2, and it was saved with 4"),  # the same shapes of all tensors
        ("model.n_layers=3", "model.n_layers = 3, and it was saved with 2"),
    ],
)
def test_weights_of_another_shape_are_refused(runs: Runs, shape: str, words: str) -> None:
    """By the name of what differs, also where all tensors would fit: by the front end, and by the ranks themselves."""
    first = runs.train("first", "training.steps=2")
    path = step_folder(first.directory.checkpoints, 2)
    with pytest.raises(ConfigError) as told:
        runs.config("second", f"checkpoint.initial_load={path}", shape)
    assert words in str(told.value)
    unchecked = runs.config("second", shape)
    with pytest.raises(CheckpointError) as caught:
        runs.build(replace(unchecked, checkpoint=replace(unchecked.checkpoint, initial_load=str(path))))
    assert words in str(caught.value)


def test_a_damaged_initial_load_is_refused(runs: Runs) -> None:
    """It is another run's, so it is left where it is."""
    first = runs.train("first", "training.steps=2")
    path = step_folder(first.directory.checkpoints, 2)
    (path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged: __0_0\.distcp has 0 bytes"):
        runs.build(runs.config("second", f"checkpoint.initial_load={path}"))
    assert path.is_dir()
    assert not (runs.folder / "second" / "checkpoints").exists()


# -- going back ------------------------------------------------------------------------------------------------------


def test_going_back_to_a_step(runs: Runs) -> None:
    """load_step sets later checkpoints aside and goes on from there; the same command again goes on, not back again."""
    first = runs.train("run", "checkpoint.keep_latest=0")
    before = results(first.directory.path)
    back = runs.build(runs.config("run", "checkpoint.load_step=2", "checkpoint.keep_latest=0"))
    assert back.state.step == 2
    assert steps_of(back) == [2]
    assert sorted(path.name for path in back.directory.checkpoints.glob("aside_*")) == [
        "aside_step_00000004",
        "aside_step_00000006",
    ]
    with pytest.raises(Stopped):
        runs.fit(back, stop_after=5)
    again = runs.train("run", "checkpoint.load_step=2", "checkpoint.keep_latest=0")
    assert [event["step"] for event in again.directory.read_events("rewind")] == [2, 2]
    assert steps_of(again) == [2, 4, 5, 6]
    assert results(again.directory.path) == before


def test_a_step_that_is_not_there_is_refused_before_anything_moves(runs: Runs) -> None:
    """With those that are; and in a folder without a run."""
    first = runs.train("run")
    for step in ("3", "99"):
        with pytest.raises(ConfigError, match=r"has no such checkpoint\n    There are: 2, 4, 6"):
            runs.build(runs.config("run", f"checkpoint.load_step={step}"))
    assert steps_of(first) == [2, 4, 6]
    with pytest.raises(ConfigError, match="holds no run"):
        runs.build(runs.config("other", "checkpoint.load_step=2"))
    assert not (runs.folder / "other").exists()


def test_a_complete_run_can_go_back(runs: Runs) -> None:
    """What is done is done, unless a step is asked for."""
    first = runs.train("run")
    first.directory.write_status("complete", step=6, loss=1.0)
    directory = RunDirectory(first.directory.path)
    assert freeze(runs.config("run"), directory, []) is Frozen.complete
    assert freeze(runs.config("run", "checkpoint.load_step=4"), directory, []) is Frozen.continued
    assert not directory.is_complete(6)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(runs: Runs) -> None:
    """A folder that is not mounted looks like one without checkpoints; and they are not switched off over some."""
    first = runs.train("run")
    with pytest.raises(ConfigError, match="has checkpoints, but checkpoint=disabled would begin anew over them"):
        runs.build(runs.config("run", "checkpoint=disabled", "training.steps=8"))
    first.directory.checkpoints.rename(runs.folder / "elsewhere")
    before = first.directory.metrics.read_bytes()
    with pytest.raises(CheckpointError, match=r"had saved step 6, but .* holds no checkpoint any more"):
        runs.build(runs.config("run", "training.steps=8"))
    assert first.directory.metrics.read_bytes() == before
    (runs.folder / "elsewhere").rename(first.directory.checkpoints)
    assert runs.build(runs.config("run", "training.steps=8")).state.step == 6


# -- what does not continue --------------------------------------------------------------------------------------------


def test_data_that_has_changed_is_refused(runs: Runs, tmp_path: Path) -> None:
    """The same path with another content would give other rows: refused with the numbers, and nothing is lost."""
    text = tmp_path / "text.txt"
    text.write_text("a word " * 2000)
    runs.text = text
    first = runs.train("run", "training.steps=4")
    text.write_text("another " * 2000)
    with pytest.raises(ConfigError, match="has changed since step 4 was saved") as caught:
        runs.build(runs.config("run"))
    assert "checkpoint.initial_content=all" in str(caught.value)
    assert steps_of(first) == [2, 4]
    text.write_text("a word " * 2000)
    assert runs.build(runs.config("run")).state.step == 4


def test_a_checkpoint_of_other_settings_is_refused(runs: Runs) -> None:
    """A rank by hand, whose config nobody compared, compares it with the checkpoint's."""
    runs.train("run", "training.steps=4")
    (runs.folder / "run" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"does not continue[\s\S]*training.seed=5, but it has training.seed=0"):
        runs.build(runs.config("run", "training.seed=5"))


# -- when saving fails -------------------------------------------------------------------------------------------------


def fill_disk(monkeypatch: pytest.MonkeyPatch, fails: list[bool]) -> None:
    """Let the next saves fail, or not, as the list says; after its end none does."""
    from titan.checkpoint.store import CheckpointStore

    original = CheckpointStore._start

    def start(self, *given):
        if fails and fails.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *given)

    monkeypatch.setattr(CheckpointStore, "_start", start)


@pytest.mark.parametrize("mode", ["sync", "async", "async_pinned"])
def test_a_failed_save_is_tried_again_and_training_goes_on(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Told, counted, tried again at the next step; the run is the one that nothing has failed in."""
    whole = runs.train("whole")
    fill_disk(monkeypatch, [True, True, False])
    trainer = runs.train("run", f"checkpoint={mode}", "checkpoint.retry_seconds=0")
    failed = trainer.directory.read_events("failed save")
    assert [event["in_a_row"] for event in failed] == [1, 2]
    assert "No space left on device" in failed[0]["why"]
    saved = [event["step"] for event in trainer.directory.read_events("save")]
    assert saved[-1] == 6
    assert mode != "sync" or saved[0] == 4
    assert results(trainer.directory.path) == results(whole.directory.path)
    assert state_of(trainer, 6) == state_of(whole, 6)


def test_a_retry_has_a_time_of_its_own(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interval that comes before it does not use up the tries: a disk may be full for an hour of fast steps."""
    fill_disk(monkeypatch, [True])
    options = ("checkpoint.interval=1", "checkpoint.retry_seconds=1000", "checkpoint.max_failures=2")
    with pytest.raises(Stopped) as stopped:
        runs.fit(runs.build(runs.config("run", *options)), stop_after=5)
    assert len(runs.build(runs.config("run", *options)).directory.read_events("failed save")) == 1
    assert stopped.value.saved_step == 5


def test_storage_that_fails_repeatedly_ends_the_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """After max_failures in a row: exit code 73, what was saved before is there, and the run can go on later."""
    fill_disk(monkeypatch, [False] + 100 * [True])
    with pytest.raises(StorageError, match=r"3 of 3 times in a row\): No space left.*step 2 is the newest") as caught:
        runs.train("run", "checkpoint.retry_seconds=0", "checkpoint.max_failures=3")
    assert caught.value.exit_code == 73
    monkeypatch.undo()
    again = runs.build(runs.config("run", "checkpoint.retry_seconds=0", "checkpoint.max_failures=3"))
    assert again.state.step == 2


def test_the_end_of_a_run_waits_for_space(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step is saved as soon as that can be done."""
    fill_disk(monkeypatch, [True, True, True, False])
    trainer = runs.train("run", "checkpoint.interval=100", "checkpoint.retry_seconds=0.01")
    assert steps_of(trainer) == [6]


def test_waiting_for_space_takes_no_time_of_a_step(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait may be longer than a step, or a save, may take: second by second the watchdog is told."""
    fill_disk(monkeypatch, [True, False])
    begun: list[str] = []

    class Noting(Watchdog):
        def _begin(self, what: str, key: str, limit_seconds: float) -> None:
            super()._begin(what, key, limit_seconds)
            begun.append(key)

    at: list[tuple[str, int]] = []
    clock = SimpleNamespace(sleep=lambda seconds: at.append((begun[-1], len(begun))), perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)
    trainer = runs.build(runs.config("run", "checkpoint.interval=100", "checkpoint.retry_seconds=4"))
    settings = FaultToleranceConfig(step_timeout_seconds=0)
    fit(trainer, Noting(settings, trainer.directory, 0, 1, 0, report=lambda hung: None))
    assert [key for key, _ in at] == ["save_timeout_seconds"] * 4
    assert len({number for _, number in at}) == 4, "each second begins anew"


def test_a_stop_that_cannot_be_saved_says_where_it_goes_on(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 75 with the step of the older checkpoint; 143 where there is none."""
    fill_disk(monkeypatch, [False] + 100 * [True])
    with pytest.raises(Stopped, match="which could not be saved: the same command goes on from step 2") as caught:
        runs.fit(runs.build(runs.config("run", "checkpoint.retry_seconds=0")), stop_after=3)
    assert (caught.value.exit_code, caught.value.saved_step) == (75, 2)
    monkeypatch.undo()
    fill_disk(monkeypatch, 100 * [True])
    with pytest.raises(Stopped, match="and nothing was saved") as caught:
        runs.fit(runs.build(runs.config("other", "checkpoint.retry_seconds=0")), stop_after=1)
    assert caught.value.exit_code == 143


# -- generators ------------------------------------------------------------------------------------------------------


def draw(trainer: Trainer) -> None:
    """Let the model draw: noise on every gradient, from torch's generator, Python's and NumPy's."""
    run = trainer.forward_backward

    def noisy(batches, valid_tokens):
        loss = run(batches, valid_tokens)
        scale = torch.rand(()).item() + random.random() + np.random.rand()
        for _, parameter in trainer.parameters:
            parameter.grad.mul_(scale)
        return loss

    trainer.forward_backward = noisy


def test_a_model_that_draws_goes_on_drawing(runs: Runs) -> None:
    """A run whose steps use random numbers is the same when it is repeated, and when it is interrupted."""
    whole, again = (runs.train(name, change=draw) for name in ("whole", "again"))
    assert results(whole.directory.path) == results(again.directory.path)
    assert results(whole.directory.path) != results(runs.train("plain").directory.path)
    first = runs.build(runs.config("stopped"))
    draw(first)
    with pytest.raises(Stopped):
        runs.fit(first, stop_after=3)
    torch.rand(7)
    second = runs.train("stopped", change=draw)
    assert results(second.directory.path) == results(whole.directory.path)
    assert state_of(second, 6) == state_of(whole, 6)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.state_dtype=bfloat16",),
        ("optimizer.state_dtype=bfloat16", "compile=inductor", "compile.optimizer=true", "compile.backend=aot_eager"),
    ],
    ids=["bfloat16", "bfloat16 compiled"],
)
def test_a_run_with_moments_in_bfloat16_resumes_to_the_bit(runs: Runs, overrides: tuple[str, ...]) -> None:
    """Moments are saved in their format; every loss, norm, weight and moment of a stopped run is the other's."""
    torch._dynamo.reset()
    whole = runs.train("whole", *overrides)
    first = runs.build(runs.config("stopped", *overrides))
    with pytest.raises(Stopped):
        runs.fit(first, 3)
    second = runs.train("stopped", *overrides)
    assert results(second.directory.path) == results(whole.directory.path)
    assert state_of(second, 6) == state_of(whole, 6)
    infos = tensor_infos(read_metadata(step_folder(second.directory.checkpoints, 6)))
    formats = {name.rpartition(".")[2]: info.dtype for name, info in infos.items() if name.startswith(OPTIMIZER)}
    assert formats == {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "step": torch.float32}


@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_may_go_on_with_moments_in_another_format(
    runs: Runs, caplog: pytest.LogCaptureFixture, before: str, after: str
) -> None:
    """They are rounded or widened as they are loaded, number by number, and the log says so, once."""
    caplog.set_level("INFO", "titan")
    first = runs.train("run", "training.steps=4", f"optimizer.state_dtype={before}")
    assert not [record for record in caplog.records if "converted" in record.getMessage()]
    second = runs.build(runs.config("run", f"optimizer.state_dtype={after}"))
    said = [record.getMessage() for record in caplog.records if "converted" in record.getMessage()]
    assert said == [f"the optimizer's moments were converted from {before} to {after}"]
    for (name, ours), (_, theirs) in zip(second.parameters, first.parameters, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            found, saved = second.optimizer.state[ours][key], first.optimizer.state[theirs][key]
            assert found.dtype == getattr(torch, after), name
            assert torch.equal(found, saved.to(found.dtype)), name
    runs.fit(second)
    assert second.state.step == 6
