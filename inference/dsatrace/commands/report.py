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
from dsatrace.commands.picture_flags import add_picture_flags, picture_flags_given, picture_settings
from dsatrace.errors import UserError, exits_cleanly


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and draws the picture; returns the exit code."""
    parser = CommandParser(
        "report",
        "Show what a traced run or a study found.",
        examples="""
        %(prog)s outputs/generate_20260101_120000
        %(prog)s outputs/mine --panel overlap --panel map --layer 2 --format pdf --style paper
        %(prog)s outputs/mine --json
        """,
    )
    parser.add_argument("run", type=Path, help="folder of the run, or of a study")
    parser.add_argument(
        "--layer",
        type=int,
        help="layer of the map (default: the one that selects most of the answer; without an answer the one "
        "with the least overlap with the step before)",
    )
    parser.add_argument(
        "--json", action="store_true", help="the tables as JSON, numbers for texts; draws no picture"
    )
    add_picture_flags(parser)
    args = parser.parse_args(argv)

    from dsatrace.report.figure import PANELS, draw
    from dsatrace.report.grid import WIDE, WIDTH, show
    from dsatrace.report.parts import parts_json, report_parts
    from dsatrace.report.study_folder import is_study
    from dsatrace.trace.reader import RunReader

    a_study = is_study(args.run)
    given = [*picture_flags_given(args), *(["--layer"] if args.layer is not None else [])]
    if a_study and given:
        raise UserError(
            f"{given[0]}: {args.run} is a study, which drew its pictures when it ran; leave it out"
        )
    settings = picture_settings(args, PANELS, none="--json" if args.json else "--no-figure")
    with damage_named(args.run) if not a_study else contextlib.nullcontext():
        parts = report_parts(args.run)
        if args.json:
            print(json.dumps(parts_json(parts), indent=1, allow_nan=False))
            return 0
        show(parts, WIDE if a_study else WIDTH)
        if settings and not a_study:
            show(draw(RunReader(args.run), args.layer, settings).lines())
    return 0
