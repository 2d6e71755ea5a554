"""What the files of launchers/ say: their objects, the command that each starts on a node, the overrides in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..support.command import REPOSITORY

LAUNCHERS = REPOSITORY / "launchers"
KUBERNETES = LAUNCHERS / "kubernetes"
SKYPILOT = LAUNCHERS / "skypilot" / "titan.yaml"
DOCKERFILE = LAUNCHERS / "docker" / "Dockerfile"

Object = dict[str, Any]

_COMMAND = re.compile(r"titan\.train|TITAN_ARGS|launchers/\S+\.sh")
_OVERRIDE = re.compile(r"""(?:(?<=\s)|(?<=")|(?<='))([+~]{0,2}[a-z]\w*(?:\.\w+)*=(?:"[^"]*"|'[^']*'|[^\s"'`]+))""")


def all_files() -> list[Path]:
    """Return every file of launchers/."""
    return sorted(path for path in LAUNCHERS.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def objects(name: str) -> list[Object]:
    """Return the Kubernetes objects of a file."""
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def object_of(name: str, kind: str) -> Object:
    """Return a file's only object of a kind."""
    (found,) = (each for each in objects(name) if each["kind"] == kind)
    return found


def pod_templates() -> dict[str, Object]:
    """Return the template of every pod that trains, by where it is."""
    replicas = object_of("pytorchjob.yaml", "PyTorchJob")["spec"]["pytorchReplicaSpecs"]
    (replicated,) = object_of("trainjob.yaml", "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    return {
        "job": object_of("job.yaml", "Job")["spec"]["template"],
        "pytorchjob master": replicas["Master"]["template"],
        "pytorchjob worker": replicas["Worker"]["template"],
        "trainjob": replicated["template"]["spec"]["template"],
    }


def job_specs() -> dict[str, Object]:
    """Return the specification of every Job, by where it is."""
    (replicated,) = object_of("trainjob.yaml", "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    return {"job": object_of("job.yaml", "Job")["spec"], "trainjob": replicated["template"]["spec"]}


def commands() -> dict[str, list[str]]:
    """Return the command that each manifest starts on a node."""
    containers = {where: template["spec"]["containers"][0] for where, template in pod_templates().items()}
    containers["trainjob"] = object_of("trainjob.yaml", "TrainJob")["spec"]["trainer"]
    return {where: [*container["command"], *container["args"]] for where, container in containers.items()}


def overrides_in(text: str) -> Iterator[list[str]]:
    """Return the overrides of each command line in a text, comments included; shell variables become a letter."""
    joined = re.sub(r"\\\n[#\s]*", " ", text)
    for line in joined.splitlines():
        command = _COMMAND.search(line)
        if command and (found := _OVERRIDE.findall(line, command.end())):
            yield [re.sub(r"\$\{[^}]*\}|\$\w+", "x", override.replace('"', "").replace("'", "")) for override in found]
