"""Every combination that is held against one process, by the kind of claim it supports.

`python -m tests.parallel.matrix` runs them all and writes what was found into docs/parallelism.md.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from titan.trainer.record import Difference, Record, compare_records

DOCUMENT = Path(__file__).parents[2] / "docs" / "parallelism.md"
BEGIN, END = "<!-- begin: python -m tests.parallel.matrix -->", "<!-- end -->"

AXES = ("dp_replicate", "dp_shard", "cp", "tp", "pp")
KEPT_BY_REFERENCE = ("model.", "data.", "training.param_dtype", "float8")
"""What one process has to be told too: it changes the mathematics, a layout does not."""


@dataclass(frozen=True)
class Case:
    """A layout and its options."""

    kind: str
    world_size: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the table and the test call it."""
        return " ".join(re.sub(r"^parallelism\.", "", text) for text in self.overrides)

    @property
    def reference(self) -> tuple[str, ...]:
        """The overrides of the one process that it must equal."""
        return tuple(text for text in self.overrides if text.startswith(KEPT_BY_REFERENCE))

    @property
    def is_slow(self) -> bool:
        """Whether it waits for `make test-slow`."""
        limit = 4 if self.kind == "two axes" else 2
        return self.world_size > limit or "compile=inductor" in self.overrides

    @property
    def is_tested(self) -> bool:
        """Whether it is a test; what keeps two cores busy for long and shows little that others do not is in the table.

        Those are three of sixteen ranks with options, seven that compile, and nine of four that repeat what two show.
        """
        if self.kind == "compile":
            left_out = {
                "data.mask_documents=true",
                "parallelism.cp_method=all_to_all",
                "activation_checkpoint=selective",
            }
            recomputes_alone = {"activation_checkpoint=full", "parallelism.dp_shard=2"} <= set(self.overrides)
            return self.world_size == 2 and not left_out & set(self.overrides) and not recomputes_alone
        if self.kind == "documents apart":
            return self.world_size != 4 or "parallelism.pp=2" in self.overrides
        if self.kind == "context parallel" and self.world_size == 4:
            return "parallelism.cp_head_tail=false" not in self.overrides
        return self.world_size < 16 or self.kind == "four axes"


def mesh(**degrees: int) -> tuple[str, ...]:
    """Return the overrides of a mesh. FSDP stays out unless asked for, so that an axis is seen alone."""
    return tuple(f"parallelism.{axis}={degree}" for axis, degree in ({"dp_shard": 1} | degrees).items())


def options(*texts: str) -> tuple[str, ...]:
    """Return overrides of the group `parallelism`."""
    return tuple(f"parallelism.{text}" for text in texts)


BLOCK_EACH = options("pp_less_first=0", "pp_less_last=0")
"""Four stages of a four-block model have a block each."""
FOUR_ROWS = ("training.local_batch_size=4",)
FEW_TOKENS = 2003
UNEVEN = ("training.seq_len=284", "model.dim=16", "model.n_layers=2", "training.steps=1",
          "training.local_batch_size=1", "training.global_batch_size=8")  # fmt: skip
"""All rows of so few tokens in one step, the last of them almost all padding."""
ALL_FOUR = mesh(pp=2, dp_shard=2, cp=2, tp=2)

