"""What pages repeat of the code is what the code says, and the site needs nothing of the network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.support.command import REPOSITORY
from titan.config.keys import schema_keys
from titan.config.load import option_groups
from titan.convert.torchtitan_options import OPTIONS

from . import pages


@pytest.fixture(scope="module")
def generated() -> dict[Path, str]:
    """The generated pages."""
    return pages.pages()


def test_generated_pages_are_what_the_code_says(generated: dict[Path, str]) -> None:
    """After a change of the schema, of conf/ or of the table of options: python -m tests.documentation.pages."""
    old = [path.name for path, text in generated.items() if path.read_text() != text]
    assert old == [], "python -m tests.documentation.pages   writes them anew"


def test_the_page_of_keys_has_every_key_and_every_option(generated: dict[Path, str]) -> None:
    """No field of the schema and no file of conf/ is missing on it."""
    page = generated[pages.DOCS / "configuration.md"]
    missing = [key.name for key in schema_keys().values() if not key.is_node and f"| `{key.name}` |" not in page]
    assert missing == []
    groups = {group: options for group, options in option_groups().items() if not group.startswith("hydra")}
    for group, options in groups.items():
        section = page.partition(f"\n## {group}\n")[2].partition("\n## ")[0]
        assert [option for option in options if f"| `{option}`" not in section] == [], group


def test_the_page_for_torchtitans_users_has_every_option(generated: dict[Path, str]) -> None:
    """No option of the table is missing on it, and none of its rows is cut by a sign of the table."""
    page = generated[pages.DOCS / "coming_from_torchtitan.md"]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for option in OPTIONS:
        name = option.name.partition(".")[2]
        assert any(row.startswith(f"| `{name}` |") and row.count(" | ") == 3 for row in rows), name


def test_the_site_fetches_nothing() -> None:
    """No font, script or style comes from elsewhere, and a warning of the build is an error."""
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False
    assert "extra_javascript" not in settings
    assert "extra_css" not in settings
    assert "mkdocs build --strict" in (REPOSITORY / "Makefile").read_text()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert re.findall(r"<(?:script|link|img|iframe)\b", page.read_text()) == [], page.name
        assert "```mermaid" not in page.read_text(), "the theme would fetch a script to draw it"
