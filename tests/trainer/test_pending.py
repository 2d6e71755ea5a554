"""The host ahead of the device: what it learns late changes nothing, and it waits for no step that it need not."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import Command
from tests.parallel.pool import RankPool
from tests.support.command import FAULT, TINY, json_lines, results
from titan.data.loader import Batch
from titan.errors import NonFiniteError, Stopped
from titan.run_directory import RunDirectory
from titan.trainer import loop, step
from titan.trainer.build import Trainer
from titan.trainer.pending import Exchange, News
from titan.trainer.saving import Wishes
from titan.trainer.step import PendingResult, StepResult

from .conftest import Runs
from .test_spikes import nan_at, state_of

TEN_STEPS = ("training.steps=10", "metrics.log_every=4", "checkpoint.interval=5", "checkpoint.keep_latest=0")
"""Steps 1, 4, 8 and 10 are logged, 5 is saved: 2, 3, 6, 7 and 9 need not be known at once."""
KNOWN_AT_ONCE = {1, 4, 5, 8, 10}


class Device:
    """A CPU whose numbers come as late as a GPU's; notes at which steps the host has waited for them.

    Args:
        trainer: Made to look at its steps late.
        questions: A step's values are there when it has been asked for them so often.
    """

    def __init__(self, trainer: Trainer, questions: int, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer.defers = True
        self.waited: list[int] = []
        self.late: list[int] = []
        device = self

        class Late(PendingResult):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                self.questions, self.number = questions, trainer.state.step + 1

            def is_here(self) -> bool:
                self.questions -= 1
                return self.questions <= 0

            def read(self) -> StepResult:
                if self.questions > 0:
                    device.waited.append(trainer.state.step)
                if trainer.state.step > self.number:
                    device.late.append(self.number)
                return super().read()

        monkeypatch.setattr(step, "PendingResult", Late)


def files_of(directory: RunDirectory) -> tuple[object, ...]:
    """Return what a run has written that says what it did."""
    ledger = [{key: value for key, value in row.items() if key != "time"} for row in directory.read_ledger()]
    events = [(event["action"], event["step"]) for event in directory.read_events("spike")]
    return results(directory.path), json_lines(directory.rows), ledger, events


@pytest.mark.parametrize("questions", [1, 2, 100])
@pytest.mark.parametrize("on_spike", ["none", "skip", "rollback"])
def test_a_run_that_learns_late_is_the_same_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, on_spike: str, questions: int
) -> None:
    """The same rows, ledger, metrics and checkpoints, to the bit, whenever a step's values come.

    And the host has waited for the steps that are logged or saved, and for no other.
    """
    options = (*TEN_STEPS, f"fault_tolerance.on_spike={'stop' if on_spike == 'none' else on_spike}")
    spikes = nan_at(*(() if on_spike == "none" else (7,) if on_spike == "rollback" else (2, 7, 8)))
    at_once = runs.train("at_once", *options, change=spikes)
    late = runs.build(runs.config("late", *options))
    spikes(late)
    device = Device(late, questions, monkeypatch)
    runs.fit(late)
    assert files_of(late.directory) == files_of(at_once.directory)
    assert late.state == at_once.state
    for number in (5, 10):
        late.state.step = at_once.state.step = number
        assert state_of(late) == state_of(at_once)
    assert set(device.waited) <= KNOWN_AT_ONCE
    assert {2, 6} <= set(device.late)


@pytest.mark.parametrize("questions", [1, 100])
def test_a_bad_step_that_is_found_late_stops_the_run_where_it_was(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, questions: int
) -> None:
    """The message names the step; later ones that were handed out meanwhile have changed no weight and no state."""
    trainer = runs.build(runs.config("run", *TEN_STEPS))
    nan_at(6)(trainer)
    device = Device(trainer, questions, monkeypatch)
    with pytest.raises(NonFiniteError, match="step 6: the loss is nan; no weight was moved"):
        runs.fit(trainer)
    assert 6 in device.late
    assert (trainer.state.step, trainer.state.tokens) == (5, 5 * trainer.tokens_per_step)
    assert [event["step"] for event in trainer.directory.read_events("spike")] == [6]
    again = runs.build(runs.config("run", *TEN_STEPS))
    assert again.state == trainer.state
    for (name, now), (_, before) in zip(trainer.parameters, again.parameters, strict=True):
        assert torch.equal(now, before), name
        for key, value in trainer.optimizer.state[now].items():
            assert torch.equal(value, again.optimizer.state[before][key]), (name, key)


def test_the_spike_too_many_stops_all_steps_after_it(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With skipping, the last one that max_spikes allows is skipped, and the next ends the run on the device too."""
    options = (*TEN_STEPS, "fault_tolerance.on_spike=skip", "fault_tolerance.max_spikes=1", "metrics.log_every=10")
    options = (*options, "checkpoint.interval=100")
    weights: list[list[torch.Tensor]] = []

    def noting(trainer: Trainer) -> None:
        run = trainer.forward_backward

        def note(batches, valid_tokens):
            weights.append([parameter.detach().clone() for _, parameter in trainer.parameters])
            return run(batches, valid_tokens)

        trainer.forward_backward = note

    trainer = runs.build(runs.config("run", *options))
    nan_at(3, 6)(trainer)
    noting(trainer)
    Device(trainer, 100, monkeypatch)
    with pytest.raises(NonFiniteError, match=r"step 6: .* there were 1 before: fault_tolerance\.max_spikes"):
        runs.fit(trainer)
    assert len(weights) == 10  # all were handed out, before the host knew
    moved = [not all(map(torch.equal, before, after)) for before, after in itertools.pairwise(weights)]
    assert moved == [True, True, False, True, True, False, False, False, False]


