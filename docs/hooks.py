"""What MkDocs is told beside mkdocs.yml: the order of the pages, and where links lead that leave docs/.

The pages are written to be read in the repository too, where a link to ../benchmarks/README.md is right. In the site
that page is one of its own, and a link to a file of code keeps its words alone. A page that is listed and not there is
left out, one that is there and not listed comes last, so that adding a page is writing it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES: dict[str, list[str]] = {
    "Start": ["index.md", "coming_from_torchtitan.md"],
    "Use": [
        "configuration.md",
        "parallelism.md",
        "data.md",
        "checkpoints.md",
        "convert.md",
        "generate.md",
        "clusters.md",
        "plan.md",
        "doctor.md",
        "python.md",
    ],
    "Look": ["metrics.md", "report.md", "performance.md", "reliability.md", "benchmarks.md"],
    "Inside": ["architecture.md", "adding_a_model.md"],
}
"""The order of the pages."""
FROM_OUTSIDE = {"benchmarks.md": "benchmarks/README.md"}
"""Pages of the site that lie elsewhere in the repository."""


def on_config(config: Any) -> Any:
    """Make the navigation of the pages that are there."""
    there = {path.name for path in Path(config["docs_dir"]).glob("*.md")} | set(FROM_OUTSIDE)
    nav: list[dict[str, list[str]]] = [
        {section: [page for page in pages if page in there]} for section, pages in PAGES.items()
    ]
    rest = sorted(there - {page for pages in PAGES.values() for page in pages})
    config["nav"] = [*nav, {"More": list(rest)}] if rest else nav
    return config


def on_files(files: Files, config: Any) -> Files:
    """Take the pages along that lie outside of docs/."""
    for page, path in FROM_OUTSIDE.items():
        files.append(File.generated(config, page, content=(REPOSITORY / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make the links that leave a page's folder lead somewhere in the site.

    Raises:
        FileNotFoundError: If a link leads to no file of the repository.
    """
    folder = (REPOSITORY / FROM_OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    pages = {(REPOSITORY / path).resolve(): name for name, path in FROM_OUTSIDE.items()}

    def lead(match: re.Match[str]) -> str:
        words, target, anchor = match["words"], match["target"], match["anchor"] or ""
        path = (folder / target).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which is not there")
        if path.is_dir() and (path / "README.md") in pages:
            path /= "README.md"
        if path in pages:
            return f"[{words}]({pages[path]}{anchor})"
        if path.parent == REPOSITORY / "docs":
            return f"[{words}]({path.name}{anchor})"
        return words

    link = r"\[(?P<words>[^\]]*)\]\((?P<target>(?!https?:|#)[^)#\s]+)(?P<anchor>#[^)]*)?\)"
    return re.sub(link, lead, markdown)
