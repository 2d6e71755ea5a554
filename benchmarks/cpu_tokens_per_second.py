"""Tokens a second of the debug model on one CPU process, beside a plain loop over the transformers library's Llama.

All sides train the same shape on the same rows in float32 with AdamW and clipping at norm 1. titan's side is the
command itself, `python -m titan.train`, with its own step times from metrics.jsonl: loading, logging and the process
group are in them. The other side is the loop that one would write by hand, given its rows ready-made and the fused
AdamW. It runs a second time with the C library told to keep freed memory, as titan tells it: what is left of the
ratio then is the model and the step.

Each repetition is a process of its own and the sides take turns, so none has the quieter minutes. A turn during which
other processes kept a fifth of a core busy is taken again, whatever it gave, and is written down apart: OpenMP's
threads wait for each other at every operation, so that what shares a core with one of them costs far more than its
share, and not the same on all sides.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import (
    MOST_DISTURBED_TURNS,
    QUIET_CORES,
    TITAN,
    OtherLoad,
    describe_machine,
    read_metrics,
    run,
    spread,
    write_result,
)

from titan.config.load import compose, load_config

ROWS, SEQ_LEN, WARM_UP = 8, 512, 2
LEAST_RATIO = 1.2
SIDES = {
    "titan": "python -m titan.train",
    "transformers": "plain loop over transformers.LlamaForCausalLM",
    "transformers_kept_memory": "the same loop, with freed memory kept as titan keeps it",
}

Turn = dict[str, dict[str, Any]]
"""Side to what its process gave."""


def main() -> int:
    """Measure all sides in turn, print and write the figures; 1 where titan is not fast enough."""
    arguments = _parse_arguments()
    if arguments.loop is not None:
        run_loop(Path(arguments.loop), arguments.steps, arguments.kept_memory)
        return 0
    machine = describe_machine()
    quiet: list[Turn] = []
    disturbed: list[Turn] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frozen = folder / "warm" / "config.yaml"
        run_titan(frozen.parent, folder, WARM_UP + 1)  # tokenises the data, and freezes the config for the others
        while len(quiet) < arguments.repeats and len(disturbed) <= MOST_DISTURBED_TURNS:
            turn = take_turn(folder, len(quiet) + len(disturbed), frozen, arguments.steps + WARM_UP)
            busy = max(result["cores_busy_elsewhere"] for result in turn.values())
            (quiet if busy <= QUIET_CORES else disturbed).append(turn)
            rates = "  ".join(f"{side} {_rate(result):,.0f}" for side, result in turn.items())
            print(f"{rates} tok/s   {busy:.2f} cores busy elsewhere{': again' * (busy > QUIET_CORES)}", flush=True)
    if len(quiet) < arguments.repeats:
        print(f"FAILED: the machine is too busy to measure: {len(disturbed)} disturbed turns", file=sys.stderr)
        return 1
    return report(machine, quiet, disturbed, arguments)


def take_turn(folder: Path, number: int, frozen: Path, steps: int) -> Turn:
    """Run each side once; return what each gave, and how many cores were busy with other things meanwhile."""
    turn = {}
    for side in SIDES:
        others = OtherLoad()
        if side == "titan":
            turn[side] = run_titan(folder / f"run_{number}", folder, steps)
        else:
            turn[side] = start_loop(frozen, steps, side.endswith("kept_memory"))
        turn[side]["cores_busy_elsewhere"] = others.cores()
    return turn


def run_titan(directory: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Train with the command; return the seconds of each step and the peak memory."""
    command = [
        *(*TITAN, "model=llama3_debug", "cluster.device=cpu"),
        *(f"training.seq_len={SEQ_LEN}", f"training.local_batch_size={ROWS}", f"training.steps={steps}"),
        *("training.param_dtype=float32", "training.max_grad_norm=1.0", "checkpoint=disabled", "metrics.log_every=1"),
        *(f"run.dir={directory}", f"data.cache_dir={folder}/cache"),
    ]
    run(command)
    rows = read_metrics(directory)
    return {
        "step_seconds": [row["step_seconds"] for row in rows[WARM_UP:]],
        "peak_memory_gib": rows[-1]["memory_gib"],
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
    }


def start_loop(config: Path, steps: int, kept_memory: bool) -> dict[str, Any]:
    """Run the plain loop in a process of its own; return the same figures as `run_titan`."""
    command = [sys.executable, __file__, "--loop", str(config), "--steps", str(steps)]
    command += ["--kept-memory"] if kept_memory else []
    return json.loads(run(command).splitlines()[-1])


