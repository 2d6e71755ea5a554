"""Time of titan's own attention for CPUs beside PyTorch's kernel, forward and backward.

    python benchmarks/attention.py [--repeats 5]

Both in one process, in turns, causal, with the heads of a position beside each other, as a block makes them; PyTorch's
gets the keys of a group of heads repeated, as it takes no groups, and that is timed with it. Each time is the median of
some calls of a turn. A CPU that has no units for bfloat16 is measured in float32 alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from record import OtherLoad, describe_machine, spread, write_result

LEAST_RATIO = 1.2
"""How many times as fast as PyTorch's, forward and backward together, for every shape and format."""
CALLS = 5


@dataclass(frozen=True)
class Shape:
    """What attention computes with."""

    rows: int
    heads: int
    kv_heads: int
    tokens: int
    head_size: int


SHAPES = (
    Shape(8, 16, 16, 512, 16),  # the debug model
    Shape(2, 8, 8, 512, 64),
    Shape(1, 32, 8, 2048, 64),  # Llama 3.2 1B
    Shape(1, 32, 8, 2048, 128),  # Llama 3 8B
)


def main() -> int:
    """Measure, print and write the figures; 1 where the mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    import torch

    from titan.launch.environment import has_bfloat16

    machine, load, cases, missed = describe_machine(), OtherLoad(), [], []
    dtypes = [torch.float32, *[torch.bfloat16] * has_bfloat16()]
    for shape in SHAPES:
        for dtype in dtypes:
            turns = [measure(shape, dtype) for _ in range(given.repeats)]
            found: dict[str, Any] = {"shape": asdict(shape), "dtype": str(dtype).removeprefix("torch.")}
            found |= {
                side: {part: spread([turn[side][part] for turn in turns], 6) for part in ("forward", "backward")}
                for side in ("titan", "pytorch")
            }
            ratios = [sum(turn["pytorch"].values()) / sum(turn["titan"].values()) for turn in turns]
            found["ratio"] = spread(ratios, 3)
            cases.append(found)
            text = f"{shape.rows} x {shape.tokens}, {shape.heads}/{shape.kv_heads} heads of {shape.head_size}"
            times = "   ".join(f"{side} {_milliseconds(found[side])}" for side in ("titan", "pytorch"))
            print(f"{text:<34}{found['dtype']:<10}{times}   ratio {found['ratio']['median']:.2f}", flush=True)
            if found["ratio"]["median"] < LEAST_RATIO:
                missed.append(f"{text}, {dtype}: {found['ratio']['median']:.2f} times as fast, not {LEAST_RATIO}")
    path = write_result("attention", machine, cores_busy_elsewhere=load.cores(), cases=cases)
    print(f"written to {path.name}")
    for line in missed:
        print(f"FAILED: {line}", file=sys.stderr)
    return bool(missed)


def measure(shape: Shape, dtype: Any) -> dict[str, dict[str, float]]:
    """Return the seconds of both kernels, forward and backward, in one turn."""
    import torch
    import torch.nn.functional as F

    from titan.models.cpu_attention import attend_on_cpu

    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(shape.rows, shape.tokens, heads, shape.head_size).to(dtype).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def pytorch() -> torch.Tensor:
        keys, values = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True)

    found = {}
    for side, attend in (("titan", lambda: attend_on_cpu(q, k, v)), ("pytorch", pytorch)):
        attend()
        out = attend()
        backward = _gradients(out, inputs, grad)
        backward()
        found[side] = {"forward": _seconds(attend), "backward": _seconds(backward)}
    return found


def _gradients(out: Any, inputs: list[Any], grad: Any) -> Callable[[], Any]:
    import torch

    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def _milliseconds(found: dict[str, dict[str, float]]) -> str:
    return " + ".join(f"{found[part]['median'] * 1e3:.1f}" for part in ("forward", "backward")) + " ms"


def _seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
