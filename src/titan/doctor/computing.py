"""What two probes have measured, judged: devices, backends, speeds, and whether ranks of this machine can exchange."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from titan.config.schema import Dtype
from titan.doctor.finding import Finding, note, ok, problem, without_secrets
from titan.doctor.probe import read_lines
from titan.launch.environment import count_gpus, has_bfloat16
from titan.models.flops import peak_tflops

_TITLES = {"torch": "torch_import", "devices": "gpu", "copy": "memory_speed", "product": "product"}
_EXPECTED = ("torch", "devices", "collective", "copy", "product", "product")
_LOW_SHARE = 0.5
_BUSY_SHARE = 0.9
_DESCRIBING = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GROUP_")


def find_computing(seconds: float) -> list[Finding]:
    """Start the probes, and judge what they say within some seconds; they do not outlive this."""
    said: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="titan_doctor_", ignore_cleanup_errors=True) as folder:
        probes = [_start(rank, folder) for rank in range(2)]
        reader = threading.Thread(target=_read, args=(probes[0], said), daemon=True)
        reader.start()
        began = time.monotonic()
        reader.join(seconds)
        is_late = reader.is_alive()
        for probe in probes:
            probe.kill()
            probe.wait()
        reader.join(1)
        error = Path(folder, "0.err").read_text(errors="replace").strip().splitlines()
    findings = [finding for values in said for finding in _judge_surely(values)]
    done = [values["check"] for values in said]
    missing = list(dict.fromkeys(name for name in _EXPECTED if done.count(name) < _EXPECTED.count(name)))
    if missing:
        names = ", ".join(_TITLES.get(name, name) for name in missing)
        if is_late:
            what = f"{names}: no answer after {time.monotonic() - began:.0f} s"
            findings.append(problem("probe", what, "something hangs, or this machine is very busy: --seconds 60"))
        else:
            what = f"{names}: the process ended: {error[-1] if error else f'exit code {probes[0].returncode}'}"
            findings.append(problem("probe", what, "python -c 'import torch'   shows more"))
    return [without_secrets(finding) for finding in findings]


def _judge_surely(values: dict[str, Any]) -> list[Finding]:
    try:
        return list(judge(values))
    except Exception as error:  # no check is fatal
        return [note(str(values["check"]), f"could not be judged: {type(error).__name__}: {error}: {values}")]


def judge(given: dict[str, Any]) -> Iterable[Finding]:
    """Return what a probe's measurement means."""
    check, values = given["check"], {name: value for name, value in given.items() if name != "check"}
    if check == "collective":
        return _judge_collective(values)
    if "error" in values:
        advice = "python -c 'import torch; print(torch.cuda.is_available())'"
        return [problem(_TITLES.get(check) or check, values["error"], advice)]
    if check == "torch":
        return _judge_torch(values)
    if check == "devices":
        return _judge_devices(values["devices"])
    if check == "copy":
        speed = values["gib_per_second"]
        return [ok("memory_speed", f"{speed:,.1f} GiB/s read and written", gib_per_second=round(speed, 2))]
    return _judge_product(values)


def _judge_torch(values: dict[str, Any]) -> Iterator[Finding]:
    backends = [name for name in ("gloo", "nccl") if values[name]]
    gpus = count_gpus()
    what = f"imports; backends {', '.join(backends) or 'none'}; {values['threads']} threads"
    if not values["gloo"]:
        yield problem("torch_import", what, "this build of PyTorch has no gloo: install another", **values)
    elif gpus and not values["built_with_cuda"]:
        advice = "pip install torch --index-url   of the build for your driver's CUDA"
        yield problem("torch_import", f"{what}; a build without CUDA, and there are {gpus} GPUs", advice, **values)
    elif gpus and not values["has_cuda"]:
        advice = "nvidia-smi; the driver may be older than this build's CUDA"
        yield problem("torch_import", f"{what}; {gpus} GPUs are there, but PyTorch cannot use them", advice, **values)
    elif gpus and not values["nccl"]:
        yield problem("torch_import", what, "this build of PyTorch has no NCCL: install another", **values)
    else:
        yield ok("torch_import", what, **values)


def _judge_devices(devices: list[dict[str, Any]]) -> Iterator[Finding]:
    if not devices:
        yield note("gpu", "none: runs use the CPU, and gloo", "cluster.device=cpu is what auto becomes here")
        return
    for index, device in enumerate(devices):
        name = f"cuda:{index} {device['name']}"
        what = f"{name}, {device['free_gib']:.1f} of {device['total_gib']:.1f} GiB free"
        if device["free_gib"] < _BUSY_SHARE * device["total_gib"]:
            yield note("gpu", what, "another process has the rest: nvidia-smi", **device)
        else:
            yield ok("gpu", what, **device)


def _judge_product(values: dict[str, Any]) -> Iterator[Finding]:
    dtype, tflops = values["dtype"], values["tflops"]
    name = values.get("device", "")
    peak = peak_tflops(name, Dtype[dtype])
    rate = f"{tflops:,.2f} TFLOP/s" if tflops >= 1 else f"{tflops * 1000:,.1f} GFLOP/s"
    what = f"{dtype}, {values['size']} x {values['size']}: {rate}"
    measured = {"tflops": round(tflops, 4), "peak_tflops": peak}
    if peak is None:
        is_slow = dtype == "bfloat16" and not name and not has_bfloat16()
        what += "; this CPU has no bfloat16 of its own, so training.param_dtype=auto is float32" if is_slow else ""
        yield ok(f"product_{dtype}", what, **measured)
    elif tflops < _LOW_SHARE * peak:
        what += f", {tflops / peak:.0%} of the peak of {peak:,.0f}"
        advice = "nvidia-smi -q -d PERFORMANCE,POWER: another process, heat, or a limit of power"
        yield note(f"product_{dtype}", what, advice, **measured)
    else:
        yield ok(f"product_{dtype}", f"{what}, {tflops / peak:.0%} of the peak of {peak:,.0f}", **measured)


def _judge_collective(values: dict[str, Any]) -> Iterator[Finding]:
    backend = values["backend"]
    check = f"{backend}_all_reduce"
    if "error" in values:
        advice = "does this machine's name resolve?  getent hosts $(hostname)   or  export GLOO_SOCKET_IFNAME=lo"
        if backend == "nccl":
            advice = "NCCL_DEBUG=INFO python -m titan.doctor"
        yield problem(check, values["error"], advice)
    elif not values["is_right"]:
        yield problem(check, "the sum over two ranks is wrong", "do not train here; NCCL_P2P_DISABLE=1 may show where")
    else:
        rate = values["gib_per_second"]
        what = f"right over 2 processes, 16 MiB at {rate:,.2f} GiB/s"
        yield ok(check, what, gib_per_second=round(rate, 3))


def _start(rank: int, folder: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_DESCRIBING)}
    with open(Path(folder, f"{rank}.err"), "w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "titan.doctor.probe", str(rank), folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            text=True,
        )


def _read(probe: subprocess.Popen[str], said: list[dict[str, Any]]) -> None:
    assert probe.stdout is not None, "piped"
    with probe.stdout as lines:
        for values in read_lines(lines):
            said.append(values)  # one by one: what comes before a hang counts
