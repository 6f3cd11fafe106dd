"""Writes docs/cli.md, every command and flag, from the parsers themselves.

Knows no flag: it asks each command for its help, and takes the parser that would have printed it.

    python3 scripts/cli_reference.py            # print the page
    python3 scripts/cli_reference.py --write    # write docs/cli.md anew
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from dsatrace.cli import VERBS
from dsatrace.commands.parser import CommandParser
from dsatrace.commands.study import VERBS as STUDIES
from dsatrace.workloads.catalog import DATA_SETS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """# Commands and flags

<!-- Written by scripts/cli_reference.py --write, from the parsers. -->

`dsatrace VERB --help` says the same on the terminal. A mistake ends in one line that names the flag, and exit
code 2; exit code 1 says that a check or some request failed, 130 that Ctrl-C ended the command. The scripts
under `inference/` are verbs: `generate.py`, `convert.py`, `run_dataset.py` (`run`), `run_burstgpt.py`
(`run burstgpt`).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name} anew")
    if not parser.parse_args().write:
        print(document(), end="")
        return 0
    PAGE.write_text(document(), encoding="utf-8")
    print(PAGE)
    return 0


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Name, module and leading arguments of every command that has flags of its own."""
    for name, verb in VERBS.items():
        if name == "study":
            yield from ((f"study {one}", of.module, list(of.flags)) for one, of in STUDIES.items())
        elif name == "run":
            yield from ((f"run {one}", verb.module, [one]) for one in DATA_SETS)
        else:
            yield name, verb.module, list(verb.flags)
            if name == "replay":
                yield "replay merge", verb.module, ["merge"]


def document() -> str:
    """docs/cli.md; a default inside the checkout is named from its root."""
    sections = "".join(_section(name, parser_of(module, flags)) for name, module, flags in commands())
    return HEAD + sections.replace(f"{PAGE.parents[1]}/", "")


def parser_of(module: str, flags: list[str]) -> argparse.ArgumentParser:
    """The parser of a command."""
    asked: list[argparse.ArgumentParser] = []

    def ask(parser: CommandParser) -> str:
        asked.append(parser)
        return ""

    with mock.patch.object(CommandParser, "format_help", ask), contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*flags, "--help"])
    return asked[0]


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    lines = ["", f"## dsatrace {name}", "", _text(parser.description or ""), ""]
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        actions = [action for action in actions if not isinstance(action, argparse._HelpAction)]
        if not actions:
            continue
        title = "flags" if group.title in ("options", "optional arguments") else group.title
        lines += [f"| {_text(title or 'flags')} | |", "|---|---|"]
        lines += [f"| {_flag(action)} | {_text(formatter._expand_help(action))} |" for action in actions]
        lines.append("")
    examples = (parser.epilog or "").replace("%(prog)s", f"dsatrace {name}").splitlines()[1:]
    return "\n".join([*lines, "```", *(line.strip() for line in examples), "```", ""])


def _flag(action: argparse.Action) -> str:
    metavar = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
    if action.choices is not None and not action.metavar:
        metavar = "{" + ",".join(map(str, action.choices)) + "}"
    value = " ".join(metavar) if isinstance(metavar, tuple) else str(metavar)
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    return f"`{', '.join(action.option_strings)}{' ' if value else ''}{value}`".replace("|", "\\|")


def _text(text: str) -> str:
    """Help as a table's cell: `*`, `<` and `|` mean themselves; flags and formats in code."""
    text = re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return re.sub(r"(?<![\w`-])(--[a-z][\w-]*)", r"`\1`", text)


if __name__ == "__main__":
    sys.exit(main())
