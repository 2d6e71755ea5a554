"""The page: one file of HTML that asks for nothing else, so that it can be mailed and still opens in ten years.

All of it is there without JavaScript. Every text that comes from a run is escaped where it is put in, and the page's
own policy lets nothing run but the one script that titan has written.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from titan.metrics.sinks import format_seconds
from titan.report import style
from titan.report.curves import METRICS, Points, curves_of, points_per_curve
from titan.report.facts import (
    MOST_VARIED,
    Figures,
    best_first,
    count_events,
    describe_event,
    faults_of,
    figures_of,
    notices,
)
from titan.report.goodput import PARTS, Goodput, account
from titan.report.mfu import CAUSAL_FORMULA, FULL_FORMULA, LETTERS, flops_per_token
from titan.report.plot import colour_class, draw
from titan.report.runs import Run, varied_keys

_MOST_EVENTS = 200
_MOST_SAMPLES = 60
_MOST_LETTERS = 4000
"""Of one sample."""


def build_page(runs: Sequence[Run], title: str, now: float, made: str) -> str:
    """Return the page of one run or of several.

    Args:
        runs: In the order in which they have their colours.
        title: The path that was asked for.
        now: In seconds; the end of a run that still goes on.
        made: The same as text.
    """
    goodputs = [account(run, now) for run in runs]
    figures = [figures_of(run, goodput) for run, goodput in zip(runs, goodputs, strict=True)]
    curves, varied = curves_of(runs), varied_keys(runs) if len(runs) > 1 else []
    names = _names(runs, varied)
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=soft>{_subtitle(runs)} Made {_text(made)} by titan.report.</p>",
        *(f'<p class="notice">{_text(notice)}</p>' for notice in notices(runs)),
        _facts(figures[0]) if len(runs) == 1 else _points(runs, figures, varied),
        _plots(runs, curves, names),
        _mfu(runs, curves),
        _times(runs, goodputs),
        _events(runs),
        _samples(runs),
        _configs(runs, varied),
    ]
    data = {
        "runs": [{"name": name, "path": str(run.directory.path)} for run, name in zip(runs, names, strict=True)],
        "curves": curves,
        "goodput": [_goodput_data(each) for each in goodputs],
    }
    return _document(title, "".join(body), data)


def _document(title: str, body: str, data: dict[str, Any]) -> str:
    digest = base64.b64encode(hashlib.sha256(style.SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)} - titan</title><style>{style.CSS}</style></head><body>{body}"
        f'<script type="application/json" id="data">{_json(data)}</script><script>{style.SCRIPT}</script>'
        "</body></html>\n"
    )


def _json(data: object) -> str:
    """Return JSON that cannot end the element it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(value: object) -> str:
    return escape(str(value))


def _names(runs: Sequence[Run], varied: list[str]) -> list[str]:
    """Return what each run is called in legends: its path or number, and what it alone has."""
    return [f"{run.name}  {_settings(run, varied)}".rstrip() if 0 < len(varied) <= 4 else run.name for run in runs]


