"""The site builds without a warning and asks no other address; its generated pages are current."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import cli_reference
from conftest import ROOT
from test_layers import BASE, RULES

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
MARKS = ("<!-- layers: written from tests/test_layers.py -->\n", "<!-- end of layers -->\n")


def layers_table() -> str:
    """The table of docs/architecture.md; where all of the base may be imported it says `base`."""

    def names(some: set[str]) -> str:
        shown = ["*base*", *sorted(some - BASE)] if some >= BASE else sorted(some)
        return ", ".join(name if name.startswith("*") else f"`{name}`" for name in shown)

    rows = [
        f"| `{layer}` | {names(set(rule.ours))} | {names(set(rule.early))} | {names(set(rule.late))} |"
        for layer, rule in RULES.items()
    ]
    head = ["| layer | may import of ours | of others | of others, inside functions |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def test_the_page_of_commands_is_the_parsers() -> None:
    page = (DOCS / "cli.md").read_text("utf-8")
    assert page == cli_reference.document(), "run python scripts/cli_reference.py --write"


def test_the_table_of_layers_is_the_tests() -> None:
    _, _, rest = (DOCS / "architecture.md").read_text("utf-8").partition(MARKS[0])
    table, end, _ = rest.partition(MARKS[1])
    assert end
    assert table == layers_table()


def test_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9 * 1024


def test_commands_in_the_text_have_the_flags_they_show() -> None:
    """`dsatrace VERB --flag` in code: the verb's section of cli.md has the flag."""
    page = (DOCS / "cli.md").read_text("utf-8")
    sections = dict(re.findall(r"^## dsatrace (.+?)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    shown = 0
    wrong: list[tuple[str, ...]] = []
    for path in PAGES:
        for code in re.findall(r"(?<!`)`(dsatrace [^`\n]+)`(?!`)", path.read_text("utf-8")):
            words = code.split()[1:]
            verb = next((name for name in (" ".join(words[:2]), words[0]) if name in sections), "")
            flags = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
            shown += len(flags)
            if verb:
                known = set(re.findall(r"--[\w-]+", sections[verb]))
                wrong += [(path.name, code, flag) for flag in sorted(flags - known)]
            elif words[0] not in ("run", "study", "--version", "VERB"):
                wrong.append((path.name, code))
    assert wrong == []
    assert shown > 20


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("mkdocs") is None and not os.environ.get("CI"):
        pytest.skip("needs mkdocs-material: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_site_asks_no_other_address(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    loads = re.compile(
        r"<(?:script|img|source|iframe|video|audio|embed)\b[^>]*\bsrc(?:set)?=[\"']?\s*(?:https?:)?//[^\"'\s>]+"
        r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^\"'\s>]+|url\([\"']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*"
    )
    assert loads.search('<script src="https://cdn/a.js">') and loads.search(
        '<link rel="x" href=//fonts/a.css>'
    )
    files = [*pages, *site.rglob("*.css")]
    assert [(file.name, found[0]) for file in files if (found := loads.search(file.read_text("utf-8")))] == []


def test_the_site_can_be_searched(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    texts = " ".join(entry["text"] for entry in index["docs"])
    for word in ("--kv-layout", "needle-2k", "indexer_scan"):
        assert word in texts, word


def test_no_mark_of_markdown_is_left_on_a_page(site: Path) -> None:
    """What the site's Markdown reads otherwise than GitHub's: fences in lists, tables behind text."""
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text("utf-8"), flags=re.DOTALL)
        assert "```" not in text, page
        assert "|---" not in text, page
