"""`dsatrace summarize`: recomputes a run's summary from its files, or one summary of several runs.

dsatrace summarize outputs/a outputs/b --out both.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.damage import damage_named
from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain, plain_lines
from dsatrace.trace.url import run_path


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the summary without its histograms, or writes the whole of it to a file."""
    parser = CommandParser(
        "summarize",
        "Recompute summary.json from runs' records; several runs are merged into one.",
        examples="""
        %(prog)s outputs/killed
        %(prog)s outputs/a outputs/b --out both.json
        """,
    )
    parser.add_argument("run", type=run_path, nargs="+", help="folder of a run; works on killed runs too")
    parser.add_argument("--out", type=Path, help="file for the whole summary, histograms included")
    args = parser.parse_args(argv)

    from dsatrace.commands.progress import records_counter
    from dsatrace.files import write_json
    from dsatrace.trace.summarize import summarize_runs

    def note(text: str) -> None:
        print(f"note: {plain(text)}", file=sys.stderr)

    with records_counter("summarize") as advance, damage_named(*args.run):
        record = summarize_runs(args.run, advance, note)
    if args.out is None:
        shown = {name: value for name, value in record.items() if name != "histograms"}
        print(plain_lines(json.dumps(shown, indent=1, ensure_ascii=False)))
        return 0
    try:
        write_json(args.out, record)
    except OSError as error:
        remedy = "name another --out"
        raise UserError(f"{args.out}: cannot write the summary: {error.strerror}; {remedy}") from error
    print(f"{plain(args.out)}: {record['counts']['records']} records of {len(args.run)} runs")
    return 0
