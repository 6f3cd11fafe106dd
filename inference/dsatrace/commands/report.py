"""`dsatrace report`: what a traced run or a study found, as tables; of a run also a picture in its folder.

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
        "Show what a traced run or a study found.",
        examples="""
        %(prog)s outputs/generate_20260101_120000
        %(prog)s outputs/mine --layer 2
        """,
    )
    parser.add_argument("run", type=Path, help="folder of the run, or of a study")
    parser.add_argument("--layer", type=int, default=None, help="layer of the heat map (default: the last)")
    parser.add_argument("--no-figure", action="store_true", help="tables only")
    args = parser.parse_args(argv)

    from dsatrace.report.figure import draw
    from dsatrace.report.grid import WIDE, show
    from dsatrace.report.study_folder import is_study, study_parts
    from dsatrace.report.tables import run_tables
    from dsatrace.trace.reader import RunReader

    if is_study(args.run):
        show(study_parts(args.run), WIDE)
        return 0
    run = RunReader(args.run)
    with damage_named(args.run):
        show(run_tables(run))
        if not args.no_figure and (picture := draw(run, args.layer)):
            show([f"picture: {picture}"])
    return 0
