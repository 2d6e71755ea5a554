"""The command of every launcher trains: started as two nodes of one rank, on this machine, as the platform would."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from ..support.command import REPOSITORY, TINY, clean_environment, finish, free_port, json_lines, kill_all, wait_until
from ..support.command import Started as Process
from .files import SKYPILOT, commands, object_of

NODES = 2


@dataclass
class Node:
    """What a platform starts on one node."""

    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)


def replaced(words: list[str], **flags: str) -> list[str]:
    """Return a command with other values of some flags; each has to be there."""
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}="
        (index,) = (index for index, word in enumerate(words) if word.startswith(flag))
        words = [*words[:index], flag + value, *words[index + 1 :]]
    return words


def with_overrides(command: list[str], overrides: list[str]) -> list[str]:
    """Return a manifest's command with other overrides, and this Python."""
    assert command[0] == "python"
    return [sys.executable, *command[1 : command.index("titan.train") + 1], *overrides]


def plain_job(rank: int, port: str, overrides: list[str]) -> Node:
    """As the Job controller and kubelet do: the pod's index in its arguments."""
    command = with_overrides(commands()["job"], overrides)
    command = [word.replace("$(JOB_COMPLETION_INDEX)", str(rank)) for word in command]
    return Node(replaced(command, nproc_per_node="1", master_addr="127.0.0.1", master_port=port))


def operator(rank: int, port: str) -> dict[str, str]:
    """What the operators set for torchrun."""
    return {
        "PET_NNODES": str(NODES),
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": port,
    }


def pytorchjob(rank: int, port: str, overrides: list[str]) -> Node:
    """As the training operator does, which also describes the pod as if it were a rank."""
    replicas = object_of("pytorchjob.yaml", "PyTorchJob")["spec"]["pytorchReplicaSpecs"].values()
    assert sum(replica["replicas"] for replica in replicas) == NODES
    where = "pytorchjob worker" if rank else "pytorchjob master"
    also = {"RANK": str(rank), "WORLD_SIZE": str(NODES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return Node(with_overrides(commands()[where], overrides), operator(rank, port) | also)


def trainjob(rank: int, port: str, overrides: list[str]) -> Node:
    """As Kubeflow Trainer does."""
    assert object_of("trainjob.yaml", "TrainJob")["spec"]["trainer"]["numNodes"] == NODES
    return Node(with_overrides(commands()["trainjob"], overrides), operator(rank, port))


def skypilot(rank: int, port: str, overrides: list[str]) -> Node:
    """As SkyPilot does: the script in bash, with its variables and the bucket at a place of its own."""
    *arguments, directory = overrides
    folder = Path(directory.removeprefix("run.dir="))
    script = yaml.safe_load(SKYPILOT.read_text())["run"].replace('"/shared/', f'"{folder.parent}/')
    script = script.replace("--master-port 29500", f"--master-port {port}")
    python = folder.parent / "titan" / "bin" / "python"  # ~/titan
    if not python.exists():
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    return Node(
        ["bash", "-c", script],
        {
            "HOME": str(folder.parent),
            "TITAN_ARGS": " ".join(arguments),
            "TITAN_RUN": "",
            "SKYPILOT_TASK_ID": folder.name,
            "SKYPILOT_NUM_NODES": str(NODES),
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n" * NODES,
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        },
    )


def by_hand(rank: int, port: str, overrides: list[str]) -> Node:
    """As a person does, on each machine."""
    variables = {"HEAD": "localhost", "NODES": str(NODES), "DEVICES_PER_NODE": "1", "PORT": port}
    return Node(["launchers/torchrun.sh", *overrides], variables)


def start(node: Node, folder: Path) -> Process:
    """Start a node's command where launchers/ is, as in the image."""
    environment = clean_environment(folder / "cache", **node.variables)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["STARTED_AS"] = str(folder)
    process = Process(
        node.command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.mark = f"STARTED_AS={folder}"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("platform", [plain_job, pytorchjob, trainjob, skypilot, by_hand])
def test_two_nodes_train_resume_and_refuse(
    platform: Callable[[int, str, list[str]], Node], tmp_path: Path, text_file: Path
) -> None:
    """Two nodes train one run of two ranks; again, more steps resume it; a wrong config ends both nodes with 2.

    How ranks find each other is the platform's, what they do then is not: one platform goes through all of it.
    """
    shutil.copytree(REPOSITORY / "launchers", tmp_path / "launchers")

    def run(*more: str) -> set[int]:
        port = free_port()
        overrides = [*TINY, f"data.path={text_file}", *more, f"run.dir={tmp_path / 'run'}"]
        nodes = [start(platform(rank, port, overrides), tmp_path) for rank in range(NODES)]
        try:
            return {finish(node).code for node in nodes}
        finally:
            for node in nodes:
                kill_all(node)

    assert run() == {0}
    if platform is not by_hand:
        (event,) = [event for event in json_lines(tmp_path / "run" / "events.jsonl") if event["event"] == "start"]
        assert event["ranks"] == NODES
        return
    assert run("training.steps=4") == {0}
    events = json_lines(tmp_path / "run" / "events.jsonl")
    assert [event["ranks"] for event in events if event["event"] == "start"] == [NODES, NODES]
    assert [event["step"] for event in events if event["event"] == "resume"] == [2]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"
    assert run("training.steps=4", "training.seed=1") == {2}
    assert not re.search("seed: 1", (tmp_path / "run" / "config.yaml").read_text())


@pytest.mark.slow
def test_a_node_that_is_taken_away_lets_all_save(tmp_path: Path, text_file: Path) -> None:
    """SIGTERM to one of two nodes: both save the same step and ask to be requeued; the same command goes on there."""
    shutil.copytree(REPOSITORY / "launchers", tmp_path / "launchers")
    folder = tmp_path / "run"

    def start_nodes(steps: int) -> list[Process]:
        port = free_port()
        overrides = [*TINY, f"data.path={text_file}", f"training.steps={steps}", "metrics.log_every=1"]
        overrides.append(f"run.dir={folder}")
        return [start(plain_job(rank, port, overrides), tmp_path) for rank in range(NODES)]

    nodes = start_nodes(100_000)
    try:
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(json_lines(metrics)) > 3, "three steps", 120)
        nodes[1].send_signal(signal.SIGTERM)
        assert [finish(node).code for node in nodes] == [75, 75]
        (checkpoint,) = (folder / "checkpoints").glob("step_*")
        step = int(checkpoint.name.removeprefix("step_"))
        nodes = start_nodes(step + 2)
        assert [finish(node).code for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            kill_all(node)
    assert [event["step"] for event in json_lines(folder / "events.jsonl") if event["event"] == "resume"] == [step]
    assert [row["step"] for row in json_lines(metrics)] == list(range(1, step + 3))
