"""Writes rows as BurstGPT's files hold them, and says what the embedded sample was drawn with.

write_burstgpt("burst.csv", generate_burstgpt(BURSTGPT_SETTINGS))
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from dsatrace.workloads.burstgpt import (
    ELAPSED,
    LOG_TYPE,
    MODEL,
    REQUEST_TOKENS,
    RESPONSE_TOKENS,
    SESSION,
    TIMESTAMP,
    TOTAL_TOKENS,
    BurstRow,
)
from dsatrace.workloads.burstgpt_synthetic import BurstSettings

# The BurstGPT sample is what the generator gives for these, lengths kept small for a laptop.
BURSTGPT_SETTINGS = BurstSettings(
    num_rows=40,
    seed=17,
    max_request_tokens=512,
    max_response_tokens=64,
    num_open_sessions=4,
    api_share=0.25,
)


def write_burstgpt(path: str | Path, rows: Iterable[BurstRow], with_sessions: bool = True) -> None:
    """Writes the published columns: the layout with sessions, or the older one without."""
    optional = (SESSION, ELAPSED) if with_sessions else ()
    header = (TIMESTAMP, *optional, MODEL, REQUEST_TOKENS, RESPONSE_TOKENS, TOTAL_TOKENS, LOG_TYPE)
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    TIMESTAMP: row.timestamp_s,
                    SESSION: row.session_id or "",
                    ELAPSED: "" if row.elapsed_s is None else row.elapsed_s,
                    MODEL: row.model,
                    REQUEST_TOKENS: row.request_tokens,
                    RESPONSE_TOKENS: row.response_tokens,
                    TOTAL_TOKENS: row.request_tokens + row.response_tokens,
                    LOG_TYPE: row.log_type,
                }
            )
