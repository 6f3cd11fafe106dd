"""`dsatrace import`: selections that an engine or a script captured, as a run of dsatrace's.

dsatrace import responses.jsonl --format sglang --layers 61 --top-k 2048 --out outputs/mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.flags import add_flags, values_of
from dsatrace.text import counted, plain

if TYPE_CHECKING:
    from dsatrace.captures.examine import Examined


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Imports, showing progress; returns the exit code."""
    from dsatrace.captures.import_run import IMPORT_FLAGS, ImportSettings, write_run
    from dsatrace.commands.progress import amount_bar

    argv = sys.argv[1:] if argv is None else list(argv)
    parser = CommandParser(
        "import",
        "Make a run of selections that an engine or a script captured. Every row is checked first: "
        "what the ids are, and whether sparse attention was active.",
        examples="""
        %(prog)s responses.jsonl --format sglang --layers 61 --top-k 2048 --out outputs/mine
        %(prog)s ids.npy --format npy --prompt-tokens 4000 --out outputs/mine
        %(prog)s ids.npz --format npy --describe capture.json --out outputs/mine
        """,
    )
    add_capture_arguments(parser, required=True)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="folder of the run, new or empty"
    )
    add_flags(parser.add_argument_group("the run").add_argument, ImportSettings, IMPORT_FLAGS)
    args = parser.parse_args(argv)
    settings = ImportSettings(**values_of(args, IMPORT_FLAGS))
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out}: exists already and is never overwritten; name another")
    examined = examine_files(args)
    for line in examined.findings():
        print(plain(line))
    with amount_bar("write", sum(one.num_bytes for one in examined.captures)) as advance:
        imported = write_run(examined, args.out, settings, advance, argv)
    if imported.prompt_rows == "off":
        print("the prompt's rows are not recorded")
    steps, requests = counted(imported.num_rows, "step"), counted(imported.num_requests, "request")
    print(f"{steps} of {requests}: {plain(imported.folder)}")
    return 0


def add_capture_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """The flags that say what a capture is; `check` takes runs too, which need none."""
    from dsatrace.captures.description import FLAGS, Description
    from dsatrace.captures.formats import FORMATS

    nargs_help = "what was captured" if required else "what was captured, or folders of runs"
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=nargs_help)
    known = "; ".join(f"{name}: {one.meaning}" for name, one in FORMATS.items())
    parser.add_argument("--format", choices=tuple(FORMATS), required=required, help=f"of the files. {known}")
    group = parser.add_argument_group("what the capture does not say of itself")
    group.add_argument(
        "--describe",
        type=Path,
        metavar="FILE",
        help="JSON file with these flags' values, see docs/import.md",
    )
    add_flags(group.add_argument, Description, FLAGS)


def examine_files(args: argparse.Namespace) -> Examined:
    """Looks through the files that the flags name, showing progress."""
    from dsatrace.captures.description import Description
    from dsatrace.captures.examine import examine, open_captures
    from dsatrace.captures.formats import FORMATS
    from dsatrace.commands.progress import amount_bar

    described = Description.of(args, args.describe)
    is_text = FORMATS[args.format].is_text
    size = sum(path.stat().st_size for path in args.files if path.is_file()) if is_text else 0
    with amount_bar("look through", size) as advance:
        advance(0)
        captures = open_captures(args.files, args.format, described, advance)
    with amount_bar("check", sum(one.num_bytes for one in captures)) as advance:
        return examine(args.files, args.format, described, captures, advance)
