"""`dsatrace download`: a data set from the hub to plain files in `data/<name>/`.

dsatrace download longbenchv2 --limit 20
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.parser import CommandParser
from dsatrace.errors import exits_cleanly

BURSTGPT_LIMIT = 2000


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Downloads, checks and exports; returns the exit code."""
    from dsatrace.commands.progress import bytes_bar
    from dsatrace.workloads.catalog import DATA_SETS
    from dsatrace.workloads.downloads import fetch, kept_copy
    from dsatrace.workloads.exports import SOURCE_FILE, export_data_set
    from dsatrace.workloads.hub import ANSWER_S, locate
    from dsatrace.workloads.sources import default_data_folder

    args = _parser(list(DATA_SETS)).parse_args(argv)
    data_set = DATA_SETS[args.name]
    limit = BURSTGPT_LIMIT if args.limit is None and args.name == "burstgpt" else args.limit
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
    if args.name == "burstgpt":
        print(f"export BURSTGPT_CSV={shlex.quote(str((out / export.name).absolute()))}")
    return 0


def _parser(names: list[str]) -> argparse.ArgumentParser:
    parser = CommandParser(
        "download",
        "Fetch a data set from the hub, check it, and export it to data/NAME/. "
        "Interrupted, it continues. HF_TOKEN or a cached login is used where it is needed.",
        examples="""
        %(prog)s longbenchv2 --limit 20
        %(prog)s burstgpt --limit 2000 --out data/burstgpt
        """,
    )
    parser.add_argument("name", choices=names, help="the data set")
    parser.add_argument(
        "--limit",
        type=int,
        help=f"rows to export, of ruler from each file (default: all; of burstgpt {BURSTGPT_LIMIT})",
    )
    parser.add_argument("--revision", help="branch, tag or commit (pinned); its bytes are not checked")
    parser.add_argument("--file", help="another file of the repository; its bytes are not checked")
    parser.add_argument("--out", type=Path, help="folder of the export (default: data/NAME)")
    return parser