def run_loop(frozen: Path, steps: int, kept_memory: bool) -> None:
    """Train transformers' Llama as a person would by hand, and print the figures as JSON."""
    if kept_memory:
        _keep_freed_memory()
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    config = load_config(frozen)
    shape, settings = config.model, config.optimizer
    batches = _read_batches(frozen, steps)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.dim,
            intermediate_size=shape.ffn_dim,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            max_position_embeddings=SEQ_LEN,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=shape.tie_embeddings,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # the class takes it among its other arguments
            use_cache=False,
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    seconds, losses = [], []
    for tokens, labels in batches:
        start = time.perf_counter()
        logits = model(input_ids=tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    figures = {
        "step_seconds": seconds[WARM_UP:],
        "peak_memory_gib": _peak_memory_gib(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    print(json.dumps(figures))


def report(machine: dict[str, Any], turns: list[Turn], disturbed: list[Turn], arguments: argparse.Namespace) -> int:
    """Print and write what was found; return the exit code."""
    from titan.models.flops import count_parameters

    model = compose(["model=llama3_debug"]).model
    parameters = {"titan": count_parameters(model), "transformers": turns[0]["transformers"]["parameters"]}
    if len(set(parameters.values())) != 1:
        raise SystemExit(f"the models are not of the same size: {parameters}")
    rates = {side: [_rate(turn[side]) for turn in turns] for side in SIDES}
    figures = {
        side: {
            "what": SIDES[side],
            "tokens_per_second": spread(rates[side], 1),
            "peak_memory_gib": spread([turn[side]["peak_memory_gib"] for turn in turns], 3),
            "first_loss": turns[0][side]["first_loss"],
            "last_loss": turns[0][side]["last_loss"],
            "turns": [_outline(turn[side]) for turn in turns],
            "disturbed_turns": [_outline(turn[side]) for turn in disturbed],
        }
        for side in SIDES
    }
    ratios = {side: _ratio(rates["titan"], rates[side]) for side in SIDES if side != "titan"}
    print(f"\n{machine['cpu']}, {machine['cores']} cores; {model.name}, {parameters['titan']:,} parameters, float32")
    print(f"{ROWS} rows x {SEQ_LEN}; {arguments.repeats} repetitions of {arguments.steps} steps after {WARM_UP}\n")
    print(f"{'':<26}{'median':>9}{'least':>9}{'most':>9}  tok/s{'peak':>9} GiB")
    for side, figure in figures.items():
        rate, memory = figure["tokens_per_second"], figure["peak_memory_gib"]["median"]
        print(f"{side:<26}{rate['median']:>9,.0f}{rate['least']:>9,.0f}{rate['most']:>9,.0f}{memory:>16.2f}")
    print()
    for side, ratio in ratios.items():
        print(f"titan / {side}: {ratio['of_medians']:.2f} (turns: {ratio['least']:.2f} to {ratio['most']:.2f})")
    if not arguments.quick:
        path = write_result(
            "cpu_tokens_per_second",
            machine,
            shape={"model": model.name, "parameters": parameters["titan"], "rows": ROWS, "seq_len": SEQ_LEN},
            steps=arguments.steps,
            least_ratio=LEAST_RATIO,
            ratios=ratios,
            sides=figures,
        )
        print(f"written to {path.name}")
    is_fast = ratios["transformers"]["of_medians"] >= LEAST_RATIO
    if not is_fast:
        print(f"FAILED: titan is to be {LEAST_RATIO} times as fast as the plain loop", file=sys.stderr)
    return 0 if is_fast else 1


def _read_batches(frozen: Path, steps: int) -> list[Any]:
    # the very rows that titan's side trains on, in the same order
    from titan.data.loader import collate
    from titan.data.mixture import load_rows
    from titan.data.prepare import Preparation
    from titan.data.tokenizer import build_tokenizer

    config = load_config(frozen)
    preparation = Preparation(build_tokenizer(config.tokenizer), config.data.cache_dir or "")
    rows = load_rows(config.data, SEQ_LEN, preparation)
    order = rows.order(ROWS, config.training.seed)
    batches = [collate(rows.read(order.rows_of_step(step))) for step in range(steps)]
    return [(batch.tokens, batch.labels) for batch in batches]


def _rate(result: dict[str, Any]) -> float:
    return ROWS * SEQ_LEN / statistics.median(result["step_seconds"])


def _outline(result: dict[str, Any]) -> dict[str, float]:
    return {
        "tokens_per_second": round(_rate(result), 1),
        "cores_busy_elsewhere": result["cores_busy_elsewhere"],
    }


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    turns = [our / their for our, their in zip(ours, theirs, strict=True)]
    of_medians = statistics.median(ours) / statistics.median(theirs)
    return {"of_medians": round(of_medians, 3), "least": round(min(turns), 3), "most": round(max(turns), 3)}


def _peak_memory_gib() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / (1 << 20)


def _keep_freed_memory() -> None:
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # mmap_max, trim_threshold, arena_max
        mallopt(parameter, value)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each side")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each process, after the warm-up")
    parser.add_argument("--quick", action="store_true", help="2 repetitions of 3 steps; writes no result")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--kept-memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.steps = 2, 3
    return arguments


if __name__ == "__main__":
    sys.exit(main())
