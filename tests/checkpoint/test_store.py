"""Checkpoints on one rank: what is saved comes back, and what is not whole is never taken for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from titan.checkpoint import store as module
from titan.checkpoint.store import CheckpointStore, NamedParameters, committed_steps, load_weights
from titan.config.schema import ModelConfig, OptimizerConfig
from titan.errors import CheckpointError
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


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Compare to the bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A folder that keeps all."""
    return CheckpointStore(tmp_path / "checkpoints", keep_latest=0)


def save(store: CheckpointStore, step: int, run: Run) -> Path:
    """Save a step."""
    return store.save(step, run.parameters, run.optimizer, {"tokens": 100 * step})


@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_comes_back(store: CheckpointStore, tied: bool) -> None:
    """Weights, both moments and the optimizer's step count return to the bit, in a run that began elsewhere."""
    run, other = Run(0, tied), Run(1, tied)
    run.train(range(3))
    path = save(store, 3, run)
    assert path == store.path(3)
    assert path.name == "step_00000003"
    assert store.load(3, other.parameters, other.optimizer) == {"tokens": 300}
    assert_same(other.weights(), run.weights())
    assert_same(other.moments(), run.moments())
    assert len(run.moments()) == 3 * len(run.parameters)


def test_a_resumed_run_goes_on_as_if_nothing_had_been(store: CheckpointStore) -> None:
    """Losses and weights after resuming are those of a run that was never stopped, to the bit."""
    whole = Run(0)
    expected = whole.train(range(8))
    first, second = Run(0), Run(7)
    losses = first.train(range(4))
    save(store, 4, first)
    store.load(4, second.parameters, second.optimizer)
    assert losses + second.train(range(4, 8)) == expected
    assert_same(second.weights(), whole.weights())
    assert_same(second.moments(), whole.moments())


def test_loading_leaves_the_optimizers_settings_alone(store: CheckpointStore) -> None:
    """Learning rate and decay come from the config of the run that resumes, not from the file; no gradient remains."""
    run, other = Run(0), Run(1)
    run.train(range(1))
    save(store, 1, run)
    before = [(group["lr"], group["weight_decay"], sorted(group)) for group in other.optimizer.param_groups]
    store.load(1, other.parameters, other.optimizer)
    assert [(group["lr"], group["weight_decay"], sorted(group)) for group in other.optimizer.param_groups] == before
    assert all(parameter.grad is None for _, parameter in other.parameters)


def test_saving_changes_nothing(store: CheckpointStore) -> None:
    """A run that saves is the run that does not."""
    run, other = Run(0), Run(0)
    run.train(range(2))
    other.train(range(2))
    save(store, 2, run)
    assert run.train(range(2, 4)) == other.train(range(2, 4))


def test_a_run_without_a_step_can_be_saved_and_loaded_for_its_weights(store: CheckpointStore) -> None:
    """Initial weights are a checkpoint that another run can start from."""
    run, other = Run(0), Run(1)
    load_weights(save(store, 0, run), other.parameters)
    assert_same(other.weights(), run.weights())


