"""What each axis costs: four processes with one axis of degree 4, beside one process that does the same work.

All sides train the debug model on the same global batch in float32. One process has all cores of the machine, four
processes share them, one thread each; so the ratio of their step times is what cutting the work costs here: exchanges
over gloo, work done twice, waiting. Then one step's exchanges are counted: for every collective the bytes
of the whole tensor that it makes or takes, added up over ranks, beside the formula.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from record import OtherLoad, describe_machine, spread, write_result

from titan.config.check import check_config
from titan.config.degrees import Machine
from titan.config.load import compose
from titan.config.schema import TitanConfig
from titan.data.prepared import write_documents

ROWS, SEQ_LEN, RANKS, WARM_UP = 8, 256, 4, 2
NUMBER = 4
"""Bytes of a float32."""
FSDP = "parallelism.dp_shard=4"


@dataclass(frozen=True)
class Case:
    """A layout to measure."""

    name: str
    overrides: tuple[str, ...]


ONE = Case("one process", ("parallelism.dp_shard=1", "cluster.devices_per_node=1", f"training.local_batch_size={ROWS}"))
CASES = [
    ONE,
    Case("dp_shard 4", (FSDP, "training.local_batch_size=2")),
    Case("dp_replicate 4", ("parallelism.dp_shard=1", "parallelism.dp_replicate=4", "training.local_batch_size=2")),
    Case("tp 4", ("parallelism.dp_shard=1", "parallelism.tp=4", "training.local_batch_size=8")),
    Case("cp 4, allgather", ("parallelism.dp_shard=1", "parallelism.cp=4", "training.local_batch_size=8")),
    Case("cp 4, ring", ("parallelism.dp_shard=1", "parallelism.cp=4", "training.local_batch_size=8",
                        "parallelism.cp_method=ring")),
    Case("cp 4, all_to_all", ("parallelism.dp_shard=1", "parallelism.cp=4", "training.local_batch_size=8",
                              "parallelism.cp_method=all_to_all")),
    Case("pp 4, 1F1B", ("parallelism.dp_shard=1", "parallelism.pp=4", "training.local_batch_size=8")),
]  # fmt: skip


def main() -> int:
    """Measure all cases in turn, print and write the figures; 1 where a count is not what its formula says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each case (default: 3)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn (default: 6)")
    arguments = parser.parse_args()
    machine = describe_machine()
    seconds: dict[str, list[float]] = {case.name: [] for case in CASES}
    counts: dict[str, Counter[str]] = {}
    load = OtherLoad()
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        write_documents(tokens, [np.random.default_rng(0).integers(0, 256, 1 << 20)], 256)
        for repeat in range(arguments.repeats):
            for case in CASES:
                ranks = run_ranks(case, tokens, arguments.steps)
                seconds[case.name].append(
                    statistics.median(max(step) for step in zip(*(s for s, _ in ranks), strict=True))
                )
                counts[case.name] = sum((count for _, count in ranks), Counter())
                print(f"{repeat + 1}/{arguments.repeats}  {case.name:<18} {seconds[case.name][-1]:.3f} s", flush=True)
    others = load.cores()
    rows, wrong = [], []
    print(
        f"\n{'case':<18} {'s a step':>9} {'ratio':>6}   exchanged in a step, all ranks together: counted / formula, MB"
    )
    for case in CASES:
        ratio = statistics.median(a / b for a, b in zip(seconds[case.name], seconds[ONE.name], strict=True))
        expected = formula(config_of(case))
        found = counts[case.name]
        for kind in expected.keys() | found.keys():
            # what no formula has: the loss, the counts, the norm, the norms' gradients
            if abs(found[kind] - expected[kind]) > 0.02 * max(expected.values(), default=0) + 1e5:
                wrong.append(f"{case.name}: {kind} {found[kind]:,} bytes, by the formula {expected[kind]:,}")
        text = ", ".join(f"{kind} {found[kind] / 1e6:.1f} / {expected[kind] / 1e6:.1f}" for kind in sorted(expected))
        print(f"{case.name:<18} {statistics.median(seconds[case.name]):>9.3f} {ratio:>6.2f}   {text}")
        rows.append(
            {
                "case": case.name,
                "overrides": list(case.overrides),
                "seconds_a_step": spread(seconds[case.name]),
                "times_one_process": round(ratio, 3),
                "bytes_counted": dict(found),
                "bytes_by_formula": dict(expected),
            }
        )
    path = write_result("axis_cost", machine, cases=rows, other_busy_cores=others, wrong=wrong)
    print(f"\nwritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    for line in wrong:
        print(f"not what the formula says: {line}", file=sys.stderr)
    return 1 if wrong else 0


def formula(config: TitanConfig) -> Counter[str]:
    """Return the bytes that a step exchanges by kind of collective, all ranks together.

    P are parameters, A = rows x sequence x width one activation, L blocks, n the axis's degree, all in float32:

    dp_shard n       gathers n x (2 P - ends), the ends being norm and output, which stay; reduce-scatters n x P
    dp_replicate n   all-reduces n x P
    tp n             gathers and reduce-scatters of n x (4 L + 2) A each
    cp n             as dp_shard n, and for each block keys and values, 2 A x kv heads / heads:
                     allgather gathers n times that and reduce-scatters as much; ring sends them n - 1 hops forward
                     and n - 1 backward, and their gradients n hops; all_to_all exchanges queries, keys, values and
                     results, 4 A, forward and backward
    pp n             sends (n - 1) A forward and as much backward
    """
    from titan.models.flops import count_parameters

    model, layout = config.model, config.parallelism
    parameters = count_parameters(model)
    ends = model.vocab_size * model.dim + model.dim
    activation = config.training.global_batch_size * config.training.seq_len * model.dim * NUMBER
    keys_and_values = 2 * activation * model.n_kv_heads // model.n_heads
    shards = layout.dp_shard * layout.cp
    found: Counter[str] = Counter()
    if shards > 1:
        found["all_gather"] += shards * (2 * parameters - ends) * NUMBER
        found["reduce_scatter"] += shards * parameters * NUMBER
    if layout.dp_replicate > 1:
        found["all_reduce"] += layout.dp_replicate * parameters * NUMBER
    if layout.tp > 1:
        for kind in ("all_gather", "reduce_scatter"):
            found[kind] += layout.tp * (4 * model.n_layers + 2) * activation
    if layout.cp > 1 and layout.cp_method.name == "allgather":
        for kind in ("all_gather", "reduce_scatter"):
            found[kind] += layout.cp * model.n_layers * keys_and_values
    if layout.cp > 1 and layout.cp_method.name == "ring":
        found["send"] += model.n_layers * keys_and_values * (2 * (layout.cp - 1) + layout.cp)
    if layout.cp > 1 and layout.cp_method.name == "all_to_all":
        found["all_to_all"] += model.n_layers * 2 * (2 * activation + keys_and_values)
    if layout.pp > 1:
        found["send"] += 2 * (layout.pp - 1) * activation
    return found


def config_of(case: Case) -> TitanConfig:
    """Return a case's config, resolved."""
    common = [
        f"cluster.devices_per_node={RANKS}",
        f"training.global_batch_size={ROWS}",
        f"training.seq_len={SEQ_LEN}",
        "cluster.device=cpu",
        "checkpoint=disabled",
        "run.dir=unused",
    ]
    return check_config(compose([*common, *case.overrides]), Machine())


def run_ranks(case: Case, tokens: Path, steps: int) -> list[tuple[list[float], Counter[str]]]:
    """Run a case in processes of its own; return each rank's seconds a step, and what one step exchanged."""
    ranks = 1 if case is ONE else RANKS
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) if ranks == 1 else 1))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(ranks) as pool:
        jobs = [(case, tokens, steps, rank, ranks, f"{folder}/store") for rank in range(ranks)]
        return pool.starmap(_rank, jobs, chunksize=1)