@pytest.mark.parametrize("questions", [1, 100])
def test_a_stop_is_saved_one_step_later_and_goes_on(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, questions: int
) -> None:
    """A signal is heard after the next step, whose values are then waited for; the resumed run is the same run."""
    whole = runs.train("whole", *TEN_STEPS)
    first = runs.build(runs.config("stopped", *TEN_STEPS))
    device = Device(first, questions, monkeypatch)
    with pytest.raises(Stopped) as stopped:
        runs.fit(first, stop_after=6)
    assert (stopped.value.step, stopped.value.saved_step) == (7, 7)
    assert set(device.waited) <= KNOWN_AT_ONCE | {7}
    assert [row["step"] for row in json_lines(first.directory.rows)] == list(range(1, 8))
    second = runs.build(runs.config("stopped", *TEN_STEPS))
    Device(second, questions, monkeypatch)
    runs.fit(second)
    assert files_of(second.directory) == files_of(whole.directory)
    assert state_of(second) == state_of(whole)


def test_saves_in_the_background_are_seen_to(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock, and in turn: each once, written down, and the run goes on meanwhile."""
    options = ("training.steps=12", "metrics.log_every=12", "checkpoint=async_pinned", "checkpoint.interval=5")
    trainer = runs.build(runs.config("run", *options, "checkpoint.keep_latest=0"))
    Device(trainer, 3, monkeypatch)
    is_told_at = loop.Saver.wishes

    def wishes(saver: loop.Saver) -> loop.Wishes:
        if trainer.state.step == 2:  # the clock says so
            return loop.Wishes(is_due=1)
        return is_told_at(saver)

    monkeypatch.setattr(loop.Saver, "wishes", wishes)
    runs.fit(trainer)
    assert [event["step"] for event in trainer.directory.read_events("save")] == [3, 5, 10, 12]


class Fetches(TorchDispatchMode):
    """Notes every value that Python takes out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def noting(self, name: str) -> Callable[..., Any]:
        """Return a method of tensors that is noted when it is called."""
        call = getattr(torch.Tensor, name)

        def noted(tensor: torch.Tensor, *given: Any) -> Any:
            self.found.append(name)
            return call(tensor, *given)

        return noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("option", ["training.local_batch_size=2", "data.mask_documents=true"])
def test_a_step_takes_no_value_out_of_a_tensor(runs: Runs, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """Handing out a step reads nothing, which on a GPU would be to wait; what it gave is read when it is asked for."""
    trainer = runs.build(runs.config("run", "training.steps=3", "training.max_grad_norm=0.1", option))
    fetches = Fetches()
    for name in ("item", "cpu", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, fetches.noting(name))
    batches = loop.steps_of_batches(trainer, loop.build_meter(trainer))
    rows = [next(batches) for _ in range(3)]
    fetches.found.clear()
    with fetches:
        taken = [loop.run_step(trainer, each, spikes_left=torch.zeros(())) for each in rows]
    assert fetches.found == []
    assert [one.result.read().loss for one in taken]
    assert fetches.found == ["tolist"] * 6  # and a fetch is seen


def talk(defers: bool) -> list[News]:
    """Be one of some ranks that exchange twice; returns what it has heard, before, between and after."""
    config = SimpleNamespace(cluster=SimpleNamespace(timeout_seconds=60))
    exchange, rank = Exchange(SimpleNamespace(defers=defers, config=config)), dist.get_rank()  # type: ignore[arg-type]
    heard = [exchange.hear()]
    for number in (7, 8):
        exchange.tell(15 * (rank == 1), Wishes(int(rank == 0), 0), number - rank)
        heard.append(exchange.hear())
    return [*heard, exchange.hear()]


def test_what_one_rank_tells_all_hear(pools: Callable[[int], RankPool]) -> None:
    """A signal of one, a wish of another, and the step up to which the last of them has come; each exchange once."""
    heard = [News(), News(15, Wishes(1, 0), 6), News(15, Wishes(1, 0), 7), News()]
    assert pools(2).run(talk, True) == [heard, heard]


@pytest.mark.slow
@pytest.mark.parametrize("on_spike", ["skip", "rollback"])
def test_ranks_that_learn_at_different_moments_act_at_the_same(
    titan_process: Command, here: Path, text_file: Path, on_spike: str
) -> None:
    """One rank's device is behind the other's, and a step is bad on one of them: all do what they would at once."""

    def run(name: str, *faults: str) -> tuple[object, ...]:
        finished = titan_process(
            *(*TINY, f"data.path={text_file}", f"run.dir={name}", "cluster.devices_per_node=2"),
            *("training.steps=9", f"fault_tolerance.on_spike={on_spike}", "metrics.log_every=8"),
            *("parallelism.dp_shard=2", "checkpoint.interval=3"),
            PYTHONPATH=str(FAULT),
            PLANTED_FAULT=";".join(["nan:1:step:5", *faults]),
        )
        assert finished.code == 0, finished.text
        return files_of(RunDirectory(here / name))

    late = run("late", "late:0:built:1", "late:1:built:3")
    assert late == run("at_once")
    assert late[3] == [(on_spike, 5)]


def test_the_beginning_of_every_micro_batch_is_told() -> None:
    """Of training and of a validation: before the model is called, and as often; CUDA graphs go by it."""
    told: list[str] = []

    class Model(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, starts: None, labels: torch.Tensor) -> torch.Tensor:
            told.append("model")
            return (tokens * torch.ones(1, requires_grad=True)).sum()

    batches = [Batch(torch.ones(1, 2), torch.ones(1, 2))] * 3
    step.build_forward_backward(Model(), lambda is_last: told.append("begin"))(batches, torch.ones(()))
    assert told == ["begin", "model"] * 3
    step.build_evaluate(Model(), lambda: told.append("begin"))(batches)
    assert told == ["begin", "model"] * 6


@pytest.fixture
def on_cuda(runs: Runs) -> Callable[..., Trainer]:
    """Return a trainer of a run on a GPU, with the loss and the gradients of several micro-batches."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def build(name: str, *options: str) -> Trainer:
        common = ("training.steps=12", "metrics.log_every=11", "checkpoint.interval=100", "cluster.device=cuda")
        return runs.build(runs.config(name, *common, "training.global_batch_size=4", *options))

    return build


def around_steps(first: int, last: int, monkeypatch: pytest.MonkeyPatch, begin: Callable, end: Callable) -> None:
    """Call one function before the first of some steps and another one after all that is done in the last."""
    run = loop.run_step

    def noting(trainer: Trainer, *rest: Any) -> Any:
        if trainer.state.step + 1 == first:
            begin()
        if trainer.state.step == last:
            end()
        return run(trainer, *rest)

    monkeypatch.setattr(loop, "run_step", noting)


def raise_where_it_waits() -> None:
    """Let PyTorch raise where it waits for the device, without its warning that it may not see all of that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning"
)  # of the compiler's, which hides it but from pytest
@pytest.mark.parametrize("option", ["compile=none", "compile=inductor", "fault_tolerance.on_spike=skip"])
def test_on_cuda_nothing_waits_in_steps_that_are_not_logged(
    runs: Runs, on_cuda: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """PyTorch raises at any call of its own that waits; and titan waits for no event. A logged step does wait."""
    trainer = on_cuda("run", option)
    waits: list[int] = []
    synchronize = torch.cuda.Event.synchronize

    def counted(event: torch.cuda.Event) -> None:
        waits.append(trainer.state.step)
        synchronize(event)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", counted)
    around_steps(
        *(4, 10, monkeypatch),
        raise_where_it_waits,
        lambda: torch.cuda.set_sync_debug_mode("default"),
    )
    if "skip" in option:
        nan_at(6)(trainer)
    try:
        runs.fit(trainer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {1, 11, 12} <= set(waits)
    assert [row["step"] for row in json_lines(trainer.directory.rows)] == [
        number for number in range(1, 13) if number != 6 or "skip" not in option
    ]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_cuda_graphs_are_the_same_run(runs: Runs, on_cuda: Callable[..., Trainer], tmp_path: Path) -> None:
    """Losses and validation losses with compile.mode=reduce_overhead are those without graphs."""
    held_out, rows = tmp_path / "held_out.txt", {}
    held_out.write_text("the quick brown dogs jump over lazy foxes\n" * 40)
    for mode in ("default", "reduce_overhead"):
        validated = ("validation=text", f"validation.data.path={held_out}", "validation.interval=6")
        trainer = on_cuda(mode, "compile=inductor", f"compile.mode={mode}", "metrics.log_every=1", *validated)
        runs.fit(trainer)
        rows[mode] = [row.get("loss") or row["validation_loss"] for row in json_lines(trainer.directory.metrics)]
    assert len(rows["default"]) == 14
    assert rows["reduce_overhead"] == pytest.approx(rows["default"], rel=1e-3)


@pytest.mark.gpu
def test_on_cuda_the_driver_is_not_told_to_wait(
    runs: Runs, on_cuda: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the profiler's account of the driver's calls: between two logged steps none waits for the device."""
    trainer = on_cuda("run")
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA], acc_events=True
    )

    def end() -> None:
        with torch.profiler.record_function("the end"):
            pass
        profiler.stop()

    around_steps(4, 10, monkeypatch, profiler.start, end)
    runs.fit(trainer)
    events = profiler.events()
    assert events is not None
    (last,) = [event.time_range.start for event in events if event.name == "the end"]
    names = [event.name for event in events if event.time_range.start < last]
    waiting = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    assert any(name.startswith("cudaLaunchKernel") for name in names)
    assert [name for name in names if name in waiting] == []
    assert [name for name in names if "DtoH" in name and "Pageable" in name] == []
