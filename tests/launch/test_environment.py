"""What the environment says of this process and its machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from titan.errors import ConfigError
from titan.launch.environment import Rank, count_gpus, current_machine, current_rank, has_bfloat16, threads_per_rank

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*TORCHRUN, "TORCHELASTIC_RESTART_COUNT", "OMP_NUM_THREADS"]:
        monkeypatch.delenv(name, raising=False)


def test_a_rank_is_what_its_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK makes a process a rank, and its machine one on which the ranks have been started."""
    assert current_rank() is None
    assert current_machine().started_ranks is None
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert current_rank() == Rank(rank=3, local_rank=1, world_size=4, local_world_size=2, attempt=0, has_store=True)
    assert (current_machine().started_ranks, current_machine().started_ranks_per_node) == (4, 2)


def test_a_pod_of_an_operator_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubeflow describes a pod of one device with fewer variables than torchrun: it is the only rank of its machine."""
    pod = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "titan-master-0", "MASTER_PORT": "23456"}
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    assert current_rank() == Rank(rank=2, local_rank=0, world_size=4, local_world_size=1, attempt=0, has_store=True)
    assert (current_machine().started_ranks, current_machine().started_ranks_per_node) == (4, 1)


def test_the_shell_of_an_allocation_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's variables alone, as in an interactive allocation, do not make a process a rank."""
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    assert current_rank() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "-1"), ("RANK", "4"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "two"), ("LOCAL_WORLD_SIZE", "5")],
)
def test_variables_that_contradict_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """A rank is not guessed from variables that cannot be."""
    for other, right in TORCHRUN.items():
        monkeypatch.setenv(other, right)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} ?= ?{value}"):
        current_rank()


@pytest.mark.parametrize(
    ("wanted", "ranks", "threads"),
    [
        (None, 1, len(os.sched_getaffinity(0))),
        (None, 1000, 1),
        ("3", 1, 3),
        ("3,2", 4, 3),
        ("many", 1000, 1),
        ("0", 1, 1),
    ],
)
def test_the_users_own_threads_win(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, ranks: int, threads: int
) -> None:
    """Ranks share the CPUs, at least one thread each, unless OMP_NUM_THREADS says otherwise."""
    if wanted is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert threads_per_rank(ranks) == threads


def test_hidden_gpus_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty CUDA_VISIBLE_DEVICES leaves no GPU, whatever the machine has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_gpus() == 0


@pytest.mark.parametrize(
    ("line", "highest", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", None, True),
        ("flags\t\t: fpu amx_tile amx_bf16", "AVX512_CORE_AMX", True),
        ("flags\t\t: fpu avx512f avx512_bf16", "AVX512_CORE_VNNI", False),
        ("flags\t\t: fpu avx512f", None, False),
        ("Features\t: fp asimd bf16 i8mm", None, True),
        ("Features\t: fp asimd", None, False),
        ("", None, False),
    ],
)
def test_a_cpu_with_bfloat16_is_known_by_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, highest: str | None, expected: bool
) -> None:
    """What the kernel lists decides, on x86 and on ARM, as far as the user lets oneDNN use it."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if highest:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", highest)
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert has_bfloat16(file) is expected
    assert has_bfloat16(tmp_path / "nowhere") is False


def test_a_rank_may_open_all_the_files_that_it_may() -> None:
    """A rank has a socket to every other one in each group over gloo: what a process begins with is for a few."""
    lower = "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))"
    code = f"import resource, titan.worker; {lower}; titan.worker.allow_open_files(); print({{}})"
    done = subprocess.run(
        [sys.executable, "-c", code.format("resource.getrlimit(resource.RLIMIT_NOFILE)")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "(200, 200)"
