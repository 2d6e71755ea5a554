"""SkyPilot's own Python package, in an environment of its own, made when first asked for.

It needs click below 8.2, which wandb and huggingface_hub exclude, so it cannot live beside titan.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).with_name("skypilot.txt")

READ = """
import json, sys
import sky
from sky import exceptions, optimizer
from sky.skylet import constants
from sky.utils import dag_utils, schemas

# Its command line passes on what it does not know in a few places, for plugins; its server refuses it.
schemas._allow_additional_properties = lambda: False
path, overrides = sys.argv[1], json.loads(sys.argv[2])
try:
    task = sky.Task.from_yaml(path)
    task.update_envs(overrides)
    dag = dag_utils.load_chain_dag_from_yaml(path)
except (ValueError, exceptions.InvalidSkyPilotConfigError) as error:
    print(json.dumps({"refused": str(error)}))
    sys.exit()
try:
    optimizer.Optimizer.optimize(dag, quiet=True)
    stopped_by = None
except Exception as error:
    stopped_by = type(error).__name__
(resources,) = task.resources
(mount,) = task.storage_mounts.items()
print(json.dumps({
    "tasks": len(dag.tasks),
    "num_nodes": task.num_nodes,
    "accelerators": resources.accelerators,
    "use_spot": resources.use_spot,
    "job_recovery": resources.job_recovery,
    "envs": task.envs,
    "secrets": {name: value.get_secret_value() for name, value in task.secrets.items()},
    "mount": [mount[0], mount[1].name, mount[1].mode.value],
    "run": task.run,
    "setup": task.setup,
    "stopped_by": stopped_by,
    "sets": [value for value in vars(constants).values() if str(value).startswith("SKYPILOT_")],
}))
"""


def skypilot_python() -> Path:
    """Return the interpreter of SkyPilot's environment in the user's cache; installs it there, once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan" / "test_environments"
    environment = cache / "skypilot"
    installed = environment / "installed.txt"
    if not installed.exists() or installed.read_text() != REQUIREMENTS.read_text():
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        install = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS]
        subprocess.run(install, check=True)
        shutil.copy(REQUIREMENTS, installed)
    return environment / "bin" / "python"


def read_task(path: Path, home: Path, **envs: str) -> dict[str, Any]:
    """Return what SkyPilot reads in a task's file; `refused` says why, if it does not."""
    done = subprocess.run(
        [skypilot_python(), "-c", READ, path, json.dumps(envs)],
        env={"HOME": str(home), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
