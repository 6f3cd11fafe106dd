"""`dsatrace summarize`: recomputes a run's summary from its files, or one summary of several runs.

dsatrace summarize outputs/a outputs/b --out both.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsatrace.commands.damage import damage_named
from dsatrace.commands.parser import CommandParser, count, shard
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import counted, plain, plain_lines
from dsatrace.trace.url import run_path


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the summary without its histograms, or writes the whole of it to a file."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return _merge(argv[1:]) if argv[:1] == ["merge"] else _summarize(argv)


def _summarize(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "summarize",
        "Recompute summary.json from runs' records; several runs are merged into one.",
        examples="""
        %(prog)s outputs/killed
        %(prog)s s3://bucket/a s3://bucket/b --shard 0/2 --out 0.json
        %(prog)s merge 0.json 1.json --out both.json
        """,
    )
    add = parser.add_argument
    add("run", type=run_path, nargs="+", help="folder of a run, or its URL; works on killed runs too")
    add("--out", type=Path, help="file for the whole summary, histograms included")
    add("--jobs", type=count, default=1, metavar="N", help="processes; each takes a run at a time")
    add(
        "--shard",
        type=shard,
        metavar="I/N",
        help="only the I-th of N shares of the runs; --out then takes sums, for `summarize merge`",
    )
    args = parser.parse_args(argv)
    if args.shard and args.out is None:
        raise UserError("--shard without --out: name a file for the shard's sums")

    from dsatrace.commands.progress import records_counter
    from dsatrace.trace.summarize import distinct_names, sum_runs
    from dsatrace.trace.summed_runs import Shard, write_shard

    def note(text: str) -> None:
        print(f"note: {plain(text)}", file=sys.stderr)

    names = distinct_names(args.run)
    index, of = args.shard or (0, 1)
    part = Shard(index, of, names)
    runs = part.of(args.run)
    if not runs:
        raise UserError(
            f"--shard {part.index}/{part.count}: has none of {counted(len(names), 'run')}; use a smaller N"
        )
    with records_counter("summarize") as advance, damage_named(*runs):
        summed = sum_runs(runs, part.of(names), advance, note, args.jobs)
    if args.shard is None:
        return _tell(summed.to_json(), len(runs), args.out)
    with _writing(args.out):
        write_shard(args.out, summed, part)
    added = f"{summed.summary.counts['records']} records of {counted(len(runs), 'run')}"
    print(f"{plain(args.out)}: {added}, to be merged")
    return 0


def _merge(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "summarize merge",
        "Add the sums of all shards of `dsatrace summarize --shard`.",
        examples="%(prog)s 0.json 1.json --out both.json",
    )
    parser.add_argument("shards", nargs="+", type=Path, metavar="SHARD", help="file of a shard's sums")
    parser.add_argument("--out", type=Path, help="file for the whole summary, histograms included")
    args = parser.parse_args(argv)

    from dsatrace.trace.summed_runs import merge_shards

    return _tell(*merge_shards(args.shards), args.out)


def _tell(record: Mapping[str, Any], num_runs: int, out: Path | None) -> int:
    from dsatrace.files import write_json

    if out is None:
        shown = {name: value for name, value in record.items() if name != "histograms"}
        print(plain_lines(json.dumps(shown, indent=1, ensure_ascii=False)))
        return 0
    with _writing(out):
        write_json(out, record)
    print(f"{plain(out)}: {record['counts']['records']} records of {counted(num_runs, 'run')}")
    return 0


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "name another --out"
        raise UserError(f"{out}: cannot write the summary: {error.strerror}; {remedy}") from error


if __name__ == "__main__":
    sys.exit(main())
