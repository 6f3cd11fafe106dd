"""`dsatrace download`: a data set from the hub to plain files in `data/<name>/`.

dsatrace download longbenchv2 --limit 20
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsatrace.commands.parser import CommandParser
from dsatrace.errors import exits_cleanly

if TYPE_CHECKING:
    from dsatrace.workloads.data_set import DataSet


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Downloads, checks and exports; returns the exit code."""
    from dsatrace.commands.progress import bytes_bar
    from dsatrace.workloads.catalog import DATA_SETS
    from dsatrace.workloads.exports import SOURCE_FILE, export_data_set
    from dsatrace.workloads.hub import ANSWER_S, default_data_folder, fetch, kept_copy, locate

    args = _parser(DATA_SETS).parse_args(argv)
    data_set = DATA_SETS[args.name]
    limit = data_set.download_limit if args.limit is None else args.limit
    file = data_set.hub_file(file=args.file, revision=args.revision)
    downloads = default_data_folder() / ".hub"
    print(f"{args.name}: terms: {data_set.licence}")
    located = None if kept_copy(file, downloads) else locate(file, ANSWER_S, data_set.remedy())
    if located and located.num_bytes is not None:
        print(f"{args.name}: {file.repo}@{located.commit} {file.file}, {located.num_bytes / 1e6:,.1f} MB")
    fetched = fetch(file, downloads, data_set.remedy(), located=located, progress=bytes_bar)
    if not file.sha256:
        print(f"{args.name}: its sha256 was not known beforehand; it is recorded in {SOURCE_FILE}")
    out: Path = args.out or default_data_folder() / args.name
    export = export_data_set(data_set, fetched, out, limit, progress=bytes_bar)
    print(f"{out / export.name}: {export.num_rows:,} rows of {export.text()}")
    print(f"{fetched.path}: kept, so that another export needs no download")
    if data_set.variable:
        print(f"export {data_set.variable}={shlex.quote(str((out / export.name).absolute()))}")
    return 0


def _parser(data_sets: Mapping[str, DataSet]) -> argparse.ArgumentParser:
    limited = [data_set for data_set in data_sets.values() if data_set.download_limit]
    limits = "".join(f"; of {data_set.name} {data_set.download_limit}" for data_set in limited)
    parser = CommandParser(
        "download",
        "Fetch a data set from the hub, check it, and export it to data/NAME/. "
        "Interrupted, it continues. HF_TOKEN or a cached login is used where it is needed.",
        examples="""
        %(prog)s longbenchv2 --limit 20
        %(prog)s burstgpt --limit 2000 --out data/burstgpt
        """,
    )
    parser.add_argument("name", choices=tuple(data_sets), help="the data set")
    parser.add_argument(
        "--limit",
        type=int,
        help=f"rows to export, of ruler from each file (default: all{limits})",
    )
    parser.add_argument(
        "--revision", help="branch, tag or commit, whose bytes are not checked (default: pinned)"
    )
    parser.add_argument("--file", help="another file of the repository; its bytes are not checked")
    parser.add_argument("--out", type=Path, help="folder of the export (default: data/NAME)")
    return parser