def _rank(case: Case, tokens: Path, steps: int, rank: int, ranks: int, store: str) -> tuple[list[float], Counter[str]]:
    import torch
    import torch.distributed as dist

    from titan.data.prepared import open_prepared
    from titan.data.rows import PreparedRows
    from titan.trainer.build import build_trainer
    from titan.trainer.device import select_device
    from titan.trainer.loop import build_meter, run_step, steps_of_batches

    config = config_of(case)
    device = select_device(config.cluster.device, rank, int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    trainer = build_trainer(config, device, PreparedRows(open_prepared(tokens), config.training.seq_len, padding=0))
    batches = steps_of_batches(trainer, build_meter(trainer))

    def step() -> float:
        rows = next(batches)
        dist.barrier()
        began = time.perf_counter()
        run_step(trainer, rows).result.read()
        return time.perf_counter() - began

    for _ in range(WARM_UP):
        step()
    seconds = [step() for _ in range(steps)]
    with _counting_mode(torch) as counted:
        step()
    dist.destroy_process_group()
    return seconds, counted.bytes


def _counting_mode(torch: Any) -> Any:
    """Return a mode that adds up the bytes of every collective by kind."""
    from torch.utils._python_dispatch import TorchDispatchMode

    def size(*tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # the whole tensor of each: what a gather makes, what a reduction takes, what is sent
    sizes = {
        "c10d._allgather_base_": ("all_gather", lambda args: size(args[0])),
        "c10d._reduce_scatter_base_": ("reduce_scatter", lambda args: size(args[1])),
        "c10d.allreduce_": ("all_reduce", lambda args: size(*args[0])),
        "c10d.send": ("send", lambda args: size(*args[0])),
        "_c10d_functional.all_gather_into_tensor": ("all_gather", lambda args: size(args[0]) * args[1]),
        "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", lambda args: size(args[0])),
        "_c10d_functional.all_reduce": ("all_reduce", lambda args: size(args[0])),
        "_c10d_functional.all_to_all_single": ("all_to_all", lambda args: size(args[0])),
    }

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = f"{func.namespace}.{func._opname}" if hasattr(func, "namespace") else ""
            if name in sizes:
                kind, measure = sizes[name]
                self.bytes[kind] += measure(args)
            elif name.startswith("c10d.") and name not in ("c10d.recv_", "c10d.barrier"):
                self.bytes[name] += 0
            return func(*args, **(kwargs or {}))

    return Counting()


if __name__ == "__main__":
    sys.exit(main())
