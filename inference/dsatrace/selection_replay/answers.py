"""What to do about one size: its engines' settings, what it costs on a link, and what an engine measured.

question = Question.of(["2k", "4k"], "none", choose="2k", link="pcie5-x16", compute_us="50+1.5", hbm_gb=40)
add_answers(record, question)
record["chosen"]["engines"]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.kv.stores.simulated import Preset, load_preset
from dsatrace.selection_replay.cost import Compute, Cost, parse_compute
from dsatrace.selection_replay.engines import Counters, engine_settings, read_counters
from dsatrace.selection_replay.settings import usual_size


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of one size; made before anything is replayed, so that a mistake costs no replay."""

    size: str
    link: Preset | None = None
    compute: Compute | None = None
    hbm_bytes: float | None = None
    counters: Counters | None = None

    @classmethod
    def of(
        cls,
        sizes: Sequence[str],
        share: str,
        choose: str | None = None,
        link: str | None = None,
        compute_us: str | None = None,
        hbm_gb: float | None = None,
        measured: Path | None = None,
    ) -> Question:
        """Raises `UserError` naming the flag that does not fit."""
        if choose is not None and choose not in sizes:
            raise UserError(f"--choose {choose}: choose one of the replayed sizes, {', '.join(sizes)}")
        if (link is None) != (compute_us is None):
            missing, given = ("--compute-us", "--link") if compute_us is None else ("--link", "--compute-us")
            raise UserError(f"{given} without {missing}: a cost needs both; add {missing}")
        if link is not None and share != "none":
            raise UserError(
                f"--link with --share {share}: its buffers are per request and layer; leave one out"
            )
        if hbm_gb is not None and not (link and 0 < hbm_gb < math.inf):
            raise UserError(f"--hbm-gb {hbm_gb}: a budget above 0, beside --link and --compute-us")
        return cls(
            size=choose or usual_size(sizes),
            link=None if link is None else load_preset(link),
            compute=None if compute_us is None else parse_compute(compute_us),
            hbm_bytes=None if hbm_gb is None else hbm_gb * 1e9,
            counters=None if measured is None else read_counters(measured),
        )


def add_answers(record: dict[str, Any], question: Question) -> None:
    """Adds `chosen` to the figures of a replay. Raises `UserError` where they lack what is asked."""
    size, share = question.size, record["settings"]["share"]
    cell = record["overall"]["policies"].get("lru", {}).get(size, {"miss_rate": None})
    chosen: dict[str, Any] = {"size": size}
    # The engines' buffers are per request and layer.
    if share == "none" and cell["miss_rate"] is not None and record["unit"] in ("token", "entry"):
        ids = math.ceil(cell["ids"])
        if settings := engine_settings(ids, max(record["top_k"]), record["settings"]["union"]):
            chosen["engines"] = [setting._asdict() for setting in settings]
    if question.link is not None and question.compute is not None:
        cost = Cost.of(record, size, question.link, question.compute)
        chosen["cost"] = cost.to_json(question.hbm_bytes)
    if question.counters is not None:
        chosen["measured"] = _beside(record, cell, question.counters, size)
    record["chosen"] = chosen


def _beside(record: dict[str, Any], cell: dict[str, Any], counters: Counters, size: str) -> dict[str, Any]:
    """Predicted and measured, and their difference in points."""
    if cell["miss_rate"] is None:
        raise UserError(f"--measured: LRU was not replayed at {size}; name the engine's size in --sizes")
    moved, missed = counters.bytes_fetched, counters.misses
    return {
        **counters._asdict(),
        "miss_rate": counters.miss_rate,
        "predicted_miss_rate": cell["miss_rate"],
        "difference_points": 100 * (cell["miss_rate"] - counters.miss_rate),
        "bytes_per_miss": None if moved is None or not missed else moved / missed,
        "predicted_bytes_per_miss": record["bytes_per_id"],
    }
