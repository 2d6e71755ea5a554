"""Where the time of some steps went: shares that add up, named operators, files on every rank."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch.autograd import DeviceType

from tests.parallel.layouts import layout_config, open_packed
from tests.parallel.pool import RankPool
from titan.config.schema import FaultToleranceConfig, ProfilingConfig
from titan.errors import Stopped
from titan.trainer.breakdown import DATA, OPTIMIZER, break_down, common, length, union, without
from titan.trainer.build import Trainer, build_trainer
from titan.trainer.loop import fit
from titan.trainer.profile import Profile
from titan.trainer.watchdog import Watchdog

from .conftest import Runs

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own: it looks at what is deprecated, too

PROFILED = ("profiling=trace", "profiling.start_step=3", "profiling.steps=2")
NAMES = ("compute", "communication", "data", "optimizer", "other")


def summary(folder: Path, name: str = "steps_3_4.rank_00000") -> dict[str, Any]:
    """Return what was written of where the time went; the shares of every summary add up."""
    found = json.loads((folder / f"{name}.summary.json").read_text())
    assert tuple(found["shares"]) == NAMES
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-9)
    assert all(-1e-9 <= share <= 1 for share in found["shares"].values())
    return found


# -- of events that are written down -----------------------------------------------------------------------------------


@dataclass
class Event:
    """What `break_down` looks at of a FunctionEvent."""

    name: str
    begin: float
    end: float
    thread: int = 1
    device_type: DeviceType = DeviceType.CPU
    is_user_annotation: bool = False
    is_async: bool = False
    self_cpu_time_total: float = 0.0
    self_device_time_total: float = 0.0

    @property
    def time_range(self) -> SimpleNamespace:
        """As PyTorch has it."""
        return SimpleNamespace(start=self.begin, end=self.end)


def annotation(name: str, begin: float, end: float, device: DeviceType = DeviceType.CPU) -> Event:
    """Return a range that was marked."""
    return Event(name, begin, end, device_type=device, is_user_annotation=True)


def test_a_cpus_moments_are_each_one_of_five() -> None:
    """Every kind of moment in one made-up step of 100 microseconds, with overlaps, counted by hand."""
    events = [
        annotation("ProfilerStep*", 0, 100),
        annotation(DATA, 0, 10),
        Event("aten::copy_", 2, 8),  # reading: data, not compute
        Event("aten::mm", 10, 40, self_cpu_time_total=30),
        Event("gloo:all_gather", 30, 55, thread=2, is_async=True),  # 10 of it behind the product
        Event("aten::mm", 50, 60, self_cpu_time_total=10),  # and 5 behind this one
        Event("c10d::allgather_", 40, 42),
        Event("aten::mm", 60, 90, thread=7),  # another thread's
        annotation(OPTIMIZER, 70, 90),
        Event("aten::_fused_adamw_", 72, 88, self_cpu_time_total=16),
        Event("aten::mm", 120, 130, self_cpu_time_total=10),  # after the step
    ]
    found = break_down(events, 1)
    expected = {"compute": 0.4, "communication": 0.1, "data": 0.1, "optimizer": 0.16, "other": 0.24}
    assert found.shares == pytest.approx(expected)
    assert found.hidden == pytest.approx(0.15)
    assert [(row.name, row.calls_per_step, row.share) for row in found.operators] == [
        ("aten::mm", 2, pytest.approx(0.4)),
        ("aten::_fused_adamw_", 1, pytest.approx(0.16)),
    ]


def test_a_gpus_moments_are_those_of_its_kernels() -> None:
    """On CUDA the kernels count, in two steps of 100 microseconds; what the CPU does meanwhile does not."""
    cuda = DeviceType.CUDA
    events = [
        annotation("ProfilerStep*", 0, 100),
        annotation("ProfilerStep*", 100, 200),
        annotation("ProfilerStep*", 200, 210),  # not a whole one
        annotation("ProfilerStep*", 0, 190, cuda),
        annotation(DATA, 0, 30),
        Event("aten::mm", 30, 35, self_device_time_total=100),
        Event("sm90_gemm", 20, 120, device_type=cuda),
        Event("ncclDevKernel_AllGather_RING_LL", 110, 150, device_type=cuda),
        annotation(OPTIMIZER, 36, 40),
        Event("aten::mm", 60, 65, thread=7, self_device_time_total=20),  # a backward pass
        annotation(OPTIMIZER, 160, 165, cuda),
        annotation("Optimizer.step#AdamW.step", 165, 180, cuda),
        Event("multi_tensor_apply_kernel", 160, 180, device_type=cuda),
    ]
    found = break_down(events, 2)
    expected = {"compute": 0.5, "communication": 0.15, "data": 0.1, "optimizer": 0.1, "other": 0.15}
    assert found.shares == pytest.approx(expected)
    assert found.hidden == pytest.approx(0.05)
    assert [(row.name, row.share) for row in found.operators] == [("aten::mm", 0.6)]


def test_intervals_are_sets_of_moments() -> None:
    """Union, common part and difference of spans agree with sets of whole numbers, over random spans."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = torch.randint(0, 30, (2, 5, 2), generator=generator).tolist()
        one, other = ([(min(span), max(span)) for span in spans] for spans in drawn)
        ours, theirs = ({moment for begin, end in spans for moment in range(begin, end)} for spans in (one, other))
        assert length(union(one)) == len(ours)
        assert length(common(union(one), union(other))) == len(ours & theirs)
        assert length(without(union(one), union(other))) == len(ours - theirs)


