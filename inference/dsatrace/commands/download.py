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
from dsatrace.text import plain
from dsatrace.workloads.catalog import DATA_SETS


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Downloads, checks and exports; returns the exit code."""
    from dsatrace.commands.progress import bytes_bar
    from dsatrace.workloads.exports import SOURCE_FILE, export_data_set
    from dsatrace.workloads.hub import default_data_folder, download, locate

    args = _parser().parse_args(argv)
    data_set = DATA_SETS[args.name]
    limit = data_set.download_limit if args.limit is None else args.limit
    print(f"{args.name}: terms: {data_set.licence}")
    file = data_set.hub_file(file=args.file, revision=args.revision)
    out: Path = args.out or default_data_folder() / args.name
    remedy = f"run this on a machine that reaches the hub, and copy {out} from there"
    located = locate(file, default_data_folder() / ".hub", remedy)
    if located.url is not None:
        print(f"{args.name}: {plain(located.text())}")
    fetched = download(located, remedy, bytes_bar)
    if not file.sha256:
        print(f"{args.name}: its sha256 was not known beforehand; it is recorded in {SOURCE_FILE}")
    export = export_data_set(data_set, fetched, out, limit, bytes_bar)
    print(plain(f"{out / export.name}: {export.num_rows:,} rows of {export.text()}"))
    print(plain(f"{fetched.path}: kept, so that another export needs no download"))
    if data_set.variable:
        print(f"export {data_set.variable}={shlex.quote(str((out / export.name).absolute()))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    limited = (data_set for data_set in DATA_SETS.values() if data_set.download_limit)
    limits = "".join(f"; of {data_set.name} {data_set.download_limit}" for data_set in limited)
    parser = CommandParser(
        "download",
        "Fetch a data set from the hub, check it, and export it to data/NAME/. "
        "An interrupted download continues. `hf auth login` or HF_TOKEN is used where it is needed.",
        examples="""
        %(prog)s longbenchv2 --limit 20
        %(prog)s burstgpt --limit 2000 --out data/burstgpt
        """,
    )
    add = parser.add_argument
    add("name", choices=tuple(DATA_SETS), help="the data set")
    add("--limit", type=int, help=f"rows to export in all (default: all{limits})")
    add("--revision", help="branch, tag or commit, whose bytes are not checked (default: pinned)")
    add("--file", help="another file of the repository; its bytes are not checked")
    add("--out", type=Path, help="folder of the export (default: data/NAME)")
    return parser
