"""The parser behind every command: its name, its help with defaults and examples, its one error line.

Standard library only.

    parser = CommandParser("report", "Show what a traced run found.", examples="%(prog)s outputs/mine")
    parser.add_argument("--layer", type=int, default=3, help="layer of the heat map")   # ... (default: 3)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from dsatrace.errors import leave_to_rank_0, tell_torchrun
from dsatrace.text import plain

_EXAMPLES = "examples:\n"


class CommandParser(argparse.ArgumentParser):
    """Its name is `dsatrace VERB` or, where the command runs as a script, the script's."""

    def __init__(
        self, verb: str, description: str, *, examples: str, script: str = "", allow_abbrev: bool = True
    ) -> None:
        """`examples` are command lines, one a line; `%(prog)s` stands for the program's name."""
        runs_as_script = script == Path(sys.argv[0]).name
        super().__init__(
            prog=script if runs_as_script else f"dsatrace {verb}",
            description=description,
            epilog=_EXAMPLES + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines()),
            formatter_class=HelpFormatter,
            allow_abbrev=allow_abbrev,
        )

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """A flag's list takes blanks, commas, or both; the name of a file keeps its commas."""
        if action.nargs == "+" and action.option_strings and action.metavar != "FILE":
            parts = (part.strip() for text in arg_strings for part in text.split(","))
            arg_strings = [part for part in parts if part] or arg_strings
        return super()._get_values(action, arg_strings)

    def format_help(self) -> str:
        """The usage line names what must be given; the optional flags are explained below it."""
        groups = [group for group in self._mutually_exclusive_groups if group.required]
        chosen = [action for group in groups for action in group._group_actions]
        in_prog = self.prog.lower().split()  # `dsatrace run DATASET` has its --dataset already
        needed = [
            action
            for action in self._actions
            if action in chosen or (action.required and action.dest not in in_prog)
        ]
        formatter = self._get_formatter()
        formatter.add_usage(None, needed, groups, prefix="")
        self.usage = f"{formatter.format_help().strip()} [flags]".replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        leave_to_rank_0()
        line = f"error: {plain(message)}; see {self.prog} --help"
        tell_torchrun(line)
        self.exit(2, f"{line}\n")


def count(text: str) -> int:
    """The `type` of a flag that counts something: 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: use at least 1")
    return number


def shard(text: str) -> tuple[int, int]:
    """The `type` of a flag that names one of N parts of the work: I/N."""
    index, _, of = text.partition("/")
    if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
        raise argparse.ArgumentTypeError(f"{text}: use I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(of)


class HelpFormatter(argparse.HelpFormatter):
    """Adds `(default: X)` to every flag that has one, and keeps the lines of the examples.

    A flag whose default is computed (`None` here) describes it in its help, in the same form.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_off = action.default is None or action.default is False  # 0 is a value
        is_empty = action.default in (argparse.SUPPRESS, "", [], ())
        if not action.option_strings or is_off or is_empty or "default:" in text:
            return text
        shown = "%(default)s"
        if isinstance(action.default, list | tuple):
            shown = " ".join(map(str, action.default))
        return f"{text} (default: {shown})".lstrip()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)
