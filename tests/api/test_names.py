"""titan's public names: few, typed, documented; and both they and the packages of the same names work, in any order."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pickle
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import titan

FUNCTIONS = [name for name in titan.__all__ if name != "__version__"]
SHARED = ("launch", "metrics", "plan")
"""Names of functions that are names of packages too."""


def in_a_fresh_process(program: str, folder: Path) -> str:
    """Run a program in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_these() -> None:
    """A name more or less is a decision, and not an accident."""
    assert titan.__all__ == ["__version__", "attach", "compose", "diff", "launch", "metrics", "plan", "show"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_documented_and_typed(name: str) -> None:
    """Docstring, annotations of all parameters and of what is returned, and every parameter in the docstring."""
    function = getattr(titan, name)
    signature = inspect.signature(function)
    text = inspect.getdoc(getattr(function, "__wrapped__", function)) or ""
    assert signature.return_annotation is not inspect.Signature.empty
    assert len(text.splitlines()) > 1
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert f"{parameter.name}:" in text, parameter


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "plan"])
def test_what_is_returned_can_be_found_by_its_annotation(name: str) -> None:
    """The types in the signatures are there, and their public members are documented."""
    from titan.api.difference import Difference
    from titan.api.run import Run
    from titan.api.table import Table
    from titan.api.tree import Tree
    from titan.config.schema import TitanConfig

    types = {each.__name__: each for each in (Difference, Run, Table, Tree, TitanConfig)} | {"Path": Path}
    function = getattr(titan, name)
    hints = typing.get_type_hints(getattr(function, "__wrapped__", function), globalns=types)
    returned = hints["return"]
    for member, value in vars(returned).items():
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{returned.__name__}.{member}"


def test_importing_titan_imports_neither_torch_nor_hydra(tmp_path: Path) -> None:
    """So that composing and looking stay fast."""
    program = "import sys, titan; print([m for m in ('torch', 'hydra', 'omegaconf', 'submitit') if m in sys.modules])"
    assert in_a_fresh_process(program, tmp_path) == "[]"


IMPORTS = {
    "import titan.launch.local": "titan.launch.local.launch_local",
    "import titan.metrics.sinks": "titan.metrics.sinks.JsonLines",
    "from titan.launch import environment": "environment.current_machine",
    "from titan import launch": "launch",
    "import titan.metrics as m": "m",
}


CHECK = """
import inspect
for name, parameter in (("launch", "config"), ("metrics", "run_dir")):
    assert list(inspect.signature(getattr(titan, name)).parameters) == [parameter], name
calls = {"there is no such directory": lambda: titan.metrics("nowhere"), "takes a config": lambda: titan.launch(3)}
for wanted, call in calls.items():
    try:
        call()
    except (TypeError, titan.errors.CommandError) as error:
        assert wanted in str(error), error
    else:
        raise AssertionError(wanted)
"""

IN_CHILDREN = """
import os, sys, hydra, omegaconf  # but not titan, which every child imports anew
for program in sys.stdin.read().split("----"):
    child = os.fork()
    if child == 0:
        try:
            assert not [name for name in sys.modules if name.startswith("titan")]
            exec(program, {})
        except BaseException as error:
            print(program, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, program
print("all", flush=True)
"""


def test_functions_and_packages_work_in_any_order_of_imports(tmp_path: Path) -> None:
    """titan.launch and titan.metrics can be called, and what is in the packages is reached, whatever came first."""
    programs = []
    for order in itertools.permutations(IMPORTS, 2):
        reached = [f"assert callable({IMPORTS[line]})" for line in order]
        programs.append("\n".join(["import titan", *order, "import titan.errors", *reached, CHECK]))
    done = subprocess.run(
        [sys.executable, "-c", IN_CHILDREN],
        cwd=tmp_path,
        input="----".join(programs),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout.strip() == "all", done.stdout + done.stderr


def test_a_package_imported_before_anything_else_is_callable(tmp_path: Path) -> None:
    """The package binds itself to titan while titan.launch was never looked at."""
    program = "import titan.launch.slurm, titan; print(type(titan.launch).__name__, titan.launch.slurm.__name__)"
    assert in_a_fresh_process(program, tmp_path) == "CallablePackage titan.launch.slurm"


def test_a_callable_package_is_pickled_as_itself() -> None:
    """A process pool can be given `titan.metrics`, before and after the package was imported."""
    importlib.import_module("titan.metrics.sinks")

    assert pickle.loads(pickle.dumps(titan.metrics)) is titan.metrics


def test_plan_calls_the_planner(tmp_path: Path) -> None:
    """titan.plan(config) is plan_config(config) of the package of the same name, whichever is looked at first."""
    program = """
import sys, types
import titan
package, planner = types.ModuleType("titan.plan"), types.ModuleType("titan.plan.planner")
package.__path__, package.planner, planner.plan_config = [], planner, lambda config: ("planned", config)
sys.modules |= {"titan.plan": package, "titan.plan.planner": planner}
first = titan.plan("a config")
titan.plan = package  # what importing it does
print(first, titan.plan("a config"), titan.plan.planner is planner)
"""
    assert in_a_fresh_process(program, tmp_path) == "('planned', 'a config') ('planned', 'a config') True"


def test_a_test_may_put_another_function_in_the_place_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only packages become callable; anything else is bound as ever."""
    monkeypatch.setattr(titan, "launch", len)
    assert titan.launch is len
