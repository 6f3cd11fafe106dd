"""`dsatrace calibrate`: fit the times of this machine's stores, for `sim:FILE.json#NAME+ram`.

dsatrace calibrate ram mmap:/mnt/nvme/kv file:/mnt/nvme/kv unix:///run/valkey.sock --out calibration.json
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain

if TYPE_CHECKING:
    from rich.table import Table

    from dsatrace.kv.stores.simulated import Preset


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes the file if `--out` is given; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: use at least 1")
    if args.out is not None and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: no folder {args.out.parent}; make it first")

    from rich.console import Console

    from dsatrace.kv.stores.calibration import calibrate

    where = f"{platform.machine()} {platform.system()}"
    source = f"dsatrace calibrate, {datetime.date.today().isoformat()}, {where}"
    named = zip(args.stores, _names(args.stores), strict=True)
    fitted = [calibrate(spec, name, source, args.repeats) for spec, name in named]
    console = Console(width=110)
    console.print(_table(fitted))
    console.print(
        "A batch takes alpha_batch + operations x alpha_op + bytes / bandwidth. Medians; memory is warm, and "
        "a mapped file lies in the page cache. Measured through dsatrace's own layer."
    )
    if args.out is not None:
        presets = [dataclasses.asdict(preset) for preset, _ in fitted]
        args.out.write_text(json.dumps(presets, indent=1) + "\n", encoding="utf-8")
        print(plain(f"{args.out}: use it as sim:{args.out}#{fitted[0][0].name}+ram"))
    return 0


def _names(specs: Sequence[str]) -> list[str]:
    """The presets' names: the kind of store only, since the rest of a spec may hold a password."""
    kinds = [spec.partition(":")[0] for spec in specs]
    if "sim" in kinds:
        raise UserError(
            f"{specs[kinds.index('sim')]}: modelled times cannot be measured; name the store itself"
        )
    return [f"{kind}-{i}" if kind in kinds[:i] else kind for i, kind in enumerate(kinds)]


def _table(fitted: Sequence[tuple[Preset, float]]) -> Table:
    from rich.table import Table

    table = Table(title="Measured here", title_justify="left")
    table.add_column("store")
    for name in ("alpha_batch us", "alpha_op us", "read GB/s", "write GB/s", "median error"):
        table.add_column(name, justify="right")
    for preset, error in fitted:
        table.add_row(
            preset.name,
            f"{preset.alpha_batch_us.value:,.1f}",
            f"{preset.alpha_op_us.value:,.2f}",
            f"{preset.read_gb_per_s.value:,.1f}",
            f"{preset.write_gb_per_s.value:,.1f}",
            f"{error:.0%}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "calibrate",
        "Measure this machine's KV stores, and fit what a read from each of them costs.",
        examples="""
        %(prog)s ram
        %(prog)s ram mmap:/mnt/nvme/kv unix:///run/valkey.sock --out calibration.json
        """,
    )
    parser.add_argument("stores", nargs="+", metavar="STORE", help="ram, mmap:PATH, file:PATH, redis://...")
    parser.add_argument("--repeats", type=int, default=9, help="batches of each kind")
    parser.add_argument("--out", type=Path, help="write the presets to this file")
    return parser
