"""`dsatrace diff`: whether two runs of the same tokens selected the same, and where they first did not.

dsatrace diff outputs/fp32 outputs/bf16 --max-differing 1%
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.damage import damage_named
from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain
from dsatrace.trace.url import run_path

FILES = ("diff.json", "diff.png")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints and writes what was found; returns 1 if more differs than is allowed."""
    parser = CommandParser(
        "diff",
        "Compare what two runs of the same tokens selected, row by row.",
        examples="""
        %(prog)s outputs/mine outputs/theirs
        %(prog)s outputs/fp32 outputs/bf16 --max-differing 20
        """,
    )
    add = parser.add_argument
    add("a", type=run_path, metavar="A", help="folder of a run, or its URL")
    add("b", type=run_path, metavar="B", help="folder of the other, or its URL")
    add("--max-differing", default="0", metavar="N", help="rows that may differ, or a share of them: 12, 1%%")
    add(
        "--tie",
        type=float,
        metavar="SHARE",
        help="scores this close, as a share of the row's largest, are equal (default: the coarser model's "
        "rounding)",
    )
    add("--out", type=Path, metavar="DIR", help="folder of diff.json and diff.png (default: A_diff)")
    add("--no-figure", action="store_true", help="no picture")
    args = parser.parse_args(argv)
    limit, is_share = _limit(args.max_differing)
    if args.tie is not None and not 0 <= args.tie < 1:
        raise UserError(f"--tie {args.tie}: use a share from 0 to below 1")
    if args.out is None and not isinstance(args.a, Path):
        raise UserError("--out DIR is missing: name the folder of the result, since A is a URL")
    out = args.out or args.a.absolute().with_name(f"{args.a.absolute().name}_diff")
    _require_free(out)

    from dsatrace.captures.diff import diff
    from dsatrace.files import write_atomically
    from dsatrace.report.diff import diff_parts, draw_diff
    from dsatrace.report.grid import WIDE, show
    from dsatrace.trace.load import load

    with damage_named(args.a, args.b):
        found = diff(load(args.a), load(args.b), args.tie)
    record = found.to_json()
    show(diff_parts(record), WIDE)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot make it: {error.strerror}; name another with --out") from error
    write_atomically(out / FILES[0], json.dumps(record, allow_nan=False).encode())
    if not args.no_figure:
        draw_diff(record, out / FILES[1])
    print(f"written: {plain(out)}")
    return int(found.num_differing > (limit * found.num_rows if is_share else limit))


def _limit(text: str) -> tuple[float, bool]:
    """A number of rows, or a share of them."""
    if re.fullmatch(r"\d+", text):
        return int(text), False
    if re.fullmatch(r"\d+(\.\d+)?%", text) and float(text[:-1]) <= 100:
        return float(text[:-1]) / 100, True
    raise UserError(f"--max-differing {text}: use a number of rows, such as 12, or a share, such as 1%")


def _require_free(out: Path) -> None:
    """Refuses a folder that holds anything but a comparison."""
    if out.is_dir():
        foreign = sorted(path.name for path in out.iterdir() if path.name not in FILES)
        if foreign:
            raise UserError(f"{out}: holds {foreign[0]}, so it is no diff's folder; name another with --out")
    elif out.exists():
        raise UserError(f"{out}: is no folder; name another with --out")
