"""`dsatrace report`: what a traced run found, as tables, and as a picture in its folder.

dsatrace report outputs/generate_20260101_120000
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.damage import damage_named
from dsatrace.commands.parser import CommandParser
from dsatrace.errors import exits_cleanly


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and draws the picture; returns the exit code."""
    parser = CommandParser(
        "report",
        "Show what a traced run found.",
        examples="""
        %(prog)s outputs/generate_20260101_120000
        %(prog)s outputs/mine --layer 2
        """,
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--layer", type=int, default=None, help="layer of the heat map (default: the last)")
    parser.add_argument("--no-figure", action="store_true", help="tables only")
    args = parser.parse_args(argv)

    from rich.console import Console

    from dsatrace.report.figure import draw
    from dsatrace.report.tables import run_tables
    from dsatrace.trace.reader import RunReader

    run = RunReader(args.run)
    console = Console(width=100)
    with damage_named(args.run):
        for part in run_tables(run):
            console.print(part)
        if not args.no_figure and (picture := draw(run, args.layer)):
            console.print(f"picture: {picture}", soft_wrap=True)
    return 0
