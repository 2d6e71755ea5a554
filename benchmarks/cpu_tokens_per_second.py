"""Tokens a second of the debug model on one CPU process, beside a plain loop over the transformers library's Llama.

Both sides train the same shape on the same rows in float32 with AdamW and clipping at norm 1. titan's side is the
command itself, `python -m titan.train`, with its own step times from metrics.jsonl: loading, logging and the process
group are in them. The other side is the loop that one would write by hand, given its rows ready-made and the fused
AdamW. Each repetition is a process of its own and the sides take turns, so neither has the quieter minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import describe_machine, load, spread, write_result

from titan.config.load import compose, load_config

ROWS, SEQ_LEN, WARM_UP = 8, 512, 2
LEAST_RATIO = 1.2
SIDES = {
    "titan": "python -m titan.train",
    "transformers": "plain loop over transformers.LlamaForCausalLM",
    "transformers_kept_memory": "the same loop, with freed memory kept as titan keeps it",
}


def main() -> int:
    """Measure all sides in turn, print and write the figures; 1 where titan is not fast enough."""
    arguments = _parse_arguments()
    if arguments.loop is not None:
        run_loop(Path(arguments.loop), arguments.steps, arguments.kept_memory)
        return 0
    sides = list(SIDES) if arguments.explain else ["titan", "transformers"]
    machine = describe_machine()
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        frozen = Path(folder) / "warm" / "config.yaml"
        run_titan(frozen.parent, Path(folder), WARM_UP + 1)  # tokenises the data, and freezes the config for the others
        for repeat in range(arguments.repeats):
            for side in sides:
                if side == "titan":
                    result = run_titan(Path(folder) / f"run_{repeat}", Path(folder), arguments.steps + WARM_UP)
                else:
                    result = start_loop(frozen, arguments.steps + WARM_UP, side.endswith("kept_memory"))
                found[side].append(result)
                print(f"{repeat + 1}/{arguments.repeats}  {side:<25} {_rate(result):>8,.0f} tok/s", flush=True)
    return report(machine, found, arguments)


def run_titan(directory: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Train with the command; return the seconds of each step and the peak memory."""
    command = [
        *(sys.executable, "-m", "titan.train", "model=llama3_debug", "cluster.device=cpu"),
        *(f"training.seq_len={SEQ_LEN}", f"training.local_batch_size={ROWS}", f"training.steps={steps}"),
        *("training.param_dtype=float32", "training.max_grad_norm=1.0", "checkpoint=disabled", "metrics.log_every=1"),
        *(f"run.dir={directory}", f"data.cache_dir={folder}/cache"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
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
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


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


def report(machine: dict[str, Any], found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> int:
    """Print and write what was found; return the exit code."""
    from titan.models.flops import count_parameters

    model = compose(["model=llama3_debug"]).model
    parameters = {"titan": count_parameters(model), "transformers": found["transformers"][0]["parameters"]}
    if len(set(parameters.values())) != 1:
        raise SystemExit(f"the models are not of the same size: {parameters}")
    rates = {side: [_rate(result) for result in results] for side, results in found.items()}
    figures = {
        side: {
            "what": SIDES[side],
            "tokens_per_second": spread(rates[side]),
            "peak_memory_gib": spread([result["peak_memory_gib"] for result in results]),
            "first_loss": results[0]["first_loss"],
            "last_loss": results[0]["last_loss"],
            "repeats": [round(rate, 1) for rate in rates[side]],
        }
        for side, results in found.items()
    }
    ratio = statistics.median(rates["titan"]) / statistics.median(rates["transformers"])
    pairs = [ours / theirs for ours, theirs in zip(rates["titan"], rates["transformers"], strict=True)]
    print(f"\n{machine['cpu']}, {machine['cores']} cores; {model.name}, {parameters['titan']:,} parameters, float32")
    print(f"{ROWS} rows x {SEQ_LEN}; {arguments.repeats} repetitions of {arguments.steps} steps after {WARM_UP}\n")
    print(f"{'':<26}{'median':>9}{'least':>9}{'most':>9}  tok/s{'peak':>9} GiB")
    for side, figure in figures.items():
        rate, memory = figure["tokens_per_second"], figure["peak_memory_gib"]["median"]
        print(f"{side:<26}{rate['median']:>9,.0f}{rate['least']:>9,.0f}{rate['most']:>9,.0f}{memory:>16.2f}")
    print(f"\ntitan / transformers: {ratio:.2f} (pairs: {min(pairs):.2f} to {max(pairs):.2f}; wanted: {LEAST_RATIO})")
    machine["load_after"] = load()
    if not arguments.quick:
        path = write_result(
            "cpu_tokens_per_second",
            machine,
            shape={"model": model.name, "parameters": parameters["titan"], "rows": ROWS, "seq_len": SEQ_LEN},
            steps=arguments.steps,
            ratio=round(ratio, 4),
            ratios_of_pairs=[round(pair, 4) for pair in pairs],
            sides=figures,
        )
        print(f"written to {path}")
    return 0 if ratio >= LEAST_RATIO else 1


def _read_batches(frozen: Path, steps: int) -> list[Any]:
    # the very rows that titan's side trains on, in the same order
    from titan.data.batch import RowOrder
    from titan.data.loader import PackedRows, collate
    from titan.data.packing import pack_tokens
    from titan.data.tokenizer import build_tokenizer

    config = load_config(frozen)
    tokenizer = build_tokenizer(config.tokenizer)
    rows = PackedRows(pack_tokens(config.data, tokenizer, is_writer=True, timeout_seconds=60), SEQ_LEN, tokenizer.eos)
    order = RowOrder(len(rows), ROWS, config.training.seed)
    batches = [collate([rows[int(row)] for row in order.rows_of_step(step)]) for step in range(steps)]
    return [(batch.tokens, batch.labels) for batch in batches]


def _rate(result: dict[str, Any]) -> float:
    return ROWS * SEQ_LEN / statistics.median(result["step_seconds"])


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
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each process, after the warm-up")
    parser.add_argument("--quick", action="store_true", help="2 repetitions of 3 steps; writes no result")
    parser.add_argument("--explain", action="store_true", help="also the plain loop with titan's memory settings")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--kept-memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.steps = 2, 3
    return arguments


if __name__ == "__main__":
    sys.exit(main())
