"""`dsatrace check`: what the ids of a capture or a run are, and whether sparse attention was active.

dsatrace check outputs/mine
dsatrace check responses.jsonl --format sglang --layers 61 --top-k 2048
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsatrace.commands.import_capture import add_capture_arguments, examine_files
from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if each is what it claims, 1 after saying on stderr what is not, 2 for what is neither."""
    parser = CommandParser(
        "check",
        "Say what the ids of a capture or of a run are (positions, slots, offsets), whether sparse attention "
        "was active, how much steps and layers repeat, and how many ties there are.",
        examples="""
        %(prog)s outputs/mine
        %(prog)s responses.jsonl --format sglang --layers 61 --top-k 2048
        """,
    )
    add_capture_arguments(parser, required=False)
    args = parser.parse_args(argv)
    folders = [path for path in args.files if path.is_dir()]
    if folders and len(folders) < len(args.files):
        raise UserError(f"{folders[0]}: a folder among files; check runs and captures apart")
    if folders and args.format is not None:
        raise UserError(f"{folders[0]}: a folder; with --format name the files in it")
    if not folders:
        return _check_files(args)
    return max(_check_run(folder) for folder in folders)


def _check_files(args: argparse.Namespace) -> int:
    from dsatrace.captures.formats import FORMATS

    if args.format is None:
        raise UserError(f"--format is missing: say what {args.files[0]} is: {', '.join(FORMATS)}")
    examined = examine_files(args)
    return _told(args.files[0], examined.findings(), examined.problems())


def _check_run(folder: Path) -> int:
    from dsatrace.captures.check_run import check_run
    from dsatrace.commands.damage import damage_named
    from dsatrace.commands.progress import records_counter

    with damage_named(folder), records_counter("check") as advance:
        checked = check_run(folder, advance)
    return _told(folder, checked.findings, checked.problems)


def _told(path: Path, findings: Iterable[str], problems: Iterable[str]) -> int:
    """Prints both and returns the exit code."""
    for line in findings:
        print(f"{plain(path)}: {plain(line)}")
    code = 0
    for problem in problems:
        print(f"bad: {plain(path)}: {plain(problem)}", file=sys.stderr)
        code = 1
    return code
