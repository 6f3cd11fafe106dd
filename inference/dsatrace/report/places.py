"""How much of a selection lies at the start of the context and how much at its end, layer by layer.

Attention sinks are the first tokens, the recent window the last ones. Needs the positions,
so level full; reads at most `MAX_RECORDS` records, from the run's start.

for place in places(RunReader(folder)): place.layer_id, place.sinks, place.uniform_sinks
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..trace.reader import RunReader

NUM_SINKS = 16
"""Tokens at the start of the context."""
RECENT = 64
"""Tokens at its end, the query's own included."""
MAX_RECORDS = 20_000
_FIELDS = ("layer_id", "seq_len_current", "phase", "path", "selected_token_pos")


@dataclasses.dataclass(frozen=True)
class Places:
    """Mean shares of a layer's selections, over sparse decode records; `uniform` draws k of N at random,
    and `recency` takes the last k."""

    layer_id: int
    num_records: int
    sinks: float
    recent: float
    uniform_sinks: float
    uniform_recent: float
    recency_recent: float


def places(run: RunReader) -> list[Places]:
    """A row a layer; none where no positions of sparse steps were recorded."""
    shares: dict[int, list[tuple[float, ...]]] = {}
    for record in itertools.islice(_sparse_records(run), MAX_RECORDS):
        positions, seq_len = np.asarray(record["selected_token_pos"]), record["seq_len_current"]
        k = len(positions)
        row = (
            np.count_nonzero(positions < NUM_SINKS) / k,
            np.count_nonzero(positions >= seq_len - RECENT) / k,
            min(NUM_SINKS, seq_len) / seq_len,
            min(RECENT, seq_len) / seq_len,
            min(RECENT, k) / k,
        )
        shares.setdefault(record["layer_id"], []).append(row)
    return [
        Places(layer, len(rows), *np.mean(rows, axis=0).tolist()) for layer, rows in sorted(shares.items())
    ]


def _sparse_records(run: RunReader) -> Iterator[dict[str, Any]]:
    for record in run.steps(_FIELDS):
        if record["path"] == "sparse" and record["phase"] == "decode" and "selected_token_pos" in record:
            yield record