# -- of runs -----------------------------------------------------------------------------------------------------------


def test_a_run_says_where_its_time_went(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """Trace, summary and table for the steps asked for; the table names matrix products, and fits the console."""
    with caplog.at_level("INFO", "titan"):
        folder = runs.train("run", *PROFILED).directory.profiles
    names = [f"steps_3_4.rank_00000.{kind}" for kind in ("json.gz", "summary.json", "summary.txt")]
    assert sorted(path.name for path in folder.iterdir()) == names
    trace = json.loads(gzip.decompress((folder / names[0]).read_bytes()))["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep") for event in trace if event["ph"] == "X") == 2
    found = summary(folder)
    assert found["steps"] == 2
    assert min(found["shares"][name] for name in ("compute", "data", "optimizer", "other")) > 0
    products = [row for row in found["operators"] if row["name"] in ("aten::mm", "aten::addmm", "aten::_linear")
                or "linear" in row["name"]]  # fmt: skip
    assert sum(row["calls_per_step"] for row in products) >= 2 * 7  # forward alone, of two blocks
    table = (folder / names[2]).read_text().splitlines()
    assert table[0] == "profile of steps 3 to 4"
    assert all(len(line) <= 100 for line in table)
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("profile of")]
    assert [line.strip() for line in said.splitlines()[1:]] == [line.strip() for line in table[1:]]