def _settings(run: Run, varied: list[str]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={_value(run.config.get(key))}" for key in varied)


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs."
    run = runs[0]
    model = run.config.get("model.name")
    return f"Model {_text(model)}, {_text(run.state)}." if model else f"{_text(run.state).capitalize()}."


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _facts(figures: Figures) -> str:
    entries = [
        ("State", figures.state),
        ("Step", figures.progress),
        ("Last loss", _number(figures.loss, ".4f")),
        ("Last validation loss", _number(figures.validation_loss, ".4f")),
        ("Tokens", _number(figures.tokens, ",")),
        ("Tokens a second, median", _number(figures.tokens_per_second, ",.0f")),
        ("MFU, full attention, median", _number(figures.mfu, ".1%")),
        ("MFU, causal attention, median", _number(figures.mfu_causal, ".1%")),
        ("Memory, peak", f"{_number(figures.memory_gib, '.2f')} GiB"),
        ("Wall time", figures.wall),
        ("Goodput", _number(figures.goodput, ".1%")),
        ("Starts", str(figures.attempts)),
    ]
    shown = [(title, value) for title, value in entries if not value.startswith("-")]
    cells = "".join(f"<div><dt>{title}</dt><dd>{_text(value)}</dd></div>" for title, value in shown)
    return f"<dl class=facts>{cells}</dl>"


def _points(runs: Sequence[Run], figures: Sequence[Figures], varied: list[str]) -> str:
    """Return the table of runs, the best loss first, with the parameters that vary."""
    columns: list[tuple[str, str, list[str]]] = [
        ("run", "t", [f"{_swatch(index)}{_text(run.name)}" for index, run in enumerate(runs)]),
        ("last loss", "n", [_number(each.loss, ".4f") for each in figures]),
        ("validation", "n", [_number(each.validation_loss, ".4f") for each in figures]),
        *((_text(key), "t", [_text(_value(run.config.get(key))) for run in runs]) for key in varied[:MOST_VARIED]),
        ("step", "n", [each.progress for each in figures]),
        ("tokens/s", "n", [_number(each.tokens_per_second, ",.0f") for each in figures]),
        ("MFU", "n", [_number(each.mfu, ".1%") for each in figures]),
        ("GiB", "n", [_number(each.memory_gib, ".2f") for each in figures]),
        ("wall time", "n", [each.wall for each in figures]),
        ("goodput", "n", [_number(each.goodput, ".1%") for each in figures]),
        ("state", "t", [_text(each.state) for each in figures]),
    ]
    columns = [column for column in columns if any(value != "-" for value in column[2])]
    head = [(title, kind) for title, kind, _ in columns]
    rows = [[(values[index], kind) for _, kind, values in columns] for index in best_first(runs)]
    more = len(varied) - MOST_VARIED
    note = (
        f"<p class=note>{more} more key{'s differ' if more > 1 else ' differs'}: see below, under Config.</p>"
        if more > 0
        else ""
    )
    return f"<h2>Runs, by their last loss</h2>{_table(head, rows)}{note}"


def _table(head: Iterable[tuple[str, str]], rows: Iterable[Iterable[tuple[str, str]]]) -> str:
    """Return a table of cells that are HTML already, each with the class of its column."""
    top = "".join(f'<th class="{kind}">{title}</th>' for title, kind in head)
    lines = "".join(f"<tr>{''.join(f'<td class={kind}>{cell}</td>' for cell, kind in row)}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def _swatch(index: int) -> str:
    return (
        f'<svg class="swatch {colour_class(index)}" viewBox="0 0 22 10" aria-hidden="true" style="width:22px">'
        '<line x1="0" x2="22" y1="5" y2="5"/></svg>'
    )


def _plots(runs: Sequence[Run], curves: dict[str, list[Points]], names: Sequence[str]) -> str:
    if not curves:
        return ""
    legend = ""
    if len(runs) > 1:
        legend = "".join(f"<li>{_swatch(index)}{_text(name)}</li>" for index, name in enumerate(names))
        legend = f'<ul class="legend">{legend}</ul>'
    most, longest = points_per_curve(len(runs)), max(len(run.training) for run in runs)
    thinned = ""
    if longest > most:
        thinned = (
            f"<p class=note>Of {longest:,} logged steps each curve shows up to {most}: the smallest and the largest of "
            "every stretch.</p>"
        )
    plots = "".join(draw(metric, curves[metric.key], names) for metric in METRICS if metric.key in curves)
    return f"<h2>Curves</h2>{legend}<div class=plots>{plots}</div>{thinned}"


def _mfu(runs: Sequence[Run], curves: dict[str, list[Points]]) -> str:
    """Return what MFU means here; nothing is claimed where the device's peak is not known."""
    if not any(run.training for run in runs):
        return ""
    if "mfu" not in curves:
        return (
            "<p class=note>No MFU: the peak of this device at this precision is not known. It is known for bfloat16 "
            "on common GPUs.</p>"
        )
    counts = ""
    if len(runs) == 1 and (flops := flops_per_token(runs[0].config)) is not None:
        counts = f" Here: {flops[0] / 1e9:,.3f} and {flops[1] / 1e9:,.3f} GFLOP a token."
    return (
        f"<p class=note>MFU, full attention: {FULL_FORMULA}. MFU, causal attention: {CAUSAL_FORMULA}. "
        f"{_text(LETTERS)}{counts}</p>"
    )


def _times(runs: Sequence[Run], goodputs: Sequence[Goodput | None]) -> str:
    known = [(run, goodput) for run, goodput in zip(runs, goodputs, strict=True) if goodput is not None]
    if not known:
        return ""
    intro = (
        "<h2>Where the time went</h2><p class=note>From the first start to the end, every second once. Goodput is "
        "training's share of it.</p>"
    )
    if len(runs) == 1:
        goodput = known[0][1]
        rows = [
            [
                (f'<span class="dot p-{part}"></span>{_text(PARTS[part])}', "w"),
                (format_seconds(seconds), "n"),
                (f"{seconds / max(goodput.wall_seconds, 1e-9):.1%}", "n"),
            ]
            for part, seconds in goodput.seconds.items()
            if seconds > 0
        ]
        rows.append([("all", "w"), (format_seconds(goodput.wall_seconds), "n"), ("100.0%", "n")])
        return f"{intro}{_bar(goodput)}{_table([('', 't'), ('time', 'n'), ('share', 'n')], rows)}"
    parts = [part for part in PARTS if any(goodput.seconds[part] > 0 for _, goodput in known)]
    head = [("run", "t"), ("", "t"), ("goodput", "n"), ("wall time", "n"), ("starts", "n")]
    rows = [
        [
            (_text(run.name), "t"),
            (_bar(goodput, "thin"), "t"),
            (f"{goodput.share:.1%}", "n"),
            (format_seconds(goodput.wall_seconds), "n"),
            (str(goodput.attempts), "n"),
        ]
        for run, goodput in known
    ]
    legend = "".join(f'<li><span class="dot p-{part}"></span>{_text(PARTS[part])}</li>' for part in parts)
    return f'{intro}<ul class="legend">{legend}</ul>{_table(head, rows)}'


def _bar(goodput: Goodput, kind: str = "") -> str:
    wall = max(goodput.wall_seconds, 1e-9)
    shares = [(part, seconds / wall) for part, seconds in goodput.seconds.items() if seconds > 0]
    parts = "".join(
        f'<i class="p-{part}" style="width:{share:.3%}" title="{_text(PARTS[part])}: {share:.1%}"></i>'
        for part, share in shares
    )
    return f'<div class="bar {kind}">{parts}</div>'


def _goodput_data(goodput: Goodput | None) -> dict[str, Any] | None:
    if goodput is None:
        return None
    return {"wall_seconds": goodput.wall_seconds, "attempts": goodput.attempts, "seconds": goodput.seconds}


def _events(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        found = faults_of(run)
        title = f"<h3>{_text(run.name)}</h3>" if len(runs) > 1 else ""
        if not found and len(runs) > 1:
            continue
        left = f"<p class=note>The last {_MOST_EVENTS} of {len(found):,}.</p>" if len(found) > _MOST_EVENTS else ""
        rows = [
            [(_text(_when(event)), "t"), (_text(event.get("event")), "t"), (_text(describe_event(event)), "w")]
            for event in found[-_MOST_EVENTS:]
        ]
        table = _table([("time (UTC)", "t"), ("event", "t"), ("", "w")], rows) if rows else "<p>None.</p>"
        parts.append(f"{title}{left}{table}<p class=note>Of all events: {_text(count_events(run))}.</p>")
    return f"<h2>Restarts and faults</h2>{''.join(parts) or '<p>None.</p>'}"


def _when(event: dict[str, Any]) -> str:
    return str(event.get("time", "")).replace("T", " ")[:19]


def _samples(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if not run.samples:
            continue
        rows = [
            [(_text(sample.get("step", "")), "n"), (_cut(sample.get("prompt")), "w"), (_cut(sample.get("text")), "w")]
            for sample in run.samples[-_MOST_SAMPLES:]
        ]
        table = _table([("step", "n"), ("prompt", "w"), ("text", "w")], rows)
        title = f"{_text(run.name)}: " if len(runs) > 1 else ""
        left = f", the last {_MOST_SAMPLES}" if len(run.samples) > _MOST_SAMPLES else ""
        parts.append(
            f"<details{' open' if len(runs) == 1 else ''}><summary>{title}{len(run.samples):,} samples{left}</summary>"
            f"{table}</details>"
        )
    return f"<h2>Samples</h2>{''.join(parts)}" if parts else ""


def _cut(text: object) -> str:
    shown = "" if text is None else str(text)
    return _text(shown[:_MOST_LETTERS]) + (" ..." if len(shown) > _MOST_LETTERS else "")


def _configs(runs: Sequence[Run], varied: list[str]) -> str:
    parts = []
    if len(runs) > 1 and varied:
        head = [("key", "t"), *((_text(run.name), "t") for run in runs)]
        rows = [[(_text(key), "t"), *((_text(_value(run.config.get(key))), "t") for run in runs)] for key in varied]
        parts.append(f"<h3>Where the runs differ</h3>{_table(head, rows)}")
    elif len(runs) > 1:
        parts.append("<p>The configs are the same, but for where the runs are.</p>")
    texts: dict[str, list[str]] = {}
    for run in runs[:1] if len(runs) > 1 else runs:
        texts.setdefault(run.config_text, []).append(run.name)
    for text, names in texts.items():
        whose = f" of {_text(', '.join(names))}" if len(runs) > 1 else ""
        if text:
            parts.append(f"<details><summary>The whole config{whose}</summary><pre>{_text(text)}</pre></details>")
        else:
            parts.append("<p>There is no config.yaml.</p>")
    return f"<h2>Config</h2>{''.join(parts)}"
