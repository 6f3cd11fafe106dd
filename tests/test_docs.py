"""The site builds without a warning and asks no other address; its generated pages are current."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest

import cli_reference
from conftest import ROOT
from dsatrace.cli import main
from dsatrace.commands.parser import CommandParser
from test_layers import BASE, RULES
from test_readme import commands, fences

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
THE_READERS_OWN = {"outputs/fp32", "outputs/bf16", "outputs/a", "outputs/b", "outputs/c"}
"""Runs that a page takes for given."""
OF_THE_CHECKOUT = re.compile(r"(data/(?!demo/)|scripts/|tests/|inference/|outputs/)[^*]+$")
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
    assert wrong == [], "\n".join(map(str, wrong))
    assert shown > 20


class _Parsed(BaseException):
    """A command line has flags that its parser knows, and values of their types."""


def words_of(command: str) -> list[str]:
    """Without comments; variables that count something stand for 0, a page's `model` for needle-2k."""
    command = re.sub(r"\{\}|\$\w*(INDEX|ID|seed)\b", "0", command.replace("$model", "data/models/needle-2k"))
    return shlex.split(command, comments=True) if command.count("'") % 2 == 0 else command.split()


def parses(words: list[str]) -> bool:
    try:
        main(words)
    except _Parsed:
        return True
    except SystemExit:
        return False
    raise AssertionError(f"{words} ran")


def files_made(lines: list[list[str]]) -> set[str]:
    """What the lines write, and Python in fences; with the folders it is in, and a replay beside its run."""
    written = {
        value
        for words in lines
        for flag, value in pairwise(words)
        if re.fullmatch("--((trace-)?out|output-dir|html|save-path)|>", flag)
    }
    written |= {word.removeprefix("OUT=") for words in lines for word in words if word.startswith("OUT=")}
    written |= {words[-1] for words in lines if words[:1] == ["cp"]}
    for page in PAGES:
        for _, text in fences(page, "python|sh"):
            written |= set(re.findall(r'"((?:outputs|data)/[^"]+)"', text))
    return written | {f"{run}_replay" for run in written} | {str(Path(file).parent) for file in written}


def test_commands_of_fences_parse_and_name_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that no test runs: verbs and flags, variables of tests, and files, here or made before."""
    parse = CommandParser.parse_args

    def parse_only(parser: CommandParser, *args: Any) -> NoReturn:
        parse(parser, *args)
        raise _Parsed

    monkeypatch.setattr(CommandParser, "parse_args", parse_only)
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))
    shown = [
        (page.name, command, words_of(command))
        for page in PAGES
        for _, text in fences(page, "sh")
        for command in commands(text)
    ]
    made, wrong = THE_READERS_OWN | files_made([words for _, _, words in shown]), []
    num_parsed = num_files = 0
    for page, command, words in shown:
        if "dsatrace" in words:
            num_parsed += 1
            wrong += [] if parses(words[words.index("dsatrace") + 1 :]) else [(page, command)]
        if "pytest" in words:
            variables = re.findall(r"([A-Z_]+)=", command)
            wrong += [(page, name) for name in variables if f'"{name}"' not in tests]
        files = [word for word in words if OF_THE_CHECKOUT.match(word)]
        num_files += len(files)
        wrong += [(page, file) for file in files if file not in made and not (ROOT / file).exists()]
    assert wrong == [], "\n".join(map(str, wrong))
    assert num_parsed > 50 and num_files > 100, (num_parsed, num_files)


def test_files_in_the_text_are_there() -> None:
    shown = re.compile(r"`(?:[^`\n]*? )?((?:scripts|tests|inference)/[\w/]+\.(?:py|sh))\b")
    named = [(page.name, file) for page in PAGES for file in shown.findall(page.read_text("utf-8"))]
    gone = {
        ("architecture.md", f"inference/{name}.py") for name in ("model", "trace")
    }  # it says where they went
    assert len(named) > 20
    assert {one for one in named if not (ROOT / one[1]).exists()} == gone


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
