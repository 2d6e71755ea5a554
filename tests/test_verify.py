"""`python -m titan.verify parity`: the table, the exit codes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.configs import compose
from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.schema import Device
from titan.errors import ConfigError
from titan.verify.parity import FLOAT8, FLOAT32, build_layout, build_reference, shrink_config, tolerance_of

from .conftest import Command
from .support.command import FAULT, TINY

LAYOUT = (*TINY, "cluster.devices_per_node=2", "parallelism=fsdp_tp", "parallelism.tp=2")


def parity(titan_process: Command, text_file: Path, *arguments: str, **variables: str):
    """Run the command on some text."""
    return titan_process("parity", *LAYOUT, f"data.path={text_file}", *arguments, module="titan.verify", **variables)


def test_a_layout_that_is_the_same(titan_process: Command, text_file: Path, here: Path) -> None:
    """Exit code 0, a table with every step, and nothing left behind."""
    finished = parity(titan_process, text_file, "--steps", "2", "training.steps=5")
    assert finished.code == 0, finished.text
    lines = finished.out.splitlines()
    assert lines[-1] == "verdict: the same"
    assert [line.split()[:2] for line in lines if line.startswith("step")] == [
        ["step", "1"], ["step", "1"], ["step", "2"], ["step", "2"],
    ]  # fmt: skip
    assert "tp 2 = 2 ranks" in finished.out
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_a_planted_error_turns_the_verdict(titan_process: Command, text_file: Path, here: Path) -> None:
    """Gradients one hundredth too large on one rank: exit code 1, and the parameter that shows it most."""
    finished = parity(
        titan_process, text_file, "--json", "--keep", "kept", PYTHONPATH=str(FAULT), PLANTED_FAULT="scale:1:1"
    )
    assert finished.code == 1, finished.text
    report = json.loads(finished.out)
    assert report["verdict"] == "different"
    assert report["difference"]["gradient"] > report["tolerance"]["gradient"]
    assert report["difference"]["gradient_of"].endswith(".weight")
    assert report["parallelism"]["tp"] == 2
    assert len(report["steps"]) == 2  # all that the config has
    assert {folder.name for folder in (here / "kept").iterdir()} == {"layout", "one_process"}


@pytest.mark.slow
def test_a_rank_that_fails_is_named_and_its_log_kept(titan_process: Command, text_file: Path) -> None:
    """What breaks is no verdict: the error, and where to read on."""
    finished = parity(titan_process, text_file, PYTHONPATH=str(FAULT), PLANTED_FAULT="error:1:1")
    assert finished.code == 1
    assert "rank 1 failed first" in finished.err
    assert "a planted error" in finished.err
    log = next(line.split("log:")[1].strip() for line in finished.err.splitlines() if "log:" in line)
    assert Path(log).is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["parity", "model=llama3_debugg"], "model=llama3_debug"),
        (["parity", "parallelism.tp=3"], "parallelism.tp"),
        (["parity", "experiment=llama3_70b_256gpu"], "cluster.devices_per_node=16"),
        (["parity", "float8=rowwise"], "float8.emulate=true"),
        (["parity", "--steps", "0"], "0 is not positive"),
        ([], "usage: python -m titan.verify parity|resume"),
        (["resum"], "usage: python -m titan.verify parity|resume"),
    ],
)
def test_a_mistake_starts_nothing(titan_process: Command, arguments: list[str], words: str) -> None:
    """Exit code 2, no traceback, and what to type."""
    finished = titan_process(*arguments, module="titan.verify")
    assert finished.code == 2
    assert words in finished.text
    assert "Traceback" not in finished.text


def layout(*overrides: str):
    """Return a layout as the command resolves it."""
    return build_layout(compose(overrides), Path("/runs/layout"), shrink=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=llama3_70b", "parallelism=fsdp_tp"),
        ("model=llama3_405b", "parallelism=fsdp_tp_cp_pp", "parallelism.cp_method=all_to_all"),
        ("model=llama2_7b", "parallelism=fsdp_pp", "parallelism.pp_schedule=ZBVZeroBubble"),
        ("model=llama3_2_1b", "parallelism=hsdp", "float8=rowwise", "float8.emulate=true"),
    ],
)
def test_shrinking_keeps_what_the_layout_cuts(overrides: tuple[str, ...]) -> None:
    """A shrunk config passes every rule, is small, and keeps the family traits of its model."""
    config = compose([*overrides, "training.local_batch_size=4"])
    small = layout(*overrides, "training.local_batch_size=4")
    assert small.model.dim <= 2048
    assert small.model.n_layers <= 8
    assert small.model.n_heads // small.model.n_kv_heads == config.model.n_heads // config.model.n_kv_heads
    assert small.model.tie_embeddings == config.model.tie_embeddings
    assert small.model.rope_scaling == config.model.rope_scaling
    assert replace(small.parallelism, dp_shard=0) == replace(
        config.parallelism, dp_shard=0, dp_replicate=small.parallelism.dp_replicate
    )


def test_an_open_degree_becomes_two() -> None:
    """There has to be something to compare with one process; what the user says is kept."""
    assert layout("parallelism=fsdp").parallelism.dp_shard == 2
    assert layout("parallelism=fsdp_tp", "parallelism.tp=4").parallelism.dp_shard == 2
    assert layout("parallelism=fsdp", "cluster.devices_per_node=3").parallelism.dp_shard == 3


def test_the_reference_is_one_plain_process_on_the_same_rows() -> None:
    """No parallelism, nothing compiled or recomputed; the same model, rows and precision."""
    config = layout("parallelism=fsdp_tp", "parallelism.tp=2", "compile=inductor", "activation_checkpoint=full")
    reference = build_reference(config, Path("/runs/one"))
    assert reference.cluster.devices_per_node == 1
    assert not reference.compile.enable
    assert reference.activation_checkpoint.mode.name == "none"
    assert (reference.model, reference.data, reference.training) == (config.model, config.data, config.training)
    assert check_config(reference, Machine()).parallelism.dp_shard == 1
    assert config.cluster.device is Device.cpu


def test_tolerances_follow_the_formats() -> None:
    """Float32 is held to rounding; bfloat16 and float8 to their own steps."""
    assert tolerance_of(layout()) == FLOAT32
    assert tolerance_of(layout("training.param_dtype=bfloat16")).loss == 1e-3
    assert tolerance_of(layout("float8=rowwise", "float8.emulate=true")) == FLOAT8


def test_too_many_processes_are_refused() -> None:
    """A recipe for hundreds of GPUs is not started here; the error says what would do."""
    with pytest.raises(ConfigError, match="512 ranks are 512 processes"):
        layout("experiment=llama3_405b_512gpu")
    assert shrink_config(compose(["experiment=llama3_405b_512gpu"])).model.n_layers > 8


def resume(titan_process: Command, text_file: Path, *arguments: str, **variables: str):
    """Run the command on some text."""
    return titan_process("resume", *TINY, f"data.path={text_file}", *arguments, module="titan.verify", **variables)


def findings(here: Path) -> dict[str, str]:
    """Return what the proof says of each thing that was compared."""
    proof = json.loads((here / "resume_proof.json").read_text())
    return {finding["what"]: finding["detail"] if finding["is_same"] else "different" for finding in proof["findings"]}


def test_an_interrupted_run_is_the_undisturbed_one(titan_process: Command, text_file: Path, here: Path) -> None:
    """Exit code 0, a verdict, and a proof in which everything is the same bit for bit."""
    finished = resume(titan_process, text_file, "checkpoint=async_pinned")
    assert finished.code == 0, finished.text
    assert "verdict: the same" in finished.out
    found = findings(here)
    assert list(found) == [
        *("state after step 3, saved and loaded", "rows of every step", "loss of every step"),
        *("gradient norm of every step", "weights and optimizer after step 6"),
    ]
    assert [found[what] for what in list(found)[2:]] == 3 * ["bit for bit"]
    proof = json.loads((here / "resume_proof.json").read_text())
    assert (proof["verdict"], proof["stopped_after"], len(proof["losses"])) == ("the same", 3, 6)
    assert [path.name for path in here.iterdir()] == ["resume_proof.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "onto"),
    [
        ("cluster.devices_per_node=2 parallelism.tp=2", "cluster.devices_per_node=1 parallelism.tp=1"),
        ("cluster.devices_per_node=2 parallelism.pp=2", "parallelism.pp=1 parallelism.cp=2"),
        (
            "cluster.devices_per_node=4 parallelism=hsdp parallelism.dp_replicate=2",
            "cluster.devices_per_node=3 parallelism.dp_replicate=1 training.global_batch_size=12",
        ),
    ],
)
def test_a_run_goes_on_on_another_layout(
    titan_process: Command, text_file: Path, here: Path, first: str, onto: str
) -> None:
    """Between any two layouts: the state loaded is the one saved, the rows are the same, losses to rounding."""
    rows = [] if "global_batch_size" not in onto else ["training.global_batch_size=12", "training.local_batch_size=1"]
    finished = resume(titan_process, text_file, *first.split(), *rows, "--onto", onto, timeout_seconds=240)
    assert finished.code == 0, finished.text
    found = findings(here)
    assert "different" not in found.values()
    assert "digest" in found["state after step 3, saved and loaded"]


@pytest.mark.slow
def test_a_resumed_run_that_differs_is_found(titan_process: Command, text_file: Path, here: Path) -> None:
    """Gradients one hundredth too large, in a step of the undisturbed run only: exit code 1, and what differs."""
    finished = resume(titan_process, text_file, PYTHONPATH=str(FAULT), PLANTED_FAULT="scale:0:call:4")
    assert finished.code == 1, finished.text
    assert "verdict: different" in finished.out
    found = findings(here)
    assert found["rows of every step"] == "6 digests"
    assert found["gradient norm of every step"] == "different"
    assert found["weights and optimizer after step 6"] == "different"


def test_a_run_is_interrupted_within(titan_process: Command, text_file: Path, here: Path) -> None:
    """Not before its first step or after its last; nothing is started."""
    finished = resume(titan_process, text_file, "--stop-after", "6")
    assert finished.code == 2
    assert "--stop-after 6 is not between 0 and --steps 6" in finished.err
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_a_streaming_run_goes_on_on_another_layout(titan_process: Command, text_file: Path, here: Path) -> None:
    """From two data ranks to one in a pipeline with shared sequences, with a worker: the rows of every step.

    Both what the ranks were given and what the runs have written down of it.
    """
    text = text_file.read_text()
    lines = "".join(json.dumps({"text": text[at : at + 70]}) + "\n" for at in range(0, min(len(text), 6000), 70))
    (here / "texts.jsonl").write_text(lines)
    streaming = ["data=jsonl", f"data.path={here / 'texts.jsonl'}", "data.streaming=true", "data.streams=3"]
    streaming += ["data.shuffle_window=5", "data.packing=best_fit", "data.mask_documents=true"]
    streaming += ["training.global_batch_size=8", "cluster.devices_per_node=2"]
    onto = "cluster.devices_per_node=4 parallelism.dp_shard=1 parallelism.pp=2 parallelism.cp=2 data.num_workers=1"
    words = (*TINY, *streaming, "--keep", str(here / "runs"), "--onto", onto)
    finished = titan_process("resume", *words, module="titan.verify", timeout_seconds=240)
    assert finished.code == 0, finished.text
    assert "different" not in findings(here).values()
    ours, theirs = ((here / "runs" / name / "data.jsonl").read_text() for name in ("interrupted", "undisturbed"))
    assert ours == theirs
    assert len(ours.splitlines()) == 6
