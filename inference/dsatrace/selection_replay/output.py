"""A replay's folder: `replay.json` with all figures and the sums they follow from, `replay.csv` with a table.

write_result(record, result, Path("outputs/mine_replay"))
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from dsatrace.files import write_atomically
from dsatrace.selection_replay.result import Result
from dsatrace.version import __version__

COLUMNS = (
    "layer", "policy", "size", "ids", "miss_rate", "interval_low", "interval_high", "step_miss_rate",
    "misses_per_step", "misses_p50", "misses_p95", "misses_p99", "evictions_per_step", "reads_per_token",
    "bytes_per_token", "uniform_miss_rate", "recency_miss_rate", "shuffled_miss_rate",
)  # fmt: skip


def write_result(record: dict[str, Any], result: Result, folder: Path) -> None:
    """Writes both files; `record` holds the figures of `result`."""
    whole = {"tool": "dsatrace", "tool_version": __version__, **record, "sums": result.to_json()}
    write_atomically(
        folder / "replay.json", json.dumps(whole, separators=(",", ":"), allow_nan=False).encode()
    )
    write_atomically(folder / "replay.csv", _table(record).encode())


def _table(record: dict[str, Any]) -> str:
    """A row per layer, policy and size; `all` is all layers together."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    groups = [("all", record["overall"]), *((layer["name"], layer) for layer in record["layers"])]
    for layer, group in groups:
        for policy, sizes in group.get("policies", {}).items():
            for size, cell in sizes.items():
                writer.writerow({"layer": layer, "policy": policy, "size": size, **_row(cell)})
    return text.getvalue()


def _row(cell: dict[str, Any]) -> dict[str, Any]:
    """Empty where a figure is missing."""
    low, high = cell.get("interval") or (None, None)
    missed, nulls = cell.get("misses_per_step", {}), cell.get("nulls", {})
    same = ("ids", "miss_rate", "step_miss_rate", "evictions_per_step", "reads_per_token", "bytes_per_token")
    return {
        **{name: cell.get(name) for name in same},
        "interval_low": low,
        "interval_high": high,
        "misses_per_step": missed.get("mean"),
        **{f"misses_{name}": missed.get(name) for name in ("p50", "p95", "p99")},
        **{f"{name}_miss_rate": nulls.get(name) for name in ("uniform", "recency", "shuffled")},
    }
