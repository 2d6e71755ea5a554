"""Checkpoints on one rank: what is saved comes back, and what is not whole is never taken for a checkpoint."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor, nn

from titan.checkpoint import files
from titan.checkpoint import store as module
from titan.checkpoint.files import read_metadata, read_tensor, tensor_infos
from titan.checkpoint.manifest import FileRecord, Manifest, committed_steps, record_of_file, recover
from titan.checkpoint.state import (
    NamedParameters,
    create_optimizer_state,
    fill_copies,
    optimizer_state,
    rng_state,
    set_rng_state,
    weights_state,
)
from titan.checkpoint.store import CheckpointStore, Saved
from titan.config.schema import CheckpointConfig, CheckpointMode, ModelConfig, OptimizerConfig
from titan.errors import CheckpointError, StorageError
from titan.models.llama import Llama
from titan.optim.build import build_optimizer

MODEL = ModelConfig(
    name="small", dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=40, max_seq_len=64
)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A small model, its optimizer, and steps on random tokens."""

    def __init__(self, seed: int, tied: bool = False, **shape: int) -> None:
        torch.manual_seed(seed)
        config = ModelConfig(**{**vars(MODEL), "tie_embeddings": tied, **shape})
        self.model = Llama(config, 8)
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.model.init_buffers("cpu")
        self.parameters: NamedParameters = list(self.model.named_parameters())
        self.optimizer = build_optimizer(self.parameters, OptimizerConfig(lr=0.01), torch.device("cpu"))

    def train(self, steps: range) -> list[float]:
        """Do steps whose data depend on their numbers, and return the losses."""
        losses = []
        for step in steps:
            tokens = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(step))
            logits = self.model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def weights(self) -> dict[str, torch.Tensor]:
        """Return copies of all weights."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters}

    def moments(self) -> dict[str, torch.Tensor]:
        """Return copies of the optimizer's whole state."""
        return {
            f"{name}.{key}": value.clone()
            for name, parameter in self.parameters
            for key, value in self.optimizer.state[parameter].items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return all that a checkpoint keeps of it."""
        return weights_state(self.parameters) | optimizer_state(self.parameters, self.optimizer)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Compare to the bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


RUN = "the run"


def build_store(folder: Path, mode: str = "sync", **settings) -> CheckpointStore:
    """Return the store of a folder that keeps all, if no other is said."""
    return CheckpointStore(
        folder / "checkpoints", CheckpointConfig(mode=CheckpointMode[mode], **{"keep_latest": 0} | settings)
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A store that keeps all."""
    return build_store(tmp_path)


def save(store: CheckpointStore, step: int, run: Run, content: str = "all", of: str = RUN) -> Path:
    """Save a step and wait for it."""
    store.save(Manifest(step, 100 * step, content, of, {}), run.state(), "a: config\n", in_background=False)
    outcome = store.result()
    assert isinstance(outcome, Saved), outcome
    return outcome.path


def load(store: CheckpointStore, step: int, run: Run) -> Manifest:
    """Fill a run from the newest checkpoint, which has to be that of `step`."""
    saved = store.find(RUN)
    assert saved is not None
    assert saved.manifest.step == step
    create_optimizer_state(run.optimizer)
    store.load(saved.path, run.state())
    fill_copies(run.parameters, run.optimizer)
    return saved.manifest


@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_comes_back(store: CheckpointStore, tied: bool) -> None:
    """Weights, both moments and the optimizer's step count return to the bit, in a run that began elsewhere."""
    run, other = Run(0, tied), Run(1, tied)
    run.train(range(3))
    path = save(store, 3, run)
    assert path.name == "step_00000003"
    assert load(store, 3, other).tokens == 300
    assert_same(other.weights(), run.weights())
    assert_same(other.moments(), run.moments())
    assert len(run.moments()) == 3 * len(run.parameters)
    assert (path / "config.yaml").read_text() == "a: config\n"


def test_a_resumed_run_goes_on_as_if_nothing_had_been(store: CheckpointStore) -> None:
    """Losses and weights after resuming are those of a run that was never stopped, to the bit."""
    whole = Run(0)
    expected = whole.train(range(8))
    first, second = Run(0), Run(7)
    losses = first.train(range(4))
    save(store, 4, first)
    load(store, 4, second)
    assert losses + second.train(range(4, 8)) == expected
    assert_same(second.weights(), whole.weights())
    assert_same(second.moments(), whole.moments())


def test_loading_leaves_the_optimizers_settings_alone(store: CheckpointStore) -> None:
    """Learning rate and decay come from the config of the run that resumes, not from the file; no gradient remains."""
    run, other = Run(0), Run(1)
    run.train(range(1))
    save(store, 1, run)
    before = [(group["lr"], group["weight_decay"], sorted(group)) for group in other.optimizer.param_groups]
    load(store, 1, other)
    assert [(group["lr"], group["weight_decay"], sorted(group)) for group in other.optimizer.param_groups] == before
    assert all(parameter.grad is None for _, parameter in other.parameters)


def test_an_optimizer_without_a_checkpoint_begins_at_zero() -> None:
    """The tensors that are made to be loaded into are those of an optimizer that has done nothing."""
    run, other = Run(0), Run(0)
    create_optimizer_state(run.optimizer)
    assert all(not value.any() for value in run.moments().values())
    assert run.train(range(3)) == other.train(range(3))


@pytest.mark.parametrize("mode", ["sync", "async", "async_pinned"])
def test_saving_changes_nothing_and_keeps_the_moment(tmp_path: Path, mode: str) -> None:
    """A run that saves in any mode is the run that does not, and what it saves is the step that it asked for.

    In the background, the next steps change the weights while the copies are written.
    """
    store, run, other, then = build_store(tmp_path, mode), Run(0), Run(0), Run(0)
    losses = run.train(range(2))
    then.train(range(2))
    for step in (2, 3, 4):  # pinned memory is used again
        store.save(Manifest(step, 0, "all", RUN, {}), run.state(), "", in_background=mode != "sync")
        store.wait_for_copies()
        losses += run.train(range(step, step + 1))
        assert isinstance(store.result(), Saved)
        loaded = Run(5)
        load(store, step, loaded)
        assert_same(loaded.weights(), then.weights())
        assert_same(loaded.moments(), then.moments())
        then.train(range(step, step + 1))
    assert losses == other.train(range(5))
    store.close()


def test_pinned_copies_are_made_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns before the copies are there with async_pinned, and after they are with async."""
    run, may_copy = Run(0), threading.Event()
    copy = module.Copies.copy

    def slow(self, state):
        assert may_copy.wait(30)
        return copy(self, state)

    monkeypatch.setattr(module.Copies, "copy", slow)
    pinned = build_store(tmp_path, "async_pinned")
    pinned.save(Manifest(1, 0, "all", RUN, {}), run.state(), "", in_background=True)
    assert pinned.is_saving
    waiting = threading.Thread(target=pinned.wait_for_copies)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive(), "the weights may not change yet"
    may_copy.set()
    waiting.join(30)
    assert not waiting.is_alive()
    assert isinstance(pinned.result(), Saved)
    may_copy.clear()
    plain = build_store(tmp_path / "other", "async")
    asking = threading.Thread(target=plain.save, args=(Manifest(1, 0, "all", RUN, {}), run.state(), "", True))
    asking.start()
    asking.join(0.1)
    assert asking.is_alive(), "async waits for the copies"
    may_copy.set()
    asking.join(30)
    assert isinstance(plain.result(), Saved)


def test_generators_come_back() -> None:
    """What torch, Python and NumPy draw after resuming is what they would have drawn."""
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(3)
    random.gauss(0, 1)  # leaves a second number behind
    state = rng_state()

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(()).item()]

    expected = draw()
    draw()
    set_rng_state(state)
    assert draw() == expected


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (0, 0, [1, 2, 3, 4, 5, 6]),
        (1, 0, [6]),
        (2, 0, [5, 6]),
        (9, 0, [1, 2, 3, 4, 5, 6]),
        (1, 2, [2, 4, 6]),
        (2, 3, [3, 5, 6]),
    ],
)
def test_the_newest_and_every_nth_are_kept(tmp_path: Path, keep: int, every: int, left: list[int]) -> None:
    """keep_latest counts from the newest and 0 keeps all; multiples of keep_every stay for good."""
    store, run = build_store(tmp_path, keep_latest=keep, keep_every=every), Run(0)
    for step in range(7):  # step 0 is there because somebody asked for it
        save(store, step, run)
        assert store.steps()[-1] == step
    assert store.steps() == [0, *left]
    assert all(path.name.startswith("step_") for path in store.folder.iterdir())


def test_weights_alone_push_no_checkpoint_out(tmp_path: Path) -> None:
    """What a run can go on from is not given up for weights, from which it cannot."""
    store, run = build_store(tmp_path, keep_latest=1), Run(0)
    run.train(range(1))
    save(store, 1, run)
    save(store, 2, run, content="weights")
    assert store.steps() == [1, 2]
    assert load(store, 1, Run(1)).step == 1
    shutil.rmtree(store.folder / "step_00000001")
    with pytest.raises(CheckpointError, match="step_00000002, which holds weights alone"):
        store.find(RUN)


def test_a_damaged_checkpoint_does_not_stop_the_next_save(tmp_path: Path) -> None:
    """Clearing up leaves what it cannot read to whoever loads it."""
    store, run = build_store(tmp_path, keep_latest=1), Run(0)
    (save(store, 1, run) / "manifest.json").write_text("{")
    save(store, 2, run)
    assert store.steps() == [1, 2]


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    """The same step twice leaves the second one, whole, and nothing beside it."""
    run, other = Run(0), Run(1)
    save(store, 2, run)
    run.train(range(2))
    save(store, 2, run)
    load(store, 2, other)
    assert_same(other.weights(), run.weights())
    assert [path.name for path in store.folder.iterdir()] == ["step_00000002"]


class Killed(BaseException):
    """Stands for a process that ends there and then: nothing may clean up after it."""


KILLS: dict[str, tuple[object, str]] = {
    "before a byte is written": (dcp, "save"),
    "before the manifest": (Manifest, "write"),
    "before the rename": (Path, "rename"),
    "before the folder is synced": (module, "commit"),
    "before the old ones are removed": (module, "remove"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Whenever a process is killed in a save, the one before or the new one is found, whole; and saving goes on."""
    store, run, other = build_store(tmp_path, keep_latest=1), Run(0), Run(1)
    run.train(range(1))
    save(store, 1, run)
    place, name = KILLS[moment]
    original = getattr(place, name)

    def dies(*arguments, **named):
        if moment == "before the folder is synced":
            original(*arguments, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, name, dies)
        with pytest.raises(Killed):
            store._write(Manifest(2, 200, "all", RUN, {}), run.state(), "", None)
    is_new = moment in ("before the folder is synced", "before the old ones are removed")
    again = build_store(tmp_path, keep_latest=1)
    load(again, 2 if is_new else 1, other)
    assert_same(other.weights(), run.weights())
    assert not [path.name for path in store.folder.iterdir() if path.name.startswith(".")]
    save(again, 3, run)
    assert again.steps() == [3]


def test_a_kill_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    """The checkpoint that was to be replaced comes back under its name."""
    folder = tmp_path / "step_00000004"
    for name in (".step_00000004.replaced", ".step_00000004.1f.tmp"):
        (tmp_path / name).mkdir()
    assert len(recover(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def fail_writing(monkeypatch: pytest.MonkeyPatch, number: int, after_bytes: int) -> None:
    """Let the system refuse to write more than so many bytes of any file."""
    original = files._ChecksummingStream.write

    def write(self, data):
        if self.length >= after_bytes:
            self.error = OSError(number, os.strerror(number))
            raise self.error
        return original(self, data)

    monkeypatch.setattr(files._ChecksummingStream, "write", write)


@pytest.mark.parametrize("after_bytes", [0, 1000])
@pytest.mark.parametrize("mode", ["sync", "async", "async_pinned"])
def test_a_save_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, after_bytes: int
) -> None:
    """A full disk is reported by its name, frees what was written, keeps the older ones, and the next try works."""
    store, run = build_store(tmp_path, mode), Run(0)
    save(store, 1, run)
    with monkeypatch.context() as patch:
        fail_writing(patch, errno.ENOSPC, after_bytes)
        store.save(Manifest(2, 0, "all", RUN, {}), run.state(), "", in_background=mode != "sync")
        outcome = store.result()
    assert isinstance(outcome, StorageError)
    assert "No space left on device" in str(outcome)
    assert [path.name for path in store.folder.iterdir()] == ["step_00000001"]
    assert save(store, 2, run).name == "step_00000002"


def test_what_a_failed_save_could_not_remove_goes_with_the_next(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that becomes read-only in the midst of a save keeps what is half written only until the next try."""
    run = Run(0)
    with monkeypatch.context() as patch:
        fail_writing(patch, errno.EROFS, 1000)
        patch.setattr(module.shutil, "rmtree", lambda *_, **__: None)
        store.save(Manifest(1, 0, "all", RUN, {}), run.state(), "", in_background=False)
        assert isinstance(store.result(), StorageError)
    assert len(list(store.folder.glob(".step_00000001.*.tmp"))) == 1
    save(store, 2, run)
    assert [path.name for path in store.folder.iterdir()] == ["step_00000002"]


def test_a_disk_that_is_nearly_full_is_not_filled(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would not fit is not begun: the logs need the space."""
    run = Run(0)
    save(store, 1, run)
    usage = shutil.disk_usage(store.folder)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    store.save(Manifest(2, 0, "all", RUN, {}), run.state(), "", in_background=False)
    assert "no space left: 0.00 GiB needed" in str(store.result())
    # as much as all of it is not needed for the weights alone
    store.save(Manifest(2, 0, "weights", RUN, {}), weights_state(run.parameters), "", in_background=False)
    assert isinstance(store.result(), Saved)


def test_a_folder_that_cannot_be_made_is_a_failed_save(tmp_path: Path) -> None:
    """A file in the place of the checkpoints' folder fails the save, not the run."""
    (tmp_path / "checkpoints").write_text("")
    store = build_store(tmp_path)
    store.save(Manifest(1, 0, "all", RUN, {}), Run(0).state(), "", in_background=False)
    outcome = store.result()
    assert isinstance(outcome, StorageError)
    assert "checkpoints" in str(outcome)


def test_only_committed_names_count(tmp_path: Path) -> None:
    """Anything else in the folder is left alone; steps beyond eight digits sort as numbers."""
    for name in (".step_00000004.tmp", "step_5", "step_00000007.old", "notes", "step_00000009", "step_100000000"):
        (tmp_path / name).mkdir()
    assert committed_steps(tmp_path) == [9, 100_000_000]
    assert committed_steps(tmp_path / "missing") == []


# -- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, share: float, bit: int = 0) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * share), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a truncated shard": (lambda path: cut(path / "__0_0.distcp", 0.5), "__0_0.distcp has .* bytes instead of"),
    "an empty shard": (lambda path: cut(path / "__0_0.distcp", 0), "__0_0.distcp has 0 bytes instead of"),
    "a flipped bit": (lambda path: flip(path / "__0_0.distcp", 0.5), "__0_0.distcp does not have its checksum"),
    "a flipped bit in the metadata": (
        lambda path: flip(path / ".metadata", 0.5),
        ".metadata does not have its checksum",
    ),
    "a flipped bit in the config": (lambda path: flip(path / "config.yaml", 0.5), "config.yaml does not have its"),
    "a flipped bit in the manifest": (lambda path: flip(path / "manifest.json", 0.5), "manifest.json"),
    "a truncated manifest": (lambda path: cut(path / "manifest.json", 0.9), "manifest.json cannot be read"),
    "a deleted shard": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "deleted metadata": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "a deleted manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "an empty folder": (lambda path: [file.unlink() for file in path.iterdir()], "it has no manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_set_aside_and_the_one_before_is_taken(tmp_path: Path, kind: str) -> None:
    """No damage is loaded. It is kept for whoever wants to look; strict ends the run instead and moves nothing."""
    noted = []
    store, run, other = build_store(tmp_path), Run(0), Run(1)
    store.note = lambda event, **details: noted.append((event, details))
    run.train(range(1))
    save(store, 1, run)
    expected = run.weights()
    run.train(range(1, 2))
    damage, words = DAMAGE[kind]
    damage(save(store, 2, run))
    with pytest.raises(CheckpointError, match=f"step_00000002 is damaged: {words}"):
        build_store(tmp_path, strict=True).find(RUN)
    assert store.steps() == [1, 2]
    load(store, 1, other)
    assert_same(other.weights(), expected)
    assert sorted(path.name for path in store.folder.iterdir()) == ["damaged_step_00000002", "step_00000001"]
    ((event, details),) = noted
    assert (event, details["checkpoint"], details["moved_to"]) == (
        "quarantine", "step_00000002", "damaged_step_00000002",
    )  # fmt: skip


@pytest.mark.parametrize("number", range(60))
def test_no_flipped_bit_is_accepted(tmp_path: Path, number: int) -> None:
    """A bit flipped anywhere in any file of a checkpoint is found. The place is drawn from the test's number."""
    draw = random.Random(number)
    store, run = build_store(tmp_path), Run(0)
    path = save(store, 1, run)
    file = draw.choice(sorted(path.iterdir()))
    flip(path / file.name, draw.random(), draw.randrange(8))
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        store.find(RUN)


def test_when_nothing_is_whole_a_run_does_not_begin_anew(store: CheckpointStore) -> None:
    """With every checkpoint damaged, now or in an earlier attempt, the run ends with 66 and says what to type."""
    run = Run(0)
    for step in (1, 2):
        flip(save(store, step, run) / "__0_0.distcp", 0.5)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no usable checkpoint") as caught:
            store.find(RUN)
        assert "run.dir=ANOTHER" in str(caught.value)
        assert caught.value.exit_code == 66
    assert sorted(path.name for path in store.folder.iterdir()) == ["damaged_step_00000001", "damaged_step_00000002"]


def test_where_nothing_was_ever_saved_a_run_begins(store: CheckpointStore) -> None:
    """No folder, or an empty one, is no damage."""
    assert store.find(RUN) is None
    store.folder.mkdir()
    assert store.find(RUN) is None


def test_a_checkpoint_of_another_run_is_set_aside(store: CheckpointStore) -> None:
    """Though it is whole, it is not this run's; and one that was renamed is not the step that it says."""
    run = Run(0)
    run.train(range(1))
    save(store, 1, run)
    save(store, 2, run, of="another")
    (store.folder / "step_00000001").rename(store.folder / "step_00000003")
    save(store, 1, run)
    assert load(store, 1, Run(1)).step == 1
    assert store.steps() == [1]
    assert {path.name for path in store.folder.iterdir()} == {
        *("step_00000001", "foreign_step_00000002", "damaged_step_00000003")
    }


def test_a_run_that_went_back_does_not_go_further_back(tmp_path: Path) -> None:
    """load_step is the floor: the step itself, or what came after it, and nothing before."""
    run = Run(0)
    run.train(range(1))
    for step in (1, 2):
        save(build_store(tmp_path), step, run)
    store = build_store(tmp_path, load_step=2)
    assert load(store, 2, Run(1)).step == 2
    flip(store.folder / "step_00000002" / "__0_0.distcp", 0.5)
    with pytest.raises(CheckpointError, match=r"no usable checkpoint from step 2 on[\s\S]*There are: 1"):
        store.find(RUN)


def test_without_verifying_sizes_are_still_held(tmp_path: Path) -> None:
    """verify=false reads no shard twice: a changed byte goes by, a missing one does not."""
    store, run = build_store(tmp_path, verify=False), Run(0)
    flip(save(store, 1, run) / "__0_0.distcp", 0.5)
    assert store.find(RUN) is not None
    cut(save(store, 1, run) / "__0_0.distcp", 0.99)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        store.find(RUN)


def test_a_folder_that_cannot_be_read_is_not_damage(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system while reading moves nothing: the checkpoint may be well, and the network not."""
    save(store, 1, Run(0))

    def broken(self, folder, names, checksums):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Manifest, "damage", broken)
    with pytest.raises(CheckpointError, match=r"rank 0: .*Input/output error[\s\S]*file system that all nodes share"):
        store.find(RUN)
    assert store.steps() == [1]


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"ffn_dim": 32}, "model.layers.0.feed_forward.w1.weight is 24 x 16 in the checkpoint, and 32 x 16 here"),
        ({"n_layers": 3}, "model.layers.2.attention.wq.weight is not in the checkpoint"),
        ({"n_layers": 1}, "model.layers.1.attention.wk.weight is not in this model"),
    ],
)
def test_another_model_is_refused_before_anything_changes(
    store: CheckpointStore, shape: dict[str, int], words: str
) -> None:
    """Other shapes, tensors too few and tensors too many are listed, and the model is as it was."""
    run, other = Run(0), Run(3, **shape)
    run.train(range(1))
    path = save(store, 1, run)
    create_optimizer_state(other.optimizer)
    before = other.weights()
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        store.load(path, other.state())
    assert words in str(caught.value)
    assert_same(other.weights(), before)


def test_another_format_is_refused_unless_asked_for(store: CheckpointStore) -> None:
    """PyTorch would convert in silence."""
    run, other = Run(0), Run(1)
    path = save(store, 1, run)
    other.model.bfloat16()
    with pytest.raises(CheckpointError, match=r"is torch.float32 in the checkpoint, and torch.bfloat16 here"):
        store.load(path, other.state())
    store.load(path, weights_state(other.parameters), can_cast=lambda name: True)
    assert_same(other.weights(), {name: tensor.bfloat16() for name, tensor in run.weights().items()})


def test_one_tensor_can_be_read_alone(store: CheckpointStore) -> None:
    """What a checkpoint has, and a tensor of it, without a model."""
    run = Run(0)
    path = save(store, 1, run)
    infos = tensor_infos(read_metadata(path))
    assert set(infos) == set(run.state())
    name = "model.layers.1.attention.wq.weight"
    assert torch.equal(read_tensor(path, name, infos[name]), run.weights()[name.removeprefix("model.")])


def test_other_tools_read_it(store: CheckpointStore) -> None:
    """It is PyTorch's own format."""
    run = Run(0)
    path = save(store, 1, run)
    state = {name: torch.zeros_like(tensor) for name, tensor in run.state().items()}
    dcp.load(state, checkpoint_id=path)
    assert_same(state, run.state())


def test_the_checksum_is_one_that_others_know(tmp_path: Path) -> None:
    """What is noted while writing is the XXH3 of the file, which `xxh128sum` prints."""
    path = save(build_store(tmp_path), 1, Run(0))
    for name, record in Manifest.read(path).files.items():
        assert record.checksum == xxhash.xxh3_128_hexdigest((path / name).read_bytes())
        assert record == record_of_file(path / name)


# -- code in a checkpoint --------------------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def forge(path: Path) -> None:
    """Give a checkpoint that was changed a manifest that agrees with it, as an attacker would."""
    manifest = Manifest.read(path)
    records = {name: record_of_file(path / name) for name in manifest.files}
    Manifest(manifest.step, manifest.tokens, manifest.content, manifest.run, records).write(path)


def test_metadata_that_would_run_code_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    """A pickle that calls something is an error, and it is not called, though every checksum is right."""
    run, mark = Run(0), tmp_path / "was_run"
    path = save(store, 1, run)
    metadata = read_metadata(path)
    metadata.planner_data = Payload(mark)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(path)
    saved = store.find(RUN)
    assert saved is not None
    with pytest.raises(CheckpointError, match=r"it wants to call posix\.mkdir"):
        store.load(saved.path, run.state())
    assert not mark.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert mark.exists(), "the payload was one"


def test_a_tensor_that_would_run_code_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    """So is a pickle in the place of a tensor, and a pickled object is never asked for."""
    run, mark = Run(0), tmp_path / "was_run"
    state = run.state() | {"extra": Payload(mark)}
    dcp.save(state, checkpoint_id=tmp_path / "foreign")
    store.load(tmp_path / "foreign", run.state())
    with pytest.raises(CheckpointError, match="is never loaded"):
        files.read_tensors({"extra": Payload(mark)}, tmp_path / "foreign")  # type: ignore[dict-item]
    assert not mark.exists()

    path = save(store, 1, run)
    whole = pickle.dumps(Payload(mark))
    original = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(whole + original[len(whole) :])
    forge(path)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        store.load(path, run.state())
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_checkpoint_names_no_file_outside_of_it(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    """Neither its manifest nor its metadata leads out of the folder, though every checksum is right."""
    run = Run(0)
    path = save(store, 1, run)
    (store.folder / "outside").write_bytes((path / "__0_0.distcp").read_bytes())
    manifest = Manifest.read(path)
    Manifest(1, 0, "all", RUN, manifest.files | {name: record_of_file(path / "config.yaml")}).write(path)
    with pytest.raises(CheckpointError, match=f"names a file outside of the checkpoint: {name}"):
        store.find(RUN)

    path = save(store, 2, run)
    metadata = read_metadata(path)
    for piece in metadata.storage_data.values():
        piece.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(path)
    with pytest.raises(CheckpointError, match=f"names a file outside of the checkpoint: {name}"):
        store.load(path, run.state())


def test_what_is_no_file_is_damage(store: CheckpointStore) -> None:
    """A device in the place of a file could be read without end."""
    path = save(store, 1, Run(0))
    manifest = Manifest.read(path)
    (path / "__0_0.distcp").unlink()
    (path / "__0_0.distcp").symlink_to("/dev/zero")
    records = {name: FileRecord(0, "") if name == "__0_0.distcp" else file for name, file in manifest.files.items()}
    Manifest(1, 0, "all", RUN, records).write(path)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is no file"):
        store.find(RUN)


def test_bytes_that_are_no_metadata(tmp_path: Path) -> None:
    """Anything may stand in the file: it is an error with its path."""
    for content in (b"", b"text", pickle.dumps([1, 2]), b"\x80\x04\x95"):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata (cannot be read|holds no metadata)"):
            read_metadata(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no file \.metadata"):
        read_metadata(tmp_path / "missing")


@pytest.mark.parametrize("mode", ["sync", "async", "async_pinned"])
def test_a_defect_in_saving_is_raised_and_nothing_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """What is no trouble of the disk's is no failed save: it ends the run, at once."""
    store, run = build_store(tmp_path, mode), Run(0)

    def defect(*given, **named):
        raise TypeError("a defect")

    monkeypatch.setattr(module, "write_tensors", defect)

    def save_and_wait() -> None:
        store.save(Manifest(1, 0, "all", RUN, {}), run.state(), "", in_background=mode != "sync")
        store.result()

    with pytest.raises(TypeError, match="a defect"):
        save_and_wait()
    assert store.result() is None
    store.close()
