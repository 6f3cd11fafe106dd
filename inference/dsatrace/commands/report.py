"""`dsatrace report`: what a traced run or a study found, as tables; of a run also a picture in its folder.

dsatrace report outputs/generate_20260101_120000
"""

from __future__ import annotations

import contextlib
import json
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
        %(prog)s outputs/mine --json
        """,
    )
    parser.add_argument("run", type=Path, help="folder of the run, or of a study")
    parser.add_argument("--layer", type=int, default=None, help="layer of the heat map (default: the last)")
    parser.add_argument("--no-figure", action="store_true", help="tables only")
    parser.add_argument(
        "--json", action="store_true", help="the tables as JSON, numbers for texts; draws no picture"
    )
    args = parser.parse_args(argv)

    from dsatrace.report.figure import draw
    from dsatrace.report.grid import WIDE, WIDTH, show
    from dsatrace.report.parts import parts_json, report_parts
    from dsatrace.report.study_folder import is_study
    from dsatrace.trace.reader import RunReader

    a_study = is_study(args.run)
    with damage_named(args.run) if not a_study else contextlib.nullcontext():
        parts = report_parts(args.run)
        if args.json:
            print(json.dumps(parts_json(parts), indent=1, allow_nan=False))
            return 0
        show(parts, WIDE if a_study else WIDTH)
        if not (a_study or args.no_figure) and (picture := draw(RunReader(args.run), args.layer)):
            show([f"picture: {picture}"])
    return 0
