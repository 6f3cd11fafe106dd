"""What requests that have not ended yet have added to a summary's distributions.

Records below level full hold no positions, so what was counted of them cannot be counted again: a
resume, which serves unfinished requests from their start, takes their share off instead. Knows no file.

    shares = Shares((16, 32, 64))
    shares.of("r0").add(step, 0)             # a step's first request
    shares.end({"request_id": "r0", "state": "stop"})     # its share stays counted
    stored = {..., "unfinished": shares.to_json()}
    without_unfinished(stored, top_k=2048)   # what the requests that ended have added
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsatrace.trace.histogram import Histogram
from dsatrace.trace.kernels import count_offsets
from dsatrace.trace.overlap import OverlapTotals
from dsatrace.trace.records import StepRecords
from dsatrace.trace.statistics import count_blocks, of_request

ENDED = ("stop", "length", "rejected")
"""States of a request that a resumed run does not serve again."""

_OVERLAPS = ("step_overlap", "layer_overlap")


class Share:
    """What one request, or several, have added."""

    def __init__(self, block_sizes: Sequence[int]) -> None:
        self._sizes = {size: f"unique_blocks_at_{size}" for size in block_sizes}
        names = ("tokens_per_touched_block", "offsets", *self._sizes.values())
        self._histograms = {name: Histogram() for name in names}
        self.step = OverlapTotals()
        self.layer = OverlapTotals()

    def add(self, step: StepRecords, b: int) -> None:
        """Counts request `b` of a step, but for its overlaps, which `SelectionOverlap` adds."""
        stats, num_sets, seq_len = step.stats, step.num_sets, int(step.capture.seq_len[b])
        tokens, token_ptr = of_request(stats.tokens, stats.token_ptr, b, num_sets)
        blocks, block_ptr = of_request(stats.block_ids, stats.block_ptr, b, num_sets)
        in_block, _ = of_request(stats.tokens_in_block, stats.block_ptr, b, num_sets)
        self._histograms["tokens_per_touched_block"].add(in_block)
        query = np.full(num_sets, seq_len - 1, dtype=np.int64)
        count_offsets(tokens, token_ptr, query, self._histograms["offsets"].counts_below(seq_len))
        if seq_len <= step.kind.max_width:
            return
        for size, name in self._sizes.items():
            if size % step.block_size:
                touched = count_blocks(tokens, token_ptr, size)
            else:
                touched = count_blocks(blocks, block_ptr, size // step.block_size)
            self._histograms[name].add(touched)

    def merge(self, other: Share) -> None:
        for name, histogram in self._histograms.items():
            histogram.merge(other._histograms[name])
        self.step.merge(other.step)
        self.layer.merge(other.layer)

    def add_json(self, stored: Mapping[str, Any], top_k: int) -> None:
        """Adds what `to_json` gave."""
        for name, histogram in self._histograms.items():
            histogram.add_json(stored["histograms"][name])
        for name, totals in zip(_OVERLAPS, (self.step, self.layer), strict=True):
            totals.add_json(stored[name], top_k)

    def to_json(self) -> dict[str, Any]:
        return {
            "step_overlap": self.step.to_json(),
            "layer_overlap": self.layer.to_json(),
            "histograms": {name: histogram.to_json() for name, histogram in self._histograms.items()},
        }


class Shares:
    """The share of each request that has not ended, and how many have."""

    def __init__(self, block_sizes: Sequence[int]) -> None:
        self._sizes = tuple(block_sizes)
        self._of: dict[str, Share] = {}
        self._num_ended = 0

    def of(self, request_id: str) -> Share:
        share = self._of.get(request_id)
        if share is None:
            share = self._of[request_id] = Share(self._sizes)
        return share

    def end(self, request: Mapping[str, Any]) -> None:
        """Takes a line of requests.jsonl; one that was aborted or failed would be served again."""
        if request["state"] in ENDED:
            self._num_ended += 1
            self._of.pop(request["request_id"], None)

    def to_json(self) -> dict[str, Any]:
        """The summary's `unfinished`."""
        together = Share(self._sizes)
        for share in self._of.values():
            together.merge(share)
        return {"ended_requests": self._num_ended, **together.to_json()}

    @classmethod
    def from_json(cls, block_sizes: Sequence[int], stored: Mapping[str, Any], top_k: int) -> Shares:
        """What a summary's `unfinished` says; whose the share is, it does not say."""
        shares = cls(block_sizes)
        shares._num_ended = stored["ended_requests"]
        shares.of("").add_json(stored, top_k)
        return shares


def without_unfinished(stored: Mapping[str, Any], top_k: int) -> dict[str, Any]:
    """The stored summary without the share of the requests that had not ended, and without counts that
    only records can tell."""
    unfinished = stored["unfinished"]
    histograms = dict(stored["histograms"])
    for name, share in unfinished["histograms"].items():
        rest = Histogram()
        rest.add_json(histograms[name])
        rest.add_json({"values": share["values"], "counts": [-count for count in share["counts"]]})
        histograms[name] = rest.to_json()
    overlaps = {}
    for name in _OVERLAPS:
        totals = OverlapTotals()
        totals.add_json(stored[name], top_k)
        totals.subtract_json(unfinished[name], top_k)
        overlaps[name] = totals.to_json()
    nothing = Share([row["block_size_tokens"] for row in stored["blocks_touched"]]).to_json()
    return {**stored, **overlaps, "histograms": histograms, "unfinished": {**unfinished, **nothing}}
