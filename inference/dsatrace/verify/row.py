"""One request's records in one forward, layer 0 to the last: what they have in common.

Row.of(record).request_id
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """What all records of a row have in common."""

    request_id: str
    step_idx: int
    seq_len_current: int
    phase: str
    cached_blocks: int
    prefix_key: str
    needle_tokens: int
    forward_idx: int
    batch_size: int | None  # this and what follows: None where the door does not know
    step_wall_us: float | None
    step_synced: bool | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        prefix, fetched = record["prefix"] or {}, record["kv_fetch"]
        return cls(
            record["request_id"],
            record["step_idx"],
            record["seq_len_current"],
            record["phase"],
            prefix.get("prefix_cached_blocks", 0),
            prefix.get("prefix_key", ""),
            record.get("needle", {}).get("tokens", 0),
            record["forward_idx"],
            fetched["hbm"]["batch_size"] if fetched else None,
            record["step_wall_us"],
            record["step_synced"],
        )
