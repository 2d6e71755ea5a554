"""Time and memory of the loss over 128,256 words: all logits at once, titan's chunks, and PyTorch's own chunks.

    python benchmarks/loss.py [--positions 2048] [--dim 1024] [--dtype bfloat16] [--device cuda]

Forward and backward of the output projection and the cross-entropy, each way in a process of its own, in turns. Memory
is the peak beyond what the process had before: weights, hidden states and labels. The gradients that every way has to
give back are in it. PyTorch's own is `torch.nn.functional.linear_cross_entropy` with the chunks that it chooses, where
the installed version has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from record import OtherLoad, describe_machine, environment, spread, write_result

WORDS = 128_256
WAYS = {
    "plain": "all logits at once",
    "titan": "titan's chunks",
    "pytorch": "PyTorch's linear_cross_entropy",
}
MOST_MEMORY = 0.5
"""Of what all logits at once take."""


def main() -> int:
    """Measure, print and write the figures; 1 where a mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.positions, given.dim, given.dtype, given.device)))
        return 0
    machine, load = describe_machine(), OtherLoad()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(given.repeats):
        for way, turns in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(
                command, env=environment() if given.device == "cpu" else None, capture_output=True, text=True
            )
            if done.returncode == 3:  # this PyTorch has no such function
                continue
            if done.returncode:
                raise SystemExit(done.stderr)
            turns.append(json.loads(done.stdout.splitlines()[-1]))
    figures = {
        way: {
            "seconds": spread([turn["seconds"] for turn in turns], 3),
            "peak_gib": spread([turn["peak_gib"] for turn in turns], 3),
            "loss": turns[0]["loss"],
        }
        for way, turns in found.items()
        if turns
    }
    print(f"{given.positions:,} positions, {given.dim} wide, {WORDS:,} words, {given.dtype}")
    for way, figure in figures.items():
        seconds, peak = figure["seconds"]["median"], figure["peak_gib"]["median"]
        print(f"{WAYS[way]:<34}{seconds:>8.3f} s{peak:>8.2f} GiB   loss {figure['loss']:.6f}")
    shape = {"positions": given.positions, "dim": given.dim, "words": WORDS, "dtype": given.dtype}
    name = "loss" if given.device == "cpu" else "loss_cuda"
    path = write_result(name, machine, cores_busy_elsewhere=load.cores(), shape=shape, ways=figures)
    print(f"written to {path.name}")
    share = figures["titan"]["peak_gib"]["median"] / figures["plain"]["peak_gib"]["median"]
    if share > MOST_MEMORY:
        print(f"FAILED: {share:.2f} of the memory of all logits, not {MOST_MEMORY}", file=sys.stderr)
        return 1
    return 0


def run(way: str, positions: int, dim: int, dtype: str, device: str) -> dict[str, float]:
    """Run one way twice, the second time measured."""
    import torch
    import torch.nn.functional as F

    from titan.config.degrees import choose_loss_chunk
    from titan.parallel.loss import chunked_cross_entropy, cross_entropy_sum

    if way == "pytorch" and not hasattr(F, "linear_cross_entropy"):
        sys.exit(3)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(positions, dim, dtype=kind, device=device, requires_grad=True)
    weight = (torch.randn(WORDS, dim, device=device) * dim**-0.5).to(kind).requires_grad_()
    labels = torch.randint(WORDS, (positions,), device=device)

    def pytorch() -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[reportAttributeAccessIssue]
        function: Callable[..., Any] = F.linear_cross_entropy  # type: ignore[reportAttributeAccessIssue]
        return function(hidden, weight, labels, reduction="sum", options=options)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: cross_entropy_sum(F.linear(hidden, weight), labels),
        "titan": lambda: chunked_cross_entropy(hidden, weight, labels, choose_loss_chunk(WORDS, device)),
        "pytorch": pytorch,
    }
    before = _memory_gib(device, "now")
    seconds, loss = 0.0, torch.zeros(())
    for _ in range(2):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss = ways[way]()
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = _memory_gib(device, "peak") - before
    return {"seconds": seconds, "peak_gib": peak, "loss": loss.item() / positions}


def _memory_gib(device: str, which: str) -> float:
    import torch

    if device == "cuda":
        count = torch.cuda.memory_allocated() if which == "now" else torch.cuda.max_memory_allocated()
        return count / (1 << 30)
    key = "VmRSS:" if which == "now" else "VmHWM:"
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / (1 << 20)


if __name__ == "__main__":
    sys.exit(main())
