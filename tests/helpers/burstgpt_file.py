"""Writes rows as BurstGPT's files hold them, and says what the embedded sample was drawn with.

write_burstgpt("burst.csv", generate_burstgpt(BURSTGPT_SETTINGS))
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from dsatrace.workloads.burstgpt_synthetic import BurstRow, BurstSettings

# The BurstGPT sample is what the generator gives for these. Its lengths are small, for a laptop; its fourth
# and sixth rows are of one session, longer than needle-2k's top-k and alike in their first 190 tokens.
BURSTGPT_SETTINGS = BurstSettings(
    num_rows=40,
    seed=43,
    max_request_tokens=512,
    max_response_tokens=64,
    num_open_sessions=4,
    api_share=0.25,
)


def write_burstgpt(path: str | Path, rows: Iterable[BurstRow], with_sessions: bool = True) -> None:
    """Writes the published columns: the layout with sessions, or the older one without."""
    optional = ("Session ID", "Elapsed time") if with_sessions else ()
    counts = ("Request tokens", "Response tokens", "Total tokens")
    header = ("Timestamp", *optional, "Model", *counts, "Log Type")
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            elapsed_s = "" if row.elapsed_s is None else row.elapsed_s
            session = (row.session_id or "", elapsed_s) if with_sessions else ()
            num_tokens = row.request_tokens + row.response_tokens
            lengths = (row.request_tokens, row.response_tokens, num_tokens)
            writer.writerow((row.timestamp_s, *session, row.model, *lengths, row.log_type))
