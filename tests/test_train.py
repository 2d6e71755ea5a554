"""The command has all of Hydra's own abilities, and starts what it was asked to start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from titan.config.load import compose, parse_config
from titan.run_directory import RunDirectory
from titan.version import __version__
from titan.worker import describe_long_warmup

from .conftest import Command
from .support.command import TINY, clean_environment, finish, json_lines, kill_all, start, wait_until


@pytest.fixture
def here(here: Path) -> Path:
    """A folder with a group file of the user's own."""
    (here / "mine" / "model").mkdir(parents=True)
    (here / "mine" / "model" / "pocket.yaml").write_text(
        "defaults: [llama3_debug, _self_]\nname: pocket\nn_layers: 3\n"
    )
    return here


def test_cfg_job_shows_what_a_command_line_composes(titan: Command) -> None:
    """--cfg job prints the config as YAML, references as they are written, and starts nothing."""
    shown = titan("model=llama3_8b", "training.steps=7", "--cfg", "job")
    assert shown.code == 0
    assert shown.err == ""
    config = yaml.safe_load(shown.out)
    assert config["model"]["name"] == "llama3_1_8b"
    assert config["training"]["steps"] == 7
    assert config["run"]["name"] == "${model.name}"
    assert not Path("runs").exists()


def test_cfg_job_resolved_can_be_read_back(titan: Command) -> None:
    """--cfg job --resolve prints a config without references, which titan reads as one of its own."""
    shown = titan("--cfg", "job", "--resolve")
    assert shown.code == 0
    assert "${" not in shown.out
    assert parse_config(shown.out, "here").run.name == "llama3_debug"


def test_flags_may_stand_between_overrides(titan: Command) -> None:
    """The place of a flag on the command line does not matter."""
    shown = titan("training.steps=7", "--cfg", "job", "optimizer.lr=0.5", "-p", "optimizer", "training.seed=3")
    assert shown.code == 0
    assert "lr: 0.5" in shown.out
    swept = titan("training.steps=-1", "-m", "training.seed=1,2")
    assert "training.steps = -1 is below 1\n" in swept.err


def test_a_part_of_the_config_can_be_shown(titan: Command) -> None:
    """--package shows one group only."""
    shown = titan("--cfg", "job", "-p", "optimizer")
    assert shown.code == 0
    assert "model" not in shown.out
    assert "lr: " in shown.out


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("defaults", "llama3_debug"),
        ("defaults-tree", "model: llama3_debug"),
        ("searchpath", "conf"),
        ("plugins", "BasicLauncher"),
        ("config", "parallelism"),
    ],
)
def test_info_answers(titan: Command, question: str, answer: str) -> None:
    """--info says where values come from, for each thing it can be asked."""
    shown = titan("--info", question)
    assert shown.code == 0
    assert answer in shown.out + shown.err


def test_help_lists_groups_and_keys(titan: Command) -> None:
    """--help shows every group with its options, the keys, and how to go on."""
    shown = titan("--help")
    assert shown.code == 0
    for word in ("model: llama2_13b, ", "parallelism: ddp, fsdp", "local_batch_size: ", "--cfg job", "--hydra-help"):
        assert word in shown.out


def test_hydra_help_lists_its_flags(titan: Command) -> None:
    """--hydra-help shows Hydra's own flags."""
    shown = titan("--hydra-help")
    assert shown.code == 0
    assert "--multirun" in shown.out


@pytest.mark.parametrize("own", [["--config-dir", "mine"], ["hydra.searchpath=[file://mine]"]])
def test_a_users_own_group_is_composed_like_titans(titan: Command, own: list[str]) -> None:
    """An option in a folder of one's own can be chosen, and can build on titan's."""
    shown = titan(*own, "model=pocket", "--cfg", "job")
    assert shown.code == 0
    model = yaml.safe_load(shown.out)["model"]
    assert (model["name"], model["n_layers"], model["dim"]) == ("pocket", 3, 256)


