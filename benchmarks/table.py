"""Write the figures of results/ into README.md and docs/performance.md, so that no number there was typed by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import RESULTS

README = Path(__file__).with_name("README.md")
PERFORMANCE_END = "<!-- end -->\n"
PERFORMANCE = README.parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- figures: python benchmarks/table.py -->\n", "<!-- end of figures -->\n"


def main() -> int:
    """Replace the tables."""
    write_performance()
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    lines = ["| what | median | least to most | unit |", "|---|---:|---:|---|"]
    lines += [f"| {' | '.join(cells)} |" for result in _results() for cells in _rows(**result)]
    lines += ["", *(_origin(**result) for result in _results())]
    README.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after)
    return 0


def write_performance() -> None:
    """Replace the tables of docs/performance.md for which there are results."""
    text = PERFORMANCE.read_text()
    for name, lines_of in (
        ("training_cpu", _training_lines),
        ("training_cpu_float32", _training_lines),
        ("training_cuda", _training_lines),
        ("loss", _loss_lines),
        ("attention", _attention_lines),
    ):
        path, begin = RESULTS / f"{name}.json", f"<!-- {name}: python benchmarks/table.py -->\n"
        if not path.exists() or begin not in text:
            continue
        result = json.loads(path.read_text())
        before, rest = text.split(begin)
        after = rest.split(PERFORMANCE_END, 1)[1]
        lines = "\n".join([*lines_of(result), "", _origin(name, result)])
        text = f"{before}{begin}\n{lines}\n\n{PERFORMANCE_END}{after}"
    PERFORMANCE.write_text(text)


def _training_lines(result: dict[str, Any]) -> Iterator[str]:
    for name, case in result["cases"].items():
        side = case["sides"][0]
        yield f"**{name}**: `{case['model']}`, {side['rows']} rows x {case['seq_len']:,} tokens"
        yield ""
        yield "| what | tokens/s | least to most | TFLOP/s, full and causal | peak GiB | first step, s |"
        yield "|---|---:|---:|---:|---:|---:|"
        for side in case["sides"]:
            rate, flops = side["tokens_per_second"], side["tflops"]
            yield (
                f"| {side['name']} | {rate['median']:,.0f} | {rate['least']:,.0f} to {rate['most']:,.0f} | "
                f"{flops['full']:.2f}, {flops['causal']:.2f} | {side['peak_memory_gib']['median']:.2f} | "
                f"{side['first_step_seconds']['median']:.1f} |"
            )
        yield ""
        for mark in case["marks"]:
            is_met = "met" if mark["ratio"] >= mark["least"] else "**missed**"
            yield (
                f"- {mark['ours']}, times {mark['theirs']}: {mark['ratio']:.2f} (turns: {mark['least_turn']:.2f} to "
                f"{mark['most_turn']:.2f}); the mark is {mark['least']}: {is_met}"
            )
        yield ""


def _loss_lines(result: dict[str, Any]) -> Iterator[str]:
    shape, names = result["shape"], {"plain": "all logits at once", "titan": "titan's chunks"}
    cores = result["machine"]["cores"]
    yield f"{shape['positions']:,} positions, {shape['dim']:,} wide, {shape['dtype']}, {cores} cores:"
    yield ""
    yield "| how | seconds | least to most | peak GiB |"
    yield "|---|---:|---:|---:|"
    for way, found in result["ways"].items():
        seconds, name = found["seconds"], names.get(way, "PyTorch, `linear_cross_entropy`")
        spread = f"{seconds['least']:.2f} to {seconds['most']:.2f}"
        yield f"| {name} | {seconds['median']:.2f} | {spread} | {found['peak_gib']['median']:.2f} |"


def _attention_lines(result: dict[str, Any]) -> Iterator[str]:
    yield "| rows x tokens, heads | format | titan, forward + back, ms | PyTorch, ms | times as fast | least to most |"
    yield "|---|---|---:|---:|---:|---:|"
    for case in result["cases"]:
        shape, ratio = case["shape"], case["ratio"]
        of_keys = f", {shape['kv_heads']} of keys" if shape["kv_heads"] != shape["heads"] else ""
        what = f"{shape['rows']} x {shape['tokens']:,}, {shape['heads']} of {shape['head_size']}{of_keys}"
        times = " | ".join(
            " + ".join(f"{case[side][part]['median'] * 1e3:.1f}" for part in ("forward", "backward"))
            for side in ("titan", "pytorch")
        )
        spread = f"{ratio['least']:.2f} to {ratio['most']:.2f}"
        yield f"| {what} | {case['dtype']} | {times} | {ratio['median']:.2f} | {spread} |"


def _results() -> Iterator[dict[str, Any]]:
    for name in (
        "startup",
        "submission",
        "memory_flatness",
        "axis_cost",
        "checkpoints",
        "data_prepare",
        "data_streaming",
    ):
        path = RESULTS / f"{name}.json"
        if path.exists():
            yield {"name": name, "result": json.loads(path.read_text())}


def _rows(name: str, result: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Return the rows of one benchmark: what, median, spread, unit."""
    if name == "startup":
        yield _row("`--cfg job`", result["cfg_job_seconds"], ".2f", "s")
        yield _row("command to frozen config (front end)", result["front_end_seconds"], ".2f", "s")
        yield _row("command to first step", result["first_step_seconds"], ".2f", "s")
        yield _row("the same, 2 processes", result["first_step_seconds_of_2_processes"], ".2f", "s")
        for part, seconds in result["parts_seconds"].items():
            yield _row(f"part: {part}", seconds, ".2f", "s")
        yield "part: data, not yet tokenised", f"{result['data_seconds_first_time']:.2f}", "once", "s"
    elif name == "submission":
        for case, seconds in result["seconds"].items():
            yield _row(f"submission to SLURM: {case}", seconds, ".2f", "s")
    elif name == "checkpoints":
        for side, seconds in result["seconds"].items():
            what = "" if side.startswith(("load", "plain")) else "training waits for a save, "
            yield _row(f"{result['gib']:.1f} GiB of state, 4 processes: {what}{side}", seconds, ".2f", "s")
        for side, ratio in result["times_plain"].items():
            yield _row(f"the same: {side}, times plain", ratio, ".2f", "of turns")
        yield _row("the same: checksums, share of a synchronous save", result["checksum_share"], ".3f", "")
    elif name == "data_prepare":
        for side, rate in result["tokenising_tokens_per_second"].items():
            what = {"titan": "`titan.prepare`", "datasets": "`datasets.map`"}.get(side, "`datasets.map`, with loading")
            yield _row(f"tokenising, 2 processes: {what}", rate, ",.0f", "tokens/s")
        yield "the same: `titan.prepare`, times `datasets.map`", f"{result['ratio']:.2f}", "", "of turns"
        yield "the same: with loading", f"{result['ratio_with_loading']:.2f}", "", "of turns"
        for seq_len, rate in result["reading_tokens_per_second"].items():
            yield _row(f"reading prepared rows of {seq_len}, 1 process", rate, ",.0f", "tokens/s")
        for size, mib in (("8", result["memory_mib"]["small"]), ("256", result["memory_mib"]["large"])):
            yield f"reading {size} MiB of prepared tokens: memory", f"{mib:.1f}", "", "MiB"
    elif name == "data_streaming":
        for case in result["cases"]:
            what = f"streamed text, tokenizer {case['tokenizer']}, {case['workers']} workers"
            yield what, f"{case['tokens_per_second']:,.0f}", "once", "tokens/s"
    elif name == "axis_cost":
        for found in result["cases"]:
            yield _row(f"{found['case']}: a step", found["seconds_a_step"], ".2f", "s")
            if found["bytes_by_formula"]:
                yield f"{found['case']}: times one process", f"{found['times_one_process']:.2f}", "", ""
            for kind, count in sorted(found["bytes_by_formula"].items()):
                counted = found["bytes_counted"].get(kind, 0)
                formula = f"by the formula {count / 1e6:,.1f}"
                yield f"{found['case']}: {kind.replace('_', '-')} a step", f"{counted / 1e6:,.1f}", formula, "MB"
    else:
        for case, found in result["cases"].items():
            title = case.replace("_", " ")
            yield f"{title}: peak resident memory", f"{found['peak_gib']:.2f}", "", "GiB"
            yield f"{title}: growth of the peak", f"{found['growth_of_peak']:.1%}", "", "of steps 101–200"
            yield f"{title}: growth of anonymous memory", f"{found['growth_of_resident']:.1%}", "", "of steps 101–200"
            slope = found["slope_of_resident_kib_per_step"]
            yield f"{title}: slope of anonymous memory", f"{slope:.1f}", "", "KiB/step"


def _row(what: str, spread: dict[str, float], form: str, unit: str) -> tuple[str, str, str, str]:
    return what, f"{spread['median']:{form}}", f"{spread['least']:{form}} to {spread['most']:{form}}", unit


def _origin(name: str, result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    changed = " with changes on top" if machine["changed_since_commit"] else ""
    return (
        f"- `{name}`: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, no GPU; Python "
        f"{machine['python']}, {versions}; commit {machine['commit'][:7]}{changed}, {machine['time'][:10]}"
    )


if __name__ == "__main__":
    sys.exit(main())
