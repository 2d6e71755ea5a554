"""Every command that README and docs/ show is run by a test, or tried as far as it goes, or says what it needs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import Command as Titan
from tests.support.command import REPOSITORY

from .commands import PAGES, Block, Command, all_commands, blocks, commands_of
from .trial import Untried, Wrong, try_command

RUN_BY: dict[str, str] = {
    "sbatch --nodes=4 launchers/slurm/titan.sbatch model=llama3_8b run.dir=/shared/runs/first": "tests/slurm/"
    "test_submit.py::test_the_batch_file_by_hand_is_survived_too",
    "PYTHONPATH=. python -m titan.train --config-dir my_configs model=my_gpt": "tests/documentation/"
    "test_adding_a_model.py::test_the_page_trains",
    "python -m titan.plan published": "tests/plan/test_published.py::test_the_page_shows_the_table_as_it_comes_out",
    "tail -n 1 runs/first/metrics.jsonl": "tests/documentation/test_quick_start.py::test_a_new_user_follows_the_page",
    "cat runs/first/status.json": "tests/documentation/test_quick_start.py::test_a_new_user_follows_the_page",
    "ls runs/first/logs": "tests/documentation/test_quick_start.py::test_a_new_user_follows_the_page",
}
"""Commands that nothing but running them can try, and the test that does, or does the same with a smaller model."""

NEEDS: dict[str, str] = {
    "pip install": "a package index; packaging is tests/test_packaging.py",
    "source": "a shell of one's own",
    "docker": "Docker; the file's stages are tests/launchers/test_docker.py",
    "sky": "a cloud; the task is tests/launchers/test_skypilot.py",
    "kubectl": "a Kubernetes cluster; the manifests are tests/launchers/test_kubernetes.py",
    "srun": "a job of SLURM: tests/slurm/test_submit.py::test_tasks_of_srun_are_ranks",
    "torchrun --max-restarts=3": "half a command",
    "torchrun ... -m torchtitan.train": "TorchTitan's own",
}
"""What a command needs that is not everywhere, by how it begins."""

MISTAKEN = {
    "python -m titan.train modle=llama3_8b parallelism.tp=3 training.stps=100": "3 problems in the composed config",
    "python -m titan.train optimizer.lr=fast": "optimizer.lr = fast is not a number",
}
"""Commands that are shown because they are wrong, and what is said of them."""

COMMANDS = sorted(
    {(command.text, command.needs): command for command in all_commands()}.values(), key=lambda it: it.place
)


@pytest.mark.parametrize("command", COMMANDS, ids=[command.place for command in COMMANDS])
def test_a_command_of_the_documentation_starts(command: Command) -> None:
    """It composes, or its arguments are understood, or a test runs it, or it says what it needs."""
    if command.needs or command.text in MISTAKEN or command.text in RUN_BY:
        return
    if any(command.text.startswith(beginning) for beginning in NEEDS):
        return
    try:
        try_command(command.words)
    except Wrong as error:
        if command.is_mention and "arguments are required" in str(error):
            return
        pytest.fail(f"{command.place}: {command.text}\n{error}")
    except Untried as error:
        pytest.fail(
            f"{command.place}: {command.text}\nNothing tries this ({error}). Name the test that runs it in RUN_BY, or "
            "say what it needs: <!-- needs: 8 GPUs --> above the block."
        )


def test_the_tests_that_run_commands_are_there() -> None:
    """A command that is run by a test names one that exists."""
    named = [*RUN_BY.values(), *re.findall(r"tests/\S+\.py::\w+", " ".join(NEEDS.values()))]
    for name in named:
        path, _, function = name.partition("::")
        tree = ast.parse((REPOSITORY / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_nothing_is_excused_that_no_page_shows() -> None:
    """The tables above hold no command that has gone from the pages."""
    shown = {command.text for command in COMMANDS}
    assert (RUN_BY.keys() | MISTAKEN.keys()) - shown == set()
    assert [beginning for beginning in NEEDS if not any(text.startswith(beginning) for text in shown)] == []


@pytest.mark.parametrize("text", MISTAKEN)
def test_a_mistake_is_answered_as_shown(titan: Titan, text: str) -> None:
    """What is printed of a wrong command is what the page shows, to the word."""
    finished = titan(*text.split()[3:])
    assert finished.code == 2
    assert MISTAKEN[text] in finished.err
    for path in PAGES:
        for block in blocks(path):
            if block.is_console and text in block.text:
                assert block.text.partition("\n")[2].strip() == finished.err.strip()


def planted(text: str, comment: str = "") -> list[Command]:
    """Return the commands of a block."""
    return commands_of(Block("page.md", 1, "", text, comment))


@pytest.mark.parametrize(
    "text",
    [
        "python -m titan.train modle=llama3_8b",
        "torchrun --nproc-per-node 8 -m titan.train parallelism.tp=3",
        "python -m titan.verify parity parallelism=tq",
        "python -m titan.verify parety",
        "python -m titan.convert export runs/first",
        "python -m titan.prepare show",
        "python -m titan.nothing here",
        "python benchmarks/nothing.py",
        "make tset",
        "launchers/nothing.sh",
    ],
)
def test_a_wrong_command_would_be_found(text: str) -> None:
    """A group, a key, a layout, an argument, a module, a file or a target that is not there does not pass."""
    (command,) = planted(text)
    with pytest.raises(Wrong):
        try_command(command.words)


def test_a_command_of_an_unknown_program_would_be_found() -> None:
    """Beside a command that is known, a line is a command too, and nobody has said who runs it."""
    (_, unknown) = planted("make test\nfrobnicate --now\n")
    with pytest.raises(Untried):
        try_command(unknown.words)


def test_blocks_are_read_as_a_shell_reads_them() -> None:
    """Prompts, comments, continued lines and output are told apart."""
    console = planted("$ make train   # comment\noutput = 3\n$ make test\n")
    assert [command.text for command in console] == ["make train", "make test"]
    joined = planted("A_B=1 python -m titan.train a=1 \\\n    b=2   # words\n")
    assert [command.text for command in joined] == ["A_B=1 python -m titan.train a=1 b=2"]
    assert planted("step 1/2  loss 3\nsaved in 3 s\n") == []
    assert planted("python -m titan.train\n", "picture") == []
    assert planted("sky launch x\n", "needs: a cloud")[0].needs == "a cloud"


def test_links_of_the_readme_lead_somewhere() -> None:
    """Every relative link of README and CONTRIBUTING is a file; those of docs/ are held by `make docs`."""
    for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md"):
        page = REPOSITORY / name
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert Path(page.parent / target).exists(), (name, target)