@pytest.mark.parametrize("typed", ["--cfg job", "--help", "--info defaults", "model=nope", "parallelism.tp=3"])
def test_what_starts_nothing_imports_nothing_heavy(here: Path, cache: Path, typed: str) -> None:
    """An answer that needs no rank comes without torch, and without what reads data or submits jobs."""
    process = start(["-X", "importtime", "-m", "titan.train", *typed.split()], here, clean_environment(cache))
    imported = re.findall(r"\| +([\w.]+)$", finish(process).err, flags=re.MULTILINE)
    assert "hydra" in imported
    heavy = {"torch", "numpy", "tiktoken", "datasets", "wandb", "submitit", "torchao", "transformers"}
    assert heavy.isdisjoint(imported)


COMPLETE = """
set -e
eval "$(titan --shell-completion install=bash)"
complete -p titan >&2
while read -r COMP_LINE; do
    words=($COMP_LINE); COMP_POINT=${#COMP_LINE}; COMP_CWORD=$((${#words[@]} - 1)); COMPREPLY=()
    hydra_bash_completion
    echo "${COMPREPLY[*]}"
done
"""


def test_tab_completes_groups_options_and_keys(here: Path, cache: Path) -> None:
    """After `eval "$(titan --shell-completion install=bash)"`, bash completes what can be typed behind titan."""
    scripts = Path(sys.executable).parent
    expected = {
        "titan model=llama3_4": ["model=llama3_405b"],
        "titan parallelism=fsdp_tp_": ["parallelism=fsdp_tp_cp_pp", "parallelism=fsdp_tp_pp"],
        "titan training.se": ["training.seed=", "training.seq_len="],
        "titan model=llama3_8b optimizer.wei": ["optimizer.weight_decay="],
    }
    done = subprocess.run(
        ["bash", "-c", COMPLETE],
        input="".join(f"{line}\n" for line in expected),
        cwd=here,
        env=clean_environment(cache, PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "-F hydra_bash_completion titan" in done.stderr
    assert [sorted(line.split()) for line in done.stdout.splitlines()] == list(expected.values())


def test_a_sweep_runs_every_point_and_sums_up(titan_process: Command, here: Path, text_file: Path) -> None:
    """--multirun runs each point in a folder of its own, goes on after one that fails, and ends with a table."""
    (here / "bad.txt").write_bytes(b"not \xff UTF-8")
    swept = f"data.path={text_file},bad.txt"
    finished = titan_process("--multirun", *TINY, swept, "run.dir=sweep", "training.seed=range(1,3)")
    assert finished.code == 65, finished.text
    assert "Traceback" not in finished.text
    assert "bad.txt, line 1" in finished.err

    lines = finished.out.splitlines()
    assert "== point 3: data.path=bad.txt training.seed=2" in lines
    titles, *rows = [re.split(r" {2,}", line) for line in lines[-5:]]
    assert titles == ["point", "status", "loss", "tok/s", "varied", "directory"]
    assert [row[1] for row in rows] == ["complete", "complete", "failed", "failed"]
    for number, row in enumerate(rows):
        assert row[0] == str(number)
        assert row[4].endswith(f"training.seed={number % 2 + 1}")
        assert row[5] == f"sweep/{number}"
    for number in (0, 1):
        last = json_lines(here / "sweep" / str(number) / "metrics.jsonl")[-1]
        assert last["step"] == 2
        assert rows[number][2] == f"{last['loss']:.4f}"
    assert rows[0][2] != rows[1][2]


def test_a_sweep_run_again_leaves_complete_points_and_tells_refused_ones(
    titan: Command, here: Path, trained: Path, text_file: Path
) -> None:
    """A point that may not continue its folder is told and leaves the others to run; complete ones stay as they are."""
    for point in ("0", "1"):
        (here / "sweep" / point).parent.mkdir(exist_ok=True)
        (here / "sweep" / point).mkdir()
        for name in ("config.yaml", "status.json", "metrics.jsonl"):
            (here / "sweep" / point / name).write_text((trained / name).read_text())
    finished = titan("-m", *TINY, f"data.path={text_file}", "run.dir=sweep", "training.seed=5,0", "metrics.log_every=1")
    assert finished.code == 2
    assert "training.seed=5, but the run has training.seed=0" in finished.err
    assert "sweep/1: this run is complete (step 2); nothing to do" in finished.out
    assert [line.split()[:2] for line in finished.out.splitlines()[-2:]] == [["0", "refused"], ["1", "complete"]]


def test_a_run_goes_on_when_nobody_reads_its_console(here: Path, cache: Path, text_file: Path) -> None:
    """`titan | head -1` trains to the end, in silence: the run directory has everything."""
    process = start(
        ["-m", "titan.train", *TINY, f"data.path={text_file}", "run.dir=run"], here, clean_environment(cache)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "run        run\n"
    process.stdout.close()
    process.stdout = None
    finished = finish(process)
    assert (finished.code, finished.err) == (0, "")
    assert RunDirectory(here / "run").read_status()["state"] == "complete"


def test_help_into_a_closed_pipe_is_no_defect(here: Path, cache: Path) -> None:
    """`titan --help | head -1` ends quietly, as any command does."""
    process = start(["-m", "titan.train", "--help"], here, clean_environment(cache))
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    finished = finish(process)
    assert (finished.code, finished.err) == (128 + signal.SIGPIPE, "")


def test_ctrl_c_stops_a_whole_sweep(here: Path, cache: Path, text_file: Path) -> None:
    """An interrupted point is saved and the last one: a user who stops a sweep does not stop it once a point."""
    arguments = ["-m", "titan.train", "-m", *TINY, f"data.path={text_file}", "run.dir=sweep", "training.seed=1,2"]
    process = start([*arguments, "training.steps=1000000"], here, clean_environment(cache))
    metrics = here / "sweep" / "0" / "metrics.jsonl"
    try:
        wait_until(lambda: process.poll() is not None or (metrics.exists() and bool(metrics.read_text())), "a step")
        os.killpg(process.pid, signal.SIGINT)
        finished = finish(process, 60)
    finally:
        kill_all(process)
    assert finished.code == 75, finished.text
    assert "Traceback" not in finished.text
    assert "and it is saved" in finished.text
    assert not (here / "sweep" / "1").exists()


def test_the_version_is_titans(titan: Command) -> None:
    """--version does not speak of Hydra."""
    shown = titan("--version")
    assert (shown.code, shown.out) == (0, f"titan {__version__}\n")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["compile=inductor", "compile.backend=aot_eagre"], "Try  compile.backend=aot_eager"),
        (["model.family=titan.models.llama:NOPE"], "Try  model.family=titan.models.llama:LLAMA"),
    ],
    ids=["a backend", "a family"],
)
def test_what_only_a_rank_can_know_is_told_before_the_data(
    titan_process: Command, text_file: Path, typed: list[str], words: str
) -> None:
    """A rank that refuses a name does so in a sentence, as the front end would, and has tokenised nothing."""
    finished = titan_process(*TINY, f"data.path={text_file}", "run.dir=run", *typed, XDG_CACHE_HOME="its_cache")
    assert finished.code == 2
    assert "Traceback" not in finished.text
    assert words in finished.text
    assert not Path("its_cache", "titan").exists()


def test_a_warm_up_longer_than_the_run_is_noted() -> None:
    """The run goes on; with as many steps as the warm-up has, the last one is at the peak."""
    config = compose(["training.steps=20"])
    assert describe_long_warmup(config) == ""
    config.training.steps = 19
    assert "lr_scheduler.warmup_steps = 20 exceeds training.steps = 19" in describe_long_warmup(config)
