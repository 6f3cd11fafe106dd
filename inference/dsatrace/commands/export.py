"""`dsatrace export`: a run's records as Parquet for DuckDB, Polars and long storage, or laid out for
replay, or back as JSON lines; its selections as arrays, or a timeline of it.

dsatrace export outputs/mine --to parquet
dsatrace export outputs/mine --to perfetto
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsatrace.commands.damage import damage_named
from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import counted, plain
from dsatrace.units import size_text

if TYPE_CHECKING:
    from dsatrace.trace.reader import RunReader

_SUFFIXES = {
    "parquet": "parquet",
    "jsonl": "jsonl",
    "replay": "for_replay",
    "npy": "npy",
    "perfetto": "trace.json.gz",
}
"""Format to the end of the copy's name; what `dsatrace replay` writes is RUN_replay."""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Exports, showing progress; returns the exit code."""
    parser = CommandParser(
        "export",
        "Copy a run with its records in another format, without loss, or draw a timeline of it.",
        examples="""
        %(prog)s outputs/mine --to parquet
        %(prog)s outputs/mine_parquet --to jsonl --out outputs/mine_again
        %(prog)s outputs/mine --to perfetto
        """,
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--to",
        choices=tuple(_SUFFIXES),
        required=True,
        help="format of the copy; replay: Parquet files of whole requests, by layer, then step; npy: the "
        "selections alone, an array (rows, layers, k) int32 per request; perfetto: a timeline, one file for "
        "ui.perfetto.dev or chrome://tracing",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="new folder of the copy, or new file of the timeline (default: RUN_parquet, RUN_jsonl, "
        "RUN_for_replay, RUN_npy or RUN_trace.json.gz)",
    )
    parser.add_argument(
        "--buffer",
        metavar="SIZE",
        help="of perfetto, for a run without tiers: draw what an LRU buffer of this size, one per request "
        "and layer, would miss; ids, multiples of top-k or shares of the context (default: 2k)",
    )
    args = parser.parse_args(argv)
    if args.buffer is not None and args.to != "perfetto":
        raise UserError(f"--buffer {args.buffer}: belongs to --to perfetto; leave it out")

    from rich.console import Console
    from rich.progress import Progress

    from dsatrace.trace.export import export_run
    from dsatrace.trace.reader import RunReader

    run = RunReader(args.run)
    folder = args.run.absolute()
    out = args.out or folder.with_name(f"{folder.name}_{_SUFFIXES[args.to]}")
    if args.to == "npy":
        return _export_arrays(run, out)
    if args.to == "perfetto":
        return _export_timeline(run, out, args.buffer)
    console = Console(stderr=True)
    shown = Progress(console=console, transient=True, disable=not console.is_terminal)
    with damage_named(args.run), shown as bar:
        task = bar.add_task(f"exporting to {args.to}", total=None)
        done = export_run(run, args.to, out, lambda n, total: bar.update(task, completed=n, total=total))
    for name, torn in done.left_out.items():
        print(f"left out: {plain(run.folder / name)}: {plain(torn)}")
    if done.num_kept_as_text:
        print(f"kept as text, since their columns would not give them back: {done.num_kept_as_text}")
    before, after = size_text(done.bytes_before), size_text(done.bytes_after)
    print(f"{counted(done.num_records, 'record')}, {before} -> {after}: {plain(out)}")
    return 0


def _export_arrays(run: RunReader, out: Path) -> int:
    from dsatrace.captures.run_arrays import export_arrays
    from dsatrace.commands.progress import records_counter

    with damage_named(run.folder), records_counter("exporting to npy") as advance:
        written = export_arrays(run, out, advance)
    rows, requests = counted(written.num_rows, "row"), counted(written.num_requests, "request")
    print(f"{rows} of {requests}, {size_text(written.num_bytes)}: {plain(out)}")
    return 0


def _export_timeline(run: RunReader, out: Path, size: str | None) -> int:
    from dsatrace.commands.progress import records_counter
    from dsatrace.selection_replay.per_step import buffers_of
    from dsatrace.trace.load import Run
    from dsatrace.trace.perfetto import write_perfetto
    from dsatrace.trace.timeline import Timeline

    if run.state == "running":
        raise UserError(
            f"{run.folder}: the run is still being written; export it when it has ended, or a copy of it"
        )
    if out.exists():  # told before the run is read
        raise UserError(f"{out}: exists already and is never overwritten; name another with --out")
    buffers, without = None, None
    if run.manifest.get("tiers"):
        if size is not None:
            raise UserError(f"--buffer {size}: the run has tiers, whose misses were measured; leave it out")
    else:
        try:
            buffers = buffers_of(run, size or "2k")
        except UserError as error:
            if size is not None:
                raise
            without = f"no misses are drawn: {error}"
    with damage_named(run.folder), records_counter("reading") as advance:
        written = write_perfetto(Timeline(Run(run.folder), buffers, advance), out)
    for note in filter(None, (without, *written.notes)):
        print(plain(note))
    print(f"{written.num_events:,} events, {size_text(written.num_bytes)}: {plain(out)}")
    return 0
