"""What a page says, read out of its HTML by a parser of Python's own."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """The elements, tables and data of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.words = ""
        self._inside: list[str] = []
        self._script = ""
        self.feed(text)
        self.data: dict[str, Any] = json.loads(self._script)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append("data" if ("id", "data") in attrs else tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() not in (tag, "data"):
            pass

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["data"]:
            self._script += data
        elif not {"script", "style"} & set(self._inside):
            self.words += data
            if {"td", "th"} & set(self._inside):
                self.tables[-1][-1][-1] += data

    def curve(self, key: str, run: int = 0) -> list[tuple[int, float]]:
        """Return a curve's points."""
        return list(zip(*self.data["curves"][key][run], strict=True))

    def count(self, tag: str) -> int:
        """Return how many elements of a kind there are."""
        return sum(name == tag for name, _ in self.elements)


def read_page(path: Path) -> Page:
    """Return what a page's file says."""
    return Page(path.read_text())
