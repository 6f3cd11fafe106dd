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
    batch_size: int
    step_wall_us: float
    step_synced: bool

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        prefix = record["prefix"]
        return cls(
            record["request_id"],
            record["step_idx"],
            record["seq_len_current"],
            record["phase"],
            prefix["prefix_cached_blocks"],
            prefix["prefix_key"],
            record.get("needle", {}).get("tokens", 0),
            record["forward_idx"],
            record["kv_fetch"]["hbm"]["batch_size"],
            record["step_wall_us"],
            record["step_synced"],
        )