def test_weights_alone_come_from_a_checkpoint_with_everything(store: CheckpointStore) -> None:
    """load_weights takes the weights and leaves the optimizer without a state."""
    run, other = Run(0), Run(1)
    run.train(range(2))
    load_weights(save(store, 2, run), other.parameters)
    assert_same(other.weights(), run.weights())
    assert not other.optimizer.state


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4, 5]), (1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    """keep_latest counts from the newest; 0 keeps all; at no time are there fewer than asked for."""
    store, run = CheckpointStore(tmp_path / "checkpoints", keep), Run(0)
    for step in range(1, 6):
        save(store, step, run)
        assert store.steps()[-1] == step
    assert store.steps() == left


def test_a_run_resumed_from_an_earlier_step_keeps_what_it_saves(tmp_path: Path) -> None:
    """Later checkpoints, of before it went back, do not push out the one that was just written."""
    run = Run(0)
    keep_all, keep_one = (CheckpointStore(tmp_path / "checkpoints", keep) for keep in (0, 1))
    for step in (10, 20, 30):
        save(keep_all, step, run)
    save(keep_one, 15, run)
    assert 15 in keep_one.steps()
    assert 10 not in keep_one.steps()


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    """The same step twice, as after a crash right behind a save, leaves the second one, whole."""
    run, other = Run(0), Run(1)
    save(store, 2, run)
    run.train(range(2))
    save(store, 2, run)
    assert store.steps() == [2]
    store.load(2, other.parameters, other.optimizer)
    assert_same(other.weights(), run.weights())


def test_an_interrupted_save_is_no_checkpoint(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash leaves of a save is neither listed nor loaded, and does not stand in the way of the next."""
    run, other = Run(0), Run(1)
    run.train(range(1))
    save(store, 1, run)
    original = module.dcp.save

    def dies(*arguments, **named) -> None:
        original(*arguments, **named)
        raise SystemExit("killed before the commit")

    with monkeypatch.context() as patch:
        patch.setattr(module.dcp, "save", dies)
        with pytest.raises(SystemExit):
            save(store, 2, run)
    assert store.steps() == [1]
    assert [path.name for path in store.folder.iterdir() if "00000002" in path.name] == [".step_00000002.tmp"]
    with pytest.raises(CheckpointError):
        store.load(2, other.parameters, other.optimizer)
    save(store, 2, run)
    assert store.steps() == [1, 2]
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_00000001", "step_00000002"]


def test_only_committed_names_count(tmp_path: Path) -> None:
    """Anything else in the folder is left alone; steps beyond eight digits sort as numbers."""
    for name in (".step_00000004.tmp", "step_5", "step_00000007.old", "notes", "step_00000009", "step_100000000"):
        (tmp_path / name).mkdir()
    assert committed_steps(tmp_path) == [9, 100_000_000]
    assert committed_steps(tmp_path / "missing") == []


def test_a_step_that_was_not_saved_is_named_with_those_that_were(store: CheckpointStore) -> None:
    """The error lists what there is and says how to take the newest."""
    run = Run(0)
    with pytest.raises(CheckpointError, match=r"load_step = 3: .* has no such checkpoint\n  There are: none"):
        store.load(3, run.parameters, run.optimizer)
    for step in (1, 2):
        save(store, step, run)
    with pytest.raises(CheckpointError, match=r"There are: 1, 2\n  Try  checkpoint\.load_step=-1"):
        store.load(3, run.parameters, run.optimizer)


@pytest.mark.parametrize(
    ("shape", "words"),
    [({"ffn_dim": 32}, "Size mismatch"), ({"n_layers": 3}, "Missing key in checkpoint state_dict: model.layers.2")],
)
def test_another_model_is_refused(store: CheckpointStore, shape: dict[str, int], words: str) -> None:
    """A checkpoint of other shapes, or without some of the weights, is an error that says which, with no traceback."""
    run, other = Run(0), Run(0, **shape)
    run.train(range(1))
    path = save(store, 1, run)
    with pytest.raises(CheckpointError, match=words) as caught:
        store.load(1, other.parameters, other.optimizer)
    assert str(caught.value).startswith(f"{path} cannot be loaded: ")
    assert "Traceback" not in str(caught.value)
    with pytest.raises(CheckpointError, match=words):
        load_weights(path, other.parameters)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata"])
def test_a_file_that_was_cut_short_is_an_error(store: CheckpointStore, pattern: str, share: float) -> None:
    """A truncated file, of data or of metadata, is a checkpoint error and never a model of half-read weights."""
    run, other = Run(0), Run(1)
    run.train(range(1))
    path = save(store, 1, run)
    (file,) = path.glob(pattern)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="step_00000001 cannot be loaded: "):
        store.load(1, other.parameters, other.optimizer)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """An empty folder, and one that is not there, are named."""
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=f"^{folder} is not a checkpoint"):
            load_weights(folder, Run(0).parameters)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    """A file in the place of the checkpoints' folder fails at once, before anything is written."""
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="checkpoints"):
        save(CheckpointStore(tmp_path / "checkpoints", 0), 1, Run(0))
