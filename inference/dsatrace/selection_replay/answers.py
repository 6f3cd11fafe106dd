"""What to do about one size: its engines' settings, what it costs on a link, and what an engine measured.

add_answers(record, "2k", link="pcie5-x16", compute_us="50+1.5", hbm_gb=40, measured=None)
record["chosen"]["engines"]
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.kv.stores.simulated import load_preset
from dsatrace.selection_replay.cost import Cost, parse_compute
from dsatrace.selection_replay.engines import engine_settings, read_counters
from dsatrace.selection_replay.settings import usual_size


def add_answers(
    record: dict[str, Any],
    size: str | None,
    link: str | None,
    compute_us: str | None,
    hbm_gb: float | None,
    measured: Path | None,
) -> None:
    """Adds `chosen` to the figures of a replay. Raises `UserError` naming the flag that does not fit."""
    sizes = record["settings"]["sizes"]
    if size is not None and size not in sizes:
        raise UserError(f"--choose {size}: choose one of the replayed sizes, {', '.join(sizes)}")
    if (link is None) != (compute_us is None):
        missing, given = ("--compute-us", "--link") if compute_us is None else ("--link", "--compute-us")
        raise UserError(f"{given} without {missing}: a cost needs both; add {missing}")
    share = record["settings"]["share"]
    if link is not None and share != "none":
        raise UserError(f"--link with --share {share}: its buffers are per request and layer; leave one out")
    if hbm_gb is not None and not (link and 0 < hbm_gb < math.inf):
        raise UserError(f"--hbm-gb {hbm_gb}: a budget above 0, beside --link and --compute-us")
    size = size or usual_size(sizes)
    cell = record["overall"]["policies"].get("lru", {}).get(size, {"miss_rate": None})
    chosen: dict[str, Any] = {"size": size}
    # The engines' buffers are per request and layer.
    if share == "none" and cell["miss_rate"] is not None and record["unit"] in ("token", "entry"):
        ids = math.ceil(cell["ids"])
        if settings := engine_settings(ids, max(record["top_k"]), record["settings"]["union"]):
            chosen["engines"] = [setting._asdict() for setting in settings]
    if link is not None and compute_us is not None:
        cost = Cost.of(record, size, load_preset(link), parse_compute(compute_us))
        chosen["cost"] = cost.to_json(None if hbm_gb is None else hbm_gb * 1e9)
    if measured is not None:
        chosen["measured"] = _beside(record, cell, measured, size)
    record["chosen"] = chosen


def _beside(record: dict[str, Any], cell: dict[str, Any], path: Path, size: str) -> dict[str, Any]:
    """Predicted and measured, and their difference in points."""
    if cell["miss_rate"] is None:
        raise UserError(f"--measured: LRU was not replayed at {size}; name the engine's size in --sizes")
    counters = read_counters(path)
    moved, missed = counters.bytes_fetched, counters.misses
    return {
        **counters._asdict(),
        "miss_rate": counters.miss_rate,
        "predicted_miss_rate": cell["miss_rate"],
        "difference_points": 100 * (cell["miss_rate"] - counters.miss_rate),
        "bytes_per_miss": None if moved is None or not missed else moved / missed,
        "predicted_bytes_per_miss": record["bytes_per_id"],
    }