CASES = [
    *[Case("one axis", n, mesh(**{axis: n})) for axis in AXES[:4] for n in (2, 4)],
    Case("one axis", 2, mesh(pp=2)),
    Case("one axis", 4, (*mesh(pp=4), *BLOCK_EACH, *FOUR_ROWS)),
    *[Case("two axes", 4, mesh(**dict.fromkeys(pair, 2))) for pair in itertools.combinations(AXES, 2)],
    *[Case("three axes", 8, mesh(**dict.fromkeys(three, 2))) for three in itertools.combinations(AXES, 3)],
    Case("four axes", 16, ALL_FOUR),
    Case("four axes", 16, mesh(pp=2, dp_replicate=2, dp_shard=2, tp=2)),
    Case("four axes", 16, mesh(pp=2, dp_replicate=2, dp_shard=2, cp=2)),
    Case("four axes", 16, mesh(dp_replicate=2, dp_shard=2, cp=2, tp=2)),
    # tensor parallelism's options
    *[
        Case("tensor parallel", 2, (*mesh(tp=2), *options(f"sequence_parallel={a}", f"loss_parallel={b}")))
        for a, b in (("false", "true"), ("true", "false"), ("false", "false"))
    ],
    Case("tensor parallel", 4, (*mesh(tp=2, pp=2), *options("sequence_parallel=false", "loss_parallel=false"))),
    Case("tensor parallel", 4, (*mesh(tp=2, cp=2), *options("sequence_parallel=false"))),
    # context parallelism's methods
    *[
        Case("context parallel", n, (*mesh(cp=n), *options(f"cp_method={method}", f"cp_head_tail={balanced}")))
        for method in ("allgather", "ring", "all_to_all")
        for balanced in ("true", "false")
        for n in (2, 4)
        if (method, balanced) != ("allgather", "true")
    ],
    *[
        Case("context parallel", 4, (*mesh(cp=2, **{axis: 2}), *options(f"cp_method={method}")))
        for axis in ("tp", "pp")
        for method in ("ring", "all_to_all")
    ],
    # pipeline schedules
    Case("pipeline", 2, (*mesh(pp=2), *options("pp_schedule=GPipe"))),
    *[
        Case("pipeline", 2, (*mesh(pp=2), *options(f"pp_schedule={name}"), *BLOCK_EACH, *FOUR_ROWS))
        for name in ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    ],
    Case("pipeline", 2, (*mesh(pp=2), *options("pp_microbatches=2"), *FOUR_ROWS)),
    Case(
        "pipeline",
        2,
        (*mesh(pp=2), *options("pp_modules=[[tok_embeddings],[layers.0,layers.1,layers.2,layers.3,norm,output]]")),
    ),
    *[
        Case("pipeline", 4, (*mesh(pp=2, **{axis: 2}), *options(f"pp_schedule={name}"), *BLOCK_EACH, *FOUR_ROWS))
        for axis in ("dp_shard", "tp")
        for name in ("Interleaved1F1B", "ZBVZeroBubble")
    ],
    # documents that do not see each other, positions that restart
    *[
        Case("documents apart", n, (*layout, "data.mask_documents=true"))
        for n, layout in (
            (2, mesh(dp_shard=2)),
            (2, mesh(tp=2)),
            (2, mesh(pp=2)),
            *[
                (n, (*mesh(cp=n), *options(f"cp_method={method}", f"cp_head_tail={balanced}")))
                for method in ("allgather", "ring", "all_to_all")
                for balanced in ("true", "false")
                for n in (2, 4)
            ],
            (4, mesh(pp=2, cp=2)),
            (16, ALL_FOUR),
        )
    ],
    # an embedding that is also the output
    *[
        Case("tied embeddings", n, (*layout, "model.tie_embeddings=true"))
        for n, layout in (
            (2, mesh(dp_shard=2)),
            (2, mesh(tp=2)),
            (2, mesh(cp=2)),
            (2, mesh(pp=2)),
            (2, (*mesh(pp=2), *options("pp_schedule=ZBVZeroBubble"), *BLOCK_EACH, *FOUR_ROWS)),
            (4, mesh(pp=2, tp=2)),
            (4, mesh(pp=2, dp_shard=2)),
            (16, ALL_FOUR),
        )
    ],
    # recomputing activations
    *[
        Case("activation checkpointing", n, (*layout, f"activation_checkpoint={mode}"))
        for mode in ("full", "selective", "every_nth")
        for n, layout in ((2, mesh(dp_shard=2)), (2, mesh(tp=2)), (2, mesh(cp=2)), (2, mesh(pp=2)))
    ],
    Case("activation checkpointing", 16, (*ALL_FOUR, "activation_checkpoint=selective")),
    # compiled
    *[
        Case("compile", n, (*layout, "compile=inductor"))
        for n, layout in (
            (2, mesh(dp_shard=2)),
            (2, mesh(tp=2)),
            (2, mesh(cp=2)),
            (2, (*mesh(cp=2), *options("cp_method=all_to_all"))),
            (2, mesh(pp=2)),
            (2, (*mesh(dp_shard=2), "activation_checkpoint=selective")),
            (2, (*mesh(dp_shard=2), "activation_checkpoint=full")),
            (2, (*mesh(tp=2), "activation_checkpoint=selective")),
            (2, (*mesh(tp=2), "activation_checkpoint=full")),
            (2, (*mesh(dp_shard=2), "activation_checkpoint=memory_budget")),
            (2, (*mesh(dp_shard=2), "data.mask_documents=true")),
            (4, (*mesh(dp_shard=2, tp=2), "activation_checkpoint=full")),
            (4, (*mesh(pp=2, tp=2), "activation_checkpoint=full")),
        )
    ],
    # other options
    *[
        Case("options", 2, (*mesh(dp_shard=2), *options(f"reshard_after_forward={choice}")))
        for choice in ("always", "never")
    ],
    *[Case("options", 2, (*mesh(**{axis: 2}), *options("cpu_offload=true"))) for axis in ("dp_shard", "tp", "pp")],
    *[Case("options", 1, (*mesh(), f"training.local_batch_size={rows}")) for rows in (1, 4, 8)],
    Case("options", 4, (*mesh(dp_shard=2, cp=2), "training.local_batch_size=1")),
    # bfloat16, with a tolerance of its own
    *[
        Case("bfloat16", n, (*layout, "training.param_dtype=bfloat16"))
        for n, layout in (
            (2, mesh(dp_shard=2)),
            (2, mesh(tp=2)),
            (2, mesh(cp=2)),
            (2, (*mesh(cp=2), *options("cp_method=ring"))),
            (2, mesh(pp=2)),
            (16, ALL_FOUR),
        )
    ],
]


