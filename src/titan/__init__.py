"""titan: composable 4D-parallel Llama training in native PyTorch.

What a notebook or a program calls is here and no more. Importing this package imports neither torch nor hydra, and a
function imports what it needs when it is called.

Three of the functions share their names with packages of titan's: `launch`, `metrics` and `plan`. Python binds a
package to its parent's attribute whenever anything in it is imported, and `import titan.launch.local` would put a
module in the place of the function. So that both work in any order of imports, a package that is bound here under the
name of one of these functions becomes callable, as that function: `_Titan` does it, and the packages know nothing of
it. Type checkers see the function; `from titan.launch import local` goes by files and is the package's in any case.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from titan.version import __version__

if TYPE_CHECKING:
    from titan.api.difference import Difference
    from titan.api.run import Run
    from titan.api.table import Table
    from titan.api.tree import Tree
    from titan.config.schema import TitanConfig
    from titan.plan.planner import Plan

__all__ = ["__version__", "attach", "compose", "diff", "launch", "metrics", "plan", "show"]


def compose(*overrides: str, config_dir: str | Path | None = None) -> TitanConfig:
    """Compose a config as `python -m titan.train` would, in a notebook or a program; starts nothing.

    Whatever else uses Hydra in this process finds its state as it was, and threads may compose at the same time.

    Args:
        overrides: What would be typed behind the command, such as "model=llama3_8b".
        config_dir: A folder of one's own groups, beside titan's.

    Returns:
        Typed dataclasses. What the command would fill in from the machine, -1 or null, is as it was written.

    Raises:
        ConfigError: If an override names an unknown group, option or key, or a value of the wrong type.
        TypeError: If an override is no text, a list for instance.
    """
    from dataclasses import replace

    from titan.config.load import compose as load
    from titan.errors import ConfigError

    for each in overrides:
        if not isinstance(each, str):
            kind = type(each).__name__
            raise TypeError(f"titan.compose takes each override as a text, not {kind}: titan.compose(*overrides)")
    try:
        return load(overrides, None if config_dir is None else str(config_dir))
    except ConfigError as error:
        raise ConfigError(
            replace(problem, suggestion="titan.launch(titan.compose(...))   for each of them")
            if problem.suggestion.startswith("--multirun")
            else problem
            for problem in error.problems
        ) from error


def show(config: TitanConfig | Run | str | Path) -> Tree:
    """Return a config as a tree: text in a terminal, HTML in a notebook; what differs from the defaults is marked.

    Args:
        config: A config, a run, its directory, or the path of a config.yaml.

    Raises:
        CommandError: If a path leads to no config.
        ConfigError: If the file there was not written by this version's schema.
    """
    from titan.api.tree import Tree

    return Tree.of(config)


def diff(a: TitanConfig | Run | str | Path, b: TitanConfig | Run | str | Path) -> Difference:
    """Return the keys in which two configs differ, and which of them would make another run of it.

    A config that was only composed is filled in for this machine first, as launching it would, where the other one is
    of a run. A run.dir that nobody chose, with the time of day in it, is no difference.

    Args:
        a: A config, a run, its directory, or the path of a config.yaml.
        b: The same.

    Raises:
        CommandError: If a path leads to no config.
        ConfigError: If the file there was not written by this version's schema.
    """
    from titan.api.difference import Difference

    return Difference.of(a, b)


def plan(config: TitanConfig) -> Plan:
    """Return what a config would need and how fast it may be on its cluster, without starting anything.

    Args:
        config: From `compose`.

    Raises:
        ConfigError: If the config is wrong.
    """
    from titan.plan.planner import plan_config

    return plan_config(config)


def launch(config: TitanConfig) -> Run:
    """Start a run as `python -m titan.train` would, here or on SLURM, and return at once.

    The same checks come first, the config is frozen into its run directory, and a directory that holds the run already
    resumes it. The run is a process of its own: it goes on when the notebook is interrupted or ends, and
    `titan.attach` finds it again.

    Args:
        config: From `compose`.

    Raises:
        ConfigError: If the config is wrong, or its directory is another run's or in use; nothing was started.
        SubmissionFailed: If SLURM refuses the job.
    """
    from titan.api.run import start

    return start(config)


def attach(run_dir: str | Path) -> Run:
    """Return the handle of a run from its directory, whoever has started it, and whether or not it has ended.

    Args:
        run_dir: The run's directory.

    Raises:
        CommandError: If it is none.
    """
    from titan.api.run import find

    return find(run_dir)


def metrics(run_dir: Run | str | Path) -> Table:
    """Return what a run has logged so far as a table: a row a logged step; validations are a table in it.

    Args:
        run_dir: A run, or its directory.

    Raises:
        CommandError: If there is no such directory.
    """
    from titan.api.table import read_table

    return read_table(run_dir)


class _Titan(ModuleType):
    """This package, which makes a package that is bound to the name of a function callable, as that function."""

    def __setattr__(self, name: str, value: Any) -> None:
        function = _functions.get(name)
        if function is not None and isinstance(value, ModuleType):
            value.__class__ = _callable_package(function)
        super().__setattr__(name, value)


def _callable_package(function: FunctionType) -> type[ModuleType]:
    body = {
        "__call__": staticmethod(function),
        "__wrapped__": staticmethod(function),  # where inspect finds the signature
        "__reduce__": lambda module: (
            importlib.import_module,
            (module.__name__,),
        ),  # so that a process pool can take it
    }
    return type("CallablePackage", (ModuleType,), body)


_functions = {name: globals()[name] for name in __all__ if isinstance(globals()[name], FunctionType)}
sys.modules[__name__].__class__ = _Titan
for _name in _functions:  # after a reload of this file alone
    if (_package := sys.modules.get(f"{__name__}.{_name}")) is not None:
        setattr(sys.modules[__name__], _name, _package)
