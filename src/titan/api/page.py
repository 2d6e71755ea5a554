"""What every display in a notebook shares: escaping, and a few rules of style that work on light and dark pages."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from enum import Enum
from typing import Any

_STYLE = """<style>
.titan-view {font-family: var(--jp-code-font-family, ui-monospace, monospace); font-size: 0.92em; line-height: 1.5}
.titan-view details {margin-left: 1.2em}
.titan-view > details {margin-left: 0}
.titan-view .leaf {margin-left: 2.4em}
.titan-view summary {cursor: pointer; font-weight: 600}
.titan-view .changed {color: #c2410c; font-weight: 600}
.titan-view .faint {opacity: 0.6; font-weight: 400}
.titan-view table {border-collapse: collapse}
.titan-view th, .titan-view td {padding: 0.15em 0.8em; text-align: left}
.titan-view .number {text-align: right; font-variant-numeric: tabular-nums}
</style>"""


def page(body: str) -> str:
    """Return a fragment of HTML with its style; the body is escaped already."""
    return f'{_STYLE}<div class="titan-view">{body}</div>'


def escape(value: object) -> str:
    """Return text that HTML takes for text, in elements and in attributes."""
    return html.escape(str(value), quote=True)


def table(heads: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]], caption: str = "") -> str:
    """Return a table.

    Args:
        heads: Of the columns.
        rows: Of cells, each a text, not yet escaped, and a class or nothing.
        caption: Above it.
    """
    above = f'<div class="faint">{escape(caption)}</div>' if caption else ""
    kinds = [kind for _, kind in rows[0]] if rows else [""] * len(heads)
    head = "".join(
        f'<th class="{"number" * (kind == "number")}">{escape(name)}</th>'
        for name, kind in zip(heads, kinds, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{escape(text)}</td>' for text, kind in row) + "</tr>" for row in rows
    )
    return f"{above}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return rows of cells as lines with aligned columns.

    Args:
        rows: All of one length.
        right: The columns that are aligned to the right.
    """
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def spelled(value: Any) -> str:
    """Return a value of a config as it is typed: null, true, a list in brackets, a table in braces."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(spelled, value))}]"
    if dataclasses.is_dataclass(value):
        named = ((field.name, getattr(value, field.name), field.default) for field in dataclasses.fields(value))
        value = {name: each for name, each, default in named if each != default}
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {spelled(each)}' for name, each in value.items())}}}"
    return str(value)
