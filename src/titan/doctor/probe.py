"""What can only be known by importing torch, and by two processes that exchange something.

    python -m titan.doctor.probe RANK FOLDER

Two of these are started. The first writes what it measures to stdout, an object a line, as soon as it knows it; so when
a driver hangs or a process dies, what came before is known. What the numbers mean is judged by who has started them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

_ELEMENTS = 4 * 2**20
_TIMEOUT_SECONDS = 60
_LEAST_SECONDS = 0.3
_SLOW_SECONDS = 0.01


def main(rank: int, folder: Path) -> None:
    """Measure, in the order in which things depend on each other."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    tell = _tell if rank == 0 else lambda check, measure: None
    tell("torch", lambda: _describe(torch, dist))
    devices = torch.cuda.device_count() if cuda else 0
    tell("devices", lambda: {"devices": [_device(torch, index) for index in range(devices)]})
    for backend in ("gloo", "nccl") if devices > 1 else ("gloo",):
        measured = _attempt(lambda name=backend: _all_reduce(torch, dist, name, rank, folder))
        if rank == 0:
            _say("collective", {"backend": backend, **measured})
    if rank > 0:
        return
    device = torch.device("cuda" if cuda else "cpu")
    tell("copy", lambda: _copy(torch, device))
    for dtype in ("float32", "bfloat16"):
        tell("product", lambda name=dtype: _product(torch, device, name))


def _describe(torch: Any, dist: Any) -> dict[str, Any]:
    return {
        "version": torch.__version__,
        "built_with_cuda": torch.version.cuda or torch.version.hip,
        "has_cuda": torch.cuda.is_available(),
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "threads": torch.get_num_threads(),
    }


def _device(torch: Any, index: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(index)
    return {"name": torch.cuda.get_device_name(index), "free_gib": free / 2**30, "total_gib": total / 2**30}


def _all_reduce(torch: Any, dist: Any, backend: str, rank: int, folder: Path) -> dict[str, Any]:
    """Sum what two ranks have, and see that the sum is right; the rate is of what each rank has in bytes."""
    store = dist.FileStore(str(folder / backend), 2)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=_TIMEOUT_SECONDS))
    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        own = torch.arange(_ELEMENTS, device=device, dtype=torch.float32) % 1024 + rank
        dist.all_reduce(own.clone())
        given = own.clone()
        _wait(torch, device)
        began = time.perf_counter()
        dist.all_reduce(given)
        _wait(torch, device)
        seconds = time.perf_counter() - began
        expected = 2 * (torch.arange(_ELEMENTS, device=device, dtype=torch.float32) % 1024) + 1
        return {"is_right": bool(torch.equal(given, expected)), "gib_per_second": _ELEMENTS * 4 / 2**30 / seconds}
    finally:
        dist.destroy_process_group()


def _copy(torch: Any, device: Any) -> dict[str, Any]:
    source = torch.ones(_ELEMENTS * 4, device=device)
    target = torch.empty_like(source)
    seconds = _seconds_of(torch, device, lambda: target.copy_(source))
    return {"gib_per_second": 2 * source.numel() * 4 / 2**30 / seconds}  # read and written


def _product(torch: Any, device: Any, dtype: str) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    sizes = (8192,) if device.type == "cuda" else (256, 1024)
    size, seconds = 0, 0.0
    for size in sizes:
        a, b = torch.randn(size, size, device=device).to(kind), torch.randn(size, size, device=device).to(kind)
        seconds = _seconds_of(torch, device, lambda a=a, b=b: a @ b)
        if seconds > _SLOW_SECONDS:  # a CPU without the format takes many seconds for the larger one
            break
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"dtype": dtype, "size": size, "tflops": 2 * size**3 / seconds / 1e12, "device": name}


def _seconds_of(torch: Any, device: Any, work: Callable[[], object]) -> float:
    """Return how long something takes: the fastest of some times, after one to get warm."""
    work()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _LEAST_SECONDS:
        _wait(torch, device)
        start = time.perf_counter()
        work()
        _wait(torch, device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(torch: Any, device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tell(check: str, measure: Callable[[], dict[str, Any]]) -> None:
    _say(check, _attempt(measure))


def _attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


def _say(check: str, values: dict[str, Any]) -> None:
    print(json.dumps({"check": check, **values}), flush=True)


def read_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield what a probe has said; what libraries print in between is left out."""
    for line in lines:
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and "check" in said:
            yield said


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
