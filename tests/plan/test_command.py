"""`python -m titan.plan` as a user types it."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.load import save_config
from titan.errors import ConfigError
from titan.plan import __main__ as command
from titan.plan import calibration
from titan.plan.devices import DEVICES, find_device, present_device
from titan.plan.planner import plan_config
from titan.run_directory import RunDirectory

Run = Callable[..., tuple[int, str, str]]

SMALL_CLUSTER = ("cluster=slurm", "cluster.nodes=2", "cluster.devices_per_node=8", "model=llama3_8b",
                 "training.seq_len=8192", "training.local_batch_size=2")  # fmt: skip
HUGE = ("cluster=slurm", "cluster.nodes=2048", "cluster.devices_per_node=8", "model=llama3_405b", "compile=inductor",
        "parallelism=fsdp_tp_pp", "parallelism.pp=16", "training.seq_len=8192", "training.local_batch_size=16",
        "activation_checkpoint=full")  # fmt: skip


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: its exit code, and what it says."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["titan.plan", *arguments])
        code = command.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_largest_question_is_answered_at_once(titan_process: Command) -> None:
    """405B on 16,384 GPUs, with the search, in under five seconds of one processor, and without PyTorch."""
    began = time.monotonic()
    finished = titan_process(*HUGE, module="titan.plan", PYTHONPROFILEIMPORTTIME="1")
    assert finished.code == 0, finished.text
    assert time.monotonic() - began < 60  # on a machine that does much else
    assert "  10. " in finished.out or " 10. " in finished.out
    imported = {line.rpartition("|")[2].strip() for line in finished.err.splitlines() if line.startswith("import time")}
    assert "titan.plan.search" in imported
    assert not {name for name in imported if name == "torch" or name.startswith("torch.")}


def test_what_is_to_be_pasted_is_what_was_planned(run: Run) -> None:
    """The overrides of a layout, behind the same command line, give a plan of the same memory and tokens/s."""
    code, said, _ = run(*SMALL_CLUSTER, "compile=inductor", "--best", "3")
    assert code in (0, 1)
    lines = said.splitlines()
    for place in ("  1. ", "  3. "):
        at = next(index for index, line in enumerate(lines) if line.startswith(place))
        code, again, _ = run(*SMALL_CLUSTER, "compile=inductor", *shlex.split(lines[at + 1]), "--best", "0")
        assert code == 0
        speed, memory = lines[at].split()[1], lines[at].split(" GiB")[0].split()[-1]
        assert f"tokens/s, {speed} a device" in again
        total = next(line for line in again.splitlines() if line.strip().startswith("total"))
        assert float(total.split()[1]) == pytest.approx(float(memory), abs=0.06)


def test_everything_that_is_assumed_is_on_the_screen(run: Run) -> None:
    """Every constant and every figure of the data sheet, and what was taken for granted about the machine."""
    _, said, _ = run("cluster=simulated", "model=llama3_8b", "--best", "0")
    for name in ("matmul_efficiency", "network_bandwidth", "outside_gib", "peak_tflops", "overlap"):
        assert f"  {name} " in said
    assert "--device h100, for nothing says another" in said
    _, said, _ = run("--device", "h200", "model=llama3_8b", "--best", "0")
    assert "8 devices a node, for cluster.devices_per_node is not set" in said


def test_flags_change_the_device(run: Run) -> None:
    """A larger memory, another peak and another assumption show in the plan."""
    _, said, _ = run(*SMALL_CLUSTER, "--device", "h200", "--memory-gib", "200", "--peak-tflops", "500",
                     "--assume", "matmul_efficiency=0.7", "--best", "0")  # fmt: skip
    assert "200 less 2" in said
    assert "of 500 TFLOP/s" in said
    assert "peak_tflops, memory_gib as given" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "h10"), "--device h100"),
        (("--assume", "luck=1"), "--assume matmul_efficiency"),
        (("--calibrate", "nowhere"), "There is no such folder"),
        (("--calibrate", "."), "no config.yaml"),
        (("--store", "file"), "--calibrate <run.dir> --store FILE"),
        (("--calibration", "nowhere.json"), "--calibrate <run.dir> --store FILE"),
        (("parallelism.tp=3",), "cluster.devices_per_node=3"),
        (("paralelism.tp=3",), "parallelism.tp"),
        (("--device", "h100", "cluster.device=cpu"), "--device cpu"),
        (("model.family=titan.models.llama:LLAMA",), "cluster=simulated"),
        (("published", "x"), "python -m titan.plan published"),
    ],
)
def test_mistakes_are_refused_with_what_to_type(run: Run, arguments: tuple[str, ...], words: str) -> None:
    """Exit code 2, no traceback, the way out."""
    if arguments[0] == "published":
        code, _, error = run(*arguments)
    else:
        code, _, error = run(*arguments, "--best", "0")
    assert code == 2
    assert words in error
    assert "Traceback" not in error


def test_a_wrong_config_is_refused_as_titan_train_does(run: Run, titan_process: Command) -> None:
    """The same text and the same exit code."""
    wrong = ("cluster.nodes=2", "model.n_kv_heads=3", "training.seq_len=0")
    code, _, error = run(*wrong)
    trained = titan_process(*wrong)
    assert (code, error.strip()) == (trained.code, trained.err.strip()) == (2, error.strip())


def test_what_does_not_fit_says_on_how_many_devices_it_would(run: Run) -> None:
    """Exit code 1, how much is missing, and the least number of devices."""
    code, said, _ = run("cluster=slurm", "cluster.nodes=1", "cluster.devices_per_node=8", "model=llama3_405b",
                        "training.seq_len=8192", "training.local_batch_size=1")  # fmt: skip
    assert code == 1
    assert "does NOT fit" in said
    least = int(said.split("on which one does: ")[1].split(",")[0])
    assert least in (64, 128)  # 405B x 16 bytes are 6,048 GiB, of 77 on each
    assert "cannot be, the simplest first" in said


def test_a_cpu_has_no_peak_until_a_run_has_shown_it(run: Run, tmp_path: Path) -> None:
    """No time is invented; a run of the machine gives a rate, its error is printed, and a file keeps it."""
    code, said, _ = run()
    assert code == 0
    assert "not predicted" in said
    folder = tmp_path / "run"
    folder.mkdir()
    directory = RunDirectory(folder)
    rows = [{"step": step, "loss": 1.0, "step_seconds": 0.5 if step > 1 else 9.0, "memory_gib": 1.0}
            for step in range(1, 8)]  # fmt: skip
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory.write_status("complete", step=7)
    model = ("model.dim=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.ffn_dim=64",
             "model.vocab_size=320")  # fmt: skip
    shape = (*model, "training.seq_len=32", "training.local_batch_size=2")
    save_config(check_config(compose(shape), Machine()), directory.config)
    same = (*shape, "--best", "0")
    code, said, error = run(*same, "--calibrate", str(folder), "--store", str(tmp_path / "kept.json"))
    assert code == 0, error
    assert "6 logged steps of 0.500 s" in said
    assert re.search(r"not fitted to: [+-]0\.0%", said)
    assert "0.500 s" in next(line for line in said.splitlines() if line.strip().startswith("step "))
    code, again, _ = run(*same, "--calibration", str(tmp_path / "kept.json"))
    assert said.endswith(again)
    code, _, error = run("--calibrate", str(folder))
    assert code == 2
    assert "another model" in error
    code, _, error = run(*SMALL_CLUSTER, "--calibration", str(tmp_path / "kept.json"))
    assert code == 2
    assert "--device cpu" in error
    directory.write_status("running")
    code, _, error = run(*same, "--calibrate", str(folder))
    assert code == 2
    assert "wait until it has ended" in error
    directory.write_status("complete")
    directory.metrics.write_text("")
    code, _, error = run(*same, "--calibrate", str(folder))
    assert code == 2
    assert "0 logged steps" in error


def test_a_calibration_with_a_gpu_fits_both_constants() -> None:
    """What a plan says of a run, fitted to its own answer, gives back the constants it was made with."""
    from titan.plan.assumptions import Assumptions

    plan = plan_config(compose(SMALL_CLUSTER), "h100", Assumptions(matmul_efficiency=0.6, memory_overhead=1.3))
    assert plan.timing is not None
    measured = calibration.Measured(plan.config, [plan.timing.step] * 4, plan.memory_gib, "a run")
    found = calibration.calibrate(measured, find_device("h100"), Assumptions())
    assert found.matmul_efficiency == pytest.approx(0.6, rel=1e-4)
    assert found.memory_overhead == pytest.approx(1.3, rel=1e-4)
    assert found.speed_error == pytest.approx(0, abs=1e-4)


def test_a_plan_can_be_shown() -> None:
    """As text and as a table for a notebook; with every number that the command prints."""
    plan = plan_config(compose(SMALL_CLUSTER), machine=Machine())
    assert "tokens/s" in str(plan)
    assert "<table>" in plan._repr_html_()
    assert plan.mfu is not None
    assert 0 < plan.mfu < 1
    assert plan.device.name == "h100"
    with pytest.raises(ConfigError):
        plan_config(compose([*SMALL_CLUSTER, "training.steps=0"]))


def test_the_machine_s_gpu_is_found_without_torch(tmp_path: Path) -> None:
    """By the name that the driver gives it; one that the table does not have is none."""
    for name, device in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100_40gb"), ("L4", None)):
        file = tmp_path / name / "0000:00" / "information"
        file.parent.mkdir(parents=True)
        file.write_text(f"Model: \t\t {name}\n")
        assert present_device(tmp_path / name) == device
    assert present_device(tmp_path / "nothing") is None
    assert all(found.name == name for name, found in DEVICES.items())