def test_waiting_for_rows_shows(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that takes as long as a hundred steps takes almost all of the time."""
    from titan.data.loader import Step

    prepared_for = Step.prepared_for

    def slow(step: Step, *arguments: Any) -> Step:
        time.sleep(1.0)
        return prepared_for(step, *arguments)

    before = summary(runs.train("before", *PROFILED).directory.profiles)
    monkeypatch.setattr(Step, "prepared_for", slow)
    after = summary(runs.train("after", *PROFILED).directory.profiles)
    assert after["shares"]["data"] * after["seconds_per_step"] >= 1.0
    assert before["shares"]["data"] < 0.5 < after["shares"]["data"]


def test_compiled_blocks_are_compute(runs: Runs) -> None:
    """With compiled blocks and a compiled update there are the same files, and compiled code counts as compute."""
    torch._dynamo.reset()
    compiled = ("compile=inductor", "compile.backend=aot_eager", "compile.optimizer=true")
    found = summary(runs.train("run", *PROFILED, *compiled).directory.profiles)
    assert "compiled code" in [row["name"] for row in found["operators"]]
    assert min(found["shares"]["compute"], found["shares"]["optimizer"]) > 0


def test_a_run_that_goes_on_is_profiled_at_the_steps_asked_for(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """Steps are counted from the run's beginning, wherever this process began; those that are past, it says."""
    first = runs.build(runs.config("run"))
    with pytest.raises(Stopped):
        runs.fit(first, 2)
    second = runs.build(runs.config("run", *PROFILED, "profiling.start_step=4"))
    with pytest.raises(Stopped):
        runs.fit(second, 5)
    assert summary(second.directory.profiles, "steps_4_5.rank_00000")["steps"] == 2
    with caplog.at_level("INFO", "titan"):
        runs.train("run", *PROFILED)
    assert not list(second.directory.profiles.glob("steps_3_*"))
    assert any("step 3 is past" in record.getMessage() for record in caplog.records)


def test_a_run_that_is_stopped_writes_the_steps_it_has(runs: Runs) -> None:
    """Stopped after the first of two steps, it has a profile of that one, and says so in the name."""
    trainer = runs.build(runs.config("run", *PROFILED))
    with pytest.raises(Stopped):
        runs.fit(trainer, 3)
    assert summary(trainer.directory.profiles, "steps_3_3.rank_00000")["steps"] == 1


def test_a_profile_that_cannot_be_written_ends_no_run(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """The disk may be full, or the folder another's: the run says so and goes on, and a stop stays a stop."""
    trainer = runs.build(runs.config("run", *PROFILED))
    trainer.directory.profiles.write_text("a file where the folder should be")
    runs.fit(trainer)
    assert any("no trace of rank 0" in record.getMessage() for record in caplog.records)
    stopped = runs.build(runs.config("stopped", *PROFILED))
    stopped.directory.profiles.write_text("a file where the folder should be")
    with pytest.raises(Stopped):
        runs.fit(stopped, 3)


def fit_rank(overrides: tuple[str, ...], packed: Path, folder: Path) -> None:
    """Train as this rank, profile included."""
    config = layout_config(dist.get_world_size(), (*overrides, "training.steps=4"))
    config = replace(config, run=replace(config.run, dir=str(folder)))
    folder.mkdir(exist_ok=True)
    trainer: Trainer = build_trainer(config, torch.device("cpu"), open_packed(packed, config))
    off = FaultToleranceConfig(step_timeout_seconds=0)
    fit(trainer, Watchdog(off, trainer.directory, dist.get_rank(), 2, 0, report=lambda hung: None))


@pytest.mark.parametrize("layout", [("parallelism.dp_shard=2",), ("parallelism.pp=2", "parallelism.dp_shard=1")])
def test_every_rank_writes_its_own(pools: Callable[[int], RankPool], tmp_path: Path, layout: tuple[str, ...]) -> None:
    """On a mesh, a pipeline among them, each rank has its files, and knows what it waited for others."""
    from tests.parallel.layouts import make_packed

    packed = make_packed(tmp_path / "tokens.bin")
    pools(2).run(fit_rank, (*layout, *PROFILED), packed, tmp_path / "run")
    folder = tmp_path / "run" / "profiles"
    assert len(list(folder.iterdir())) == 2 * 3
    for rank in range(2):
        assert summary(folder, f"steps_3_4.rank_{rank:05d}")["shares"]["communication"] > 0


def test_memory_is_recorded_until_the_last_step_or_until_it_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a recorder in the place of CUDA's: begun once, written after the last step, or when memory runs out."""
    calls: list[str] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(
        memory, "_record_memory_history", lambda enabled="all", **_: calls.append("record" if enabled else "stop")
    )
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    config = ProfilingConfig(memory_snapshot=True, start_step=2, steps=2)
    with Profile(config, tmp_path, 1) as profile:
        for step in range(1, 6):
            profile.step(step)
    assert calls == ["record", "steps_2_3.rank_00001.memory.pickle", "stop"]
    calls.clear()
    ended = Profile(config, tmp_path, 0)
    ended.__enter__()
    ended.step(1)
    ended.__exit__(torch.OutOfMemoryError, torch.OutOfMemoryError(), None)
    assert calls == ["record", "out_of_memory.rank_00000.memory.pickle", "stop"]


@pytest.mark.gpu
def test_a_gpus_memory_and_time_are_written(tmp_path: Path) -> None:
    """On CUDA: the snapshot, and shares of what kernels did."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = ProfilingConfig(enable=True, memory_snapshot=True, start_step=3, steps=2)
    with Profile(config, tmp_path, 0) as profile:
        for step in range(1, 6):
            matrix = torch.randn(2048, 2048, device="cuda")
            with torch.profiler.record_function(OPTIMIZER):
                matrix.mul_(2)
            for _ in range(20):
                matrix = matrix @ matrix
            torch.cuda.synchronize()
            profile.step(step)
    assert (tmp_path / "steps_3_4.rank_00000.memory.pickle").stat().st_size > 0
    found = summary(tmp_path)
    assert found["shares"]["compute"] > 0.5
    assert found["shares"]["optimizer"] > 0
    assert found["operators"][0]["name"] == "aten::mm"
