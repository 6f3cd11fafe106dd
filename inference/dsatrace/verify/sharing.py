"""Holds the record of a layer without an indexer against that of the layer whose selection it uses.

Standard library only. Keeps one record per layer of the request and step under way; that
they are of one request and step is `order.py`'s matter.

    sharing = Sharing(rules)
    for record in records: sharing.add(record)       # in the order of the file; raises Mismatch
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsatrace.schema import value_at
from dsatrace.verify.mismatch import Mismatch, compare
from dsatrace.verify.rules import Rules

_OF_A_SELECTION = (
    *("selected_token_pos", "unique_token_pos_count", "offset_min", "offset_p50", "offset_max"),
    *("selected_block_ids", "unique_blocks", "tokens_per_touched_block"),
    *("prefix.intersection_ratio", "prefix.intersection_blocks"),
    *("scores_stats", "scores_topk", "kth_margin", "needle"),
)
"""What of a record is the same in all layers that use one selection; None at levels that lack it."""


class Sharing:
    """Fed with every record that `RunOrder` has taken, so that a layer comes after its source."""

    def __init__(self, rules: Rules) -> None:
        reads = ("kv_fetch.hbm.read_ops",) if rules.tiers is None else ()  # tiers may serve layers otherwise
        self._alike = (*_OF_A_SELECTION, *reads)
        self._source_layers = rules.source_layers
        self._sources = frozenset(rules.source_layers.values())
        self._records: dict[int, Mapping[str, Any]] = {}  # of the sources, in the row under way

    def add(self, record: Mapping[str, Any]) -> None:
        """Raises `Mismatch` naming the field that differs from the source's."""
        layer = record["layer_id"]
        if layer in self._sources:
            self._records[layer] = record
        source = self._source_layers.get(layer)
        if source is None:
            return
        for path in self._alike:
            try:
                compare(value_at(record, path), value_at(self._records[source], path), path)
            except Mismatch as mismatch:
                what = f"as in layer {source}, whose selection layer {layer} uses"
                raise Mismatch(mismatch.field, f"{mismatch.what} {what}") from None
