"""`dsatrace verify`: re-derives a run's records with a second implementation, and names a wrong one.

dsatrace verify outputs/generate_20260101_120000
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.parser import CommandParser, count
from dsatrace.commands.progress import bytes_bar
from dsatrace.errors import exits_cleanly
from dsatrace.schema import STEPS_FILE
from dsatrace.text import plain, plain_lines
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything is right, 1 after naming what is not on stderr, 2 for no run."""
    parser = CommandParser(
        "verify",
        "Re-derive every record of a run from its positions, with a second implementation, and compare its "
        "files with the digests in its manifest (integrity, not origin).",
        examples="""
        %(prog)s outputs/generate_20260101_120000
        %(prog)s outputs/mine && echo sound
        """,
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--jobs", type=count, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse_args(argv)
    return verify_run(args.run, args.jobs)


def verify_run(folder: Path, jobs: int = 1) -> int:
    """Verifies with progress, prints the outcome and returns the exit code."""
    try:
        with bytes_bar("verify", folder / STEPS_FILE) as advance:
            verified = verify(folder, advance, jobs)
        print(plain_lines(verified.text()))
    except Mismatch as mismatch:
        print(f"bad: {plain(folder)}: {plain(mismatch)}", file=sys.stderr)
        return 1
    for fault in verified.faults:
        print(f"bad: {plain(folder)}: {plain(fault)}", file=sys.stderr)
    return int(bool(verified.faults))