def table(found: dict[Case, Difference]) -> list[str]:
    """Return what was found as Markdown: one row a case, its worst differences from one process."""
    lines = []
    for kind, cases in itertools.groupby(found, key=lambda case: case.kind):
        lines += ["", f"**{kind}**", "", "| ranks | overrides | loss | gradient norm | gradients | weights |"]
        lines += ["|---|---|---|---|---|---|"]
        for case in cases:
            d = found[case]
            numbers = " | ".join(f"{value:.0e}" for value in (d.loss, d.grad_norm, d.gradient, d.weight))
            lines.append(f"| {case.world_size} | `{case.name}` | {numbers} |")
    return [*lines, ""]


def main() -> None:
    """Run every case and write the table."""
    from .layouts import make_packed, record_layout
    from .pool import RankPool

    pools: dict[int, RankPool] = {}
    known: dict[tuple[int, tuple[str, ...]], Record] = {}
    found: dict[Case, Difference] = {}
    with tempfile.TemporaryDirectory() as folder:
        packed = make_packed(Path(folder) / "tokens.bin")

        def record(world_size: int, overrides: tuple[str, ...]) -> Record:
            if (world_size, overrides) not in known:
                pool = pools.setdefault(world_size, RankPool(world_size))
                known[world_size, overrides] = pool.run(record_layout, world_size, overrides, packed)[0]
            return known[world_size, overrides]

        for number, case in enumerate(CASES, 1):
            difference = compare_records(record(case.world_size, case.overrides), record(1, case.reference))
            found[case] = difference
            print(f"{number}/{len(CASES)}  {case.kind}  {case.name}  {difference}", file=sys.stderr, flush=True)
    for pool in pools.values():
        pool.close()
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n".join(table(found)) + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
