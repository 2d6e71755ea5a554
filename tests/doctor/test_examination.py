"""`python -m titan.doctor`: what is planted is found, what is well is not complained of, and nothing is fatal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

from tests.support.command import clean_environment
from titan.doctor import __main__ as doctor
from titan.doctor import computing, software, storage, surroundings
from titan.doctor.finding import Check, Finding, Level, examine, note, ok, problem, without_secrets
from titan.errors import ConfigError
from titan.models.flops import PEAK_TFLOPS

SECRET = "hf_thisIsASecretThatNobodyMaySee"


def one(findings: Iterator[Finding] | list[Finding], check: str) -> Finding:
    """Return the only finding of a check."""
    (found,) = [each for each in findings if each.check == check]
    return found


def is_bad(finding: Finding) -> bool:
    """Whether it is a problem that says what to do."""
    return finding.level is Level.problem and bool(finding.advice)


# how checks are run


def test_a_check_that_fails_or_hangs_is_a_finding() -> None:
    """The others are run all the same, in their order, and in the time that is left."""
    never = threading.Event()

    def fails() -> list[Finding]:
        raise RuntimeError("planted")

    def hangs() -> list[Finding]:
        never.wait()
        return []

    checks = [Check("a", fails), Check("b", hangs), Check("c", lambda: [ok("c", "well")])]
    began = time.monotonic()
    found = examine(checks, 0.5)
    assert time.monotonic() - began < 5
    assert [each.check for each in found] == ["a", "b", "c"]
    assert "RuntimeError: planted" in found[0].what
    assert is_bad(found[1])
    assert "did not answer" in found[1].what
    assert found[2].level is Level.ok
    never.set()


def test_no_secret_is_shown_whoever_quotes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In words, advice and values; short values, such as of a flag, are no secrets."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("SOME_TOKEN", "1")
    found = without_secrets(note("x", f"1 is {SECRET}", f"not {SECRET}", path=f"/{SECRET}/x", n=1))
    assert SECRET not in repr(found)
    assert (found.what, found.values) == ("1 is ***", {"path": "/***/x", "n": 1})


# software


def test_an_old_torch_an_old_python_and_a_missing_package_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the version that is there, the one that is wanted, and the command."""
    real = software.version_of
    planted = {"torch": Version("2.10.1+cu126"), "omegaconf": Version("2.4.0"), "submitit": None}
    monkeypatch.setattr(software, "version_of", lambda name: planted[name] if name in planted else real(name))
    found = list(software.find_packages())
    assert is_bad(one(found, "torch"))
    assert "2.10.1" in one(found, "torch").what
    assert "2.11 or later" in one(found, "torch").what
    packages = one(found, "packages")
    assert is_bad(packages)
    assert "submitit is not installed" in packages.what
    assert "omegaconf 2.4.0, but titan needs" in packages.what
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert is_bad(one(software.find_python(), "python"))


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1", "2.13.0+cpu", "3.0"])
def test_a_torch_that_is_new_enough_is_well(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of one's own too."""
    real = software.version_of
    monkeypatch.setattr(software, "version_of", lambda name: Version(version) if name == "torch" else real(name))
    assert one(software.find_packages(), "torch").level is Level.ok


def test_this_environment_has_what_titan_requires() -> None:
    """The one that the tests run in."""
    assert one(software.find_packages(), "packages").level is Level.ok
    assert one(software.find_conf(), "conf").level is Level.ok


def test_a_compiler_that_is_missing_or_broken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not there; named by CXX and not there; there, and fails."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in one(software.find_compiler(), "compiler").what
    monkeypatch.setenv("CXX", "/no/such/g++")
    assert "/no/such/g++" in one(software.find_compiler(), "compiler").what
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    found = one(software.find_compiler(), "compiler")
    assert found.level is Level.note
    assert found.advice
    assert "no headers" in found.what


def test_a_conf_that_does_not_compose_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel without its groups."""

    def missing() -> None:
        raise ConfigError("no conf/train.yaml")

    monkeypatch.setattr(software, "compose", missing)
    assert is_bad(one(software.find_conf(), "conf"))


def test_another_encoding_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """And UTF-8 is none, however it is spelled."""
    for encoding, level in (("ISO-8859-1", Level.problem), ("utf8", Level.ok), ("UTF-8", Level.ok)):
        monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale, name=encoding: name)
        assert one(software.find_locale(), "locale").level is level


# storage


def test_a_place_for_runs_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    """Speeds and room are numbers; no file stays and no folder is made."""
    found = list(storage.find_storage(tmp_path / "not" / "there"))
    place = one(found, "run_dir")
    assert place.level is not Level.problem
    assert place.values["write_mib_per_second"] > 0
    assert place.values["read_mib_per_second"] > 0
    assert one(found, "locks").level is Level.ok
    assert one(found, "clock").level is Level.ok
    assert not list(tmp_path.iterdir())


def test_a_read_only_place_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are the system's; root, whom no permission stops, gets them planted."""

    def refuse(path: Path, *arguments: object, **more: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    found = one(storage.find_storage(tmp_path), "run_dir")
    assert is_bad(found)
    assert "Read-only file system" in found.what


def test_a_full_disk_is_a_problem() -> None:
    """A real one, of some MiB, in a mount namespace of its own; where that is not allowed, this is not run."""
    program = (
        "import subprocess, tempfile\n"
        "folder = tempfile.mkdtemp()\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', folder], check=True)\n"
        "from pathlib import Path\n"
        "from titan.doctor.storage import find_storage\n"
        "print([(each.check, each.level.name, each.what) for each in find_storage(Path(folder))])\n"
        "print('left:', list(Path(folder).iterdir()))\n"
    )
    command = ["unshare", "--mount", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("no mount namespaces here")
    assert "('run_dir', 'problem', " in done.stdout, done.stderr
    assert "is full: No space left on device" in done.stdout
    assert "left: []" in done.stdout


def test_a_file_in_the_place_of_a_folder_is_a_problem(tmp_path: Path) -> None:
    """As where --run-dir names a config."""
    (tmp_path / "file").write_text("")
    assert is_bad(one(storage.find_storage(tmp_path / "file" / "run"), "run_dir"))


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    assert one(storage.find_storage(tmp_path), "locks").level is Level.note


# what is around a run


def test_a_container_that_leaves_little_memory_is_said(tmp_path: Path) -> None:
    """The limit of the cgroup counts, and not what the machine has."""
    (tmp_path / "meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert one(surroundings.find_memory(tmp_path, tmp_path), "memory").level is Level.ok
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{3 * 2**30}\n")
    found = one(surroundings.find_memory(tmp_path, tmp_path), "memory")
    assert found.level is Level.note
    assert "4.0" in found.what


def test_little_shared_memory_and_few_files_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's 64 MiB are a problem; so are fewer than 1024 open files, whatever a process begins with."""
    usage = type("Usage", (), {"total": 64 * 2**20, "free": 63 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert is_bad(one(surroundings.find_shared_memory(), "shm"))
    for hard, level in ((512, Level.problem), (1024, Level.note), (4096, Level.ok), (-1, Level.ok)):
        monkeypatch.setattr("resource.getrlimit", lambda which, hard=hard: (256, hard))
        found = one(surroundings.find_limits(), "files")
        assert found.level is level
        assert ("hard limit" in (found.advice or "")) == (level is not Level.ok)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands, the only one that is searched: this machine may have SLURM's."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path


def plant(folder: Path, script: str, *names: str) -> None:
    """Write commands."""
    for name in names:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


def test_a_slurm_that_does_not_answer_is_a_problem(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not here is no problem; half here, silent, refusing and empty each are."""
    every = ("sbatch", "srun", "sinfo", "squeue", "scontrol")
    assert one(surroundings.find_slurm(), "slurm").level is Level.ok
    plant(slurm, "exit 0", "sinfo")
    assert "no sbatch" in one(surroundings.find_slurm(), "slurm").what
    plant(slurm, "exit 0", *every)
    assert "no partition" in one(surroundings.find_slurm(), "slurm").what
    plant(slurm, "echo Unable to contact slurm controller >&2; exit 1", "sinfo")
    assert "Unable to contact" in one(surroundings.find_slurm(), "slurm").what
    monkeypatch.setattr(surroundings, "_SLURM_SECONDS", 0.2)
    plant(slurm, "exec /bin/sleep 5", "sinfo")
    found = one(surroundings.find_slurm(), "slurm")
    assert is_bad(found)
    assert "not answered" in found.what
    monkeypatch.setattr(surroundings, "_SLURM_SECONDS", 60)
    plant(slurm, "echo 'gpu* up 4 idle'", "sinfo")
    assert one(surroundings.find_slurm(), "slurm") == ok("slurm", "gpu* up 4 idle", partitions=1)


def test_keys_are_named_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There or not there; one with a line feed behind it, which the hub refuses, is said."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert [each.level for each in surroundings.find_keys()] == [Level.note, Level.note]
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    found = list(surroundings.find_keys())
    assert [each.level for each in found] == [Level.ok, Level.ok]
    assert SECRET not in repr(found)
    monkeypatch.setenv("HF_TOKEN", f"{SECRET}\n")
    assert one(surroundings.find_keys(), "hf_token").level is Level.note
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert [each.level for each in surroundings.find_keys()] == [Level.ok, Level.ok]


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert one(surroundings.find_hub_cache(), "hub_cache").level is not Level.problem
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert is_bad(one(surroundings.find_hub_cache(), "hub_cache"))


# what the probes measure


TORCH = {"version": "2.13", "built_with_cuda": None, "has_cuda": False, "gloo": True, "nccl": False, "threads": 2}


@pytest.mark.parametrize(
    ("gpus", "changed", "words"),
    [
        (0, {"gloo": False}, "backends none"),
        (8, {}, "a build without CUDA, and there are 8 GPUs"),
        (8, {"built_with_cuda": "12.8"}, "PyTorch cannot use them"),
        (8, {"built_with_cuda": "12.8", "has_cuda": True}, "backends gloo"),
    ],
)
def test_a_torch_that_does_not_fit_the_machine_is_a_problem(
    gpus: int, changed: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gloo; GPUs, and a build without CUDA, a driver too old, no NCCL."""
    monkeypatch.setattr(computing, "count_gpus", lambda: gpus)
    found = one(list(computing.judge({"check": "torch", **TORCH, **changed})), "torch_import")
    assert is_bad(found)
    assert words in found.what


def test_speeds_are_held_against_the_peak_where_it_is_known() -> None:
    """Half of it is the limit; float32 and a CPU have no peak."""
    peak = PEAK_TFLOPS["H100"]
    given = {"check": "product", "dtype": "bfloat16", "size": 8192, "device": "NVIDIA H100 80GB HBM3"}
    slow = one(list(computing.judge({**given, "tflops": 0.3 * peak})), "product_bfloat16")
    assert slow.level is Level.note
    assert "30% of the peak of 989" in slow.what
    assert one(list(computing.judge({**given, "tflops": 0.7 * peak})), "product_bfloat16").level is Level.ok
    cpu = one(list(computing.judge({**given, "dtype": "float32", "device": "", "tflops": 0.1})), "product_float32")
    assert (cpu.level, cpu.values["peak_tflops"]) == (Level.ok, None)


def test_a_wrong_sum_and_a_broken_backend_are_problems() -> None:
    """And a GPU that somebody else has filled is a note."""
    wrong = {"check": "collective", "backend": "nccl", "is_right": False, "gib_per_second": 9.0}
    assert is_bad(one(list(computing.judge(wrong)), "nccl_all_reduce"))
    broken = {"check": "collective", "backend": "gloo", "error": "RuntimeError: unable to resolve hostname"}
    assert "unable to resolve" in one(list(computing.judge(broken)), "gloo_all_reduce").what
    devices = [{"name": "H100", "free_gib": 10.0, "total_gib": 80.0}]
    assert one(list(computing.judge({"check": "devices", "devices": devices})), "gpu").level is Level.note


def test_probes_that_hang_or_die_are_said_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they had said before counts."""
    start = subprocess.Popen
    said = json.dumps({"check": "torch", **TORCH})
    monkeypatch.setattr(computing, "count_gpus", lambda: 0)
    for ending, words in (
        ("import time; time.sleep(60)", "no answer after"),
        ("raise SystemExit('bus error')", "bus error"),
    ):
        program = f"print({said!r}, flush=True); {ending}"
        started = []

        def plant_program(
            command: list[str], program: str = program, started: list = started, **more: object
        ) -> object:
            started.append(start([sys.executable, "-c", program], **more))  # type: ignore[call-overload]
            return started[-1]

        monkeypatch.setattr(subprocess, "Popen", plant_program)
        found = computing.find_computing(3)
        assert one(found, "torch_import").level is Level.ok
        assert is_bad(one(found, "probe"))
        assert words in one(found, "probe").what
        assert "gpu, collective, memory_speed, product" in one(found, "probe").what
        assert all(process.poll() is not None for process in started)


# the command


def test_the_command_examines_this_machine(here: Path, cache: Path) -> None:
    """As JSON, with every check in it; the sum over two real processes is right; nothing is left and nothing told."""
    command = [sys.executable, "-m", "titan.doctor", "--json", "--run-dir", "run", "--seconds", "200"]
    environment = clean_environment(cache, HF_TOKEN=SECRET, WANDB_API_KEY=SECRET)
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=240, check=False)
    found = {each["check"]: each for each in json.loads(done.stdout)}
    problems = [each for each in found.values() if each["level"] == "problem"]
    assert done.returncode == (1 if problems else 0), done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert found["gloo_all_reduce"]["level"] == "ok", found.get("gloo_all_reduce")
    assert found["gloo_all_reduce"]["values"]["gib_per_second"] > 0
    assert found["product_float32"]["values"]["tflops"] > 0
    assert found["product_bfloat16"]["values"]["tflops"] > 0
    expected = {
        "python",
        "torch",
        "packages",
        "optional",
        "conf",
        "compiler",
        "locale",
        "memory",
        "cpu",
        "shm",
        "files",
    }
    expected |= {"run_dir", "locks", "clock", "hub_cache", "hf_token", "wandb_key", "slurm", "torch_import", "gpu"}
    assert expected <= set(found)
    assert not list(here.iterdir())


@pytest.mark.parametrize(("findings", "code"), [([ok("a", "x"), note("b", "y")], 0), ([problem("c", "z", "w")], 1)])
def test_the_exit_code_says_whether_there_are_problems(
    findings: list[Finding], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the text has every finding, with what to do about it, problems last."""
    monkeypatch.setattr(doctor, "find_all", lambda run_dir, seconds: findings)
    with pytest.raises(SystemExit) as exit:
        doctor.main([])
    out = capsys.readouterr().out
    assert (exit.value.code or 0) == code
    assert all(each.what in out for each in findings)
    if code:
        assert out.endswith("Try  w\n\n0 ok, 0 notes, 1 problem\n")


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--seconds", "long"], ["--run-dirs", "x"], ["more"]])
def test_a_wrong_command_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With 2 and a line, and nothing is looked at."""
    with pytest.raises(SystemExit) as exit:
        doctor.main(arguments)
    assert exit.value.code == 2
    assert "error:" in capsys.readouterr().err
