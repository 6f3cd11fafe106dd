"""What a buffer's misses cost on a link, and from which batch and context offloading pays. All modelled.

A layer's step computes for `base + batch * per_request` us, and fetches its misses in
`alpha + reads * o + bytes / bandwidth`, with the link's figures. Where both overlap it takes the longer
of the two, else their sum. Every layer is taken at its mean misses, and a read is one id.

    cost = Cost.of(record, "2k", load_preset("pcie5-x16"), Compute(50, 1.5))
    cost.step_us(batch=16)                   # overlapped, of a whole decode step
    cost.pays_from(context=131072, hbm_bytes=40e9)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsatrace.errors import UserError
from dsatrace.kv.stores.simulated import PRESETS, Figure, Preset
from dsatrace.selection_replay.settings import usual_size

CONTEXTS = (8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_REQUESTS = 1 << 16
"""Looked at for the batch from which a buffer pays."""
LINKS = PRESETS
USUAL_LINK, USUAL_HBM_BYTES = "pcie5-gather", 40.0 * 2**30
_FIGURES = ("alpha_batch_us", "alpha_op_us", "read_gb_per_s")


class Compute(NamedTuple):
    """Of one layer's decode step, without any fetch; us."""

    base: float
    per_request: float

    def us(self, batch: int) -> float:
        return self.base + batch * self.per_request


USUAL_COMPUTE = Compute(50, 1.5)
"""Assumed where nobody told what a layer's step computes for; no device was measured."""


def parse_compute(text: str) -> Compute:
    """`50`, or `50+1.5`: us per layer's step, and per request of the batch."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\+(\d+(?:\.\d+)?))?", text)
    if match is None or not float(match[1]) > 0:
        raise UserError(f"--compute-us {text}: use us per layer's step, or BASE+PER_REQUEST such as 50+1.5")
    return Compute(float(match[1]), float(match[2] or 0))


@dataclasses.dataclass(frozen=True)
class Cost:
    """A replay's LRU at one size, on a link."""

    link: Preset
    compute: Compute
    misses: tuple[float, ...]  # ids per step, by buffer
    size: float  # ids of a buffer
    bytes_per_id: int  # of one layer
    index_bytes_per_id: int  # of one layer; the indexer's keys stay in HBM
    tokens_per_id: int

    @classmethod
    def of(cls, record: Mapping[str, Any], size: str, link: Preset, compute: Compute) -> Cost:
        """Raises `UserError` where the replay does not tell what it takes."""
        cells = [layer.get("policies", {}).get("lru", {}).get(size) for layer in record["layers"]]
        if record["bytes_per_id"] is None:
            raise UserError("--link: what an id holds is not known in bytes, so its fetch has no cost")
        if not all(cell and cell["miss_rate"] is not None for cell in cells):
            raise UserError(
                f"--link: LRU was not replayed at {size} in every layer; add it to --sizes, lru to --policy, "
                "and leave --share out"
            )
        found = [cell for cell in cells if cell]
        return cls(
            link,
            compute,
            tuple(cell["misses_per_step"]["mean"] for cell in found),
            sum(cell["ids"] for cell in found) / len(found),
            record["bytes_per_id"],
            record["index_bytes_per_id"],
            record["unit_tokens"],
        )

    @classmethod
    def stored(cls, record: Mapping[str, Any]) -> tuple[Cost, float]:
        """As the replay was asked for it, else on the usual link; and the budget of HBM, in bytes.

        Raises `UserError` as `of` does.
        """
        chosen = record.get("chosen") or {}
        size = chosen.get("size") or usual_size(record["settings"]["sizes"])
        asked = chosen.get("cost")
        if asked is None:
            return cls.of(record, size, LINKS[USUAL_LINK], USUAL_COMPUTE), USUAL_HBM_BYTES
        alpha, per_op, read = (Figure(**asked["link"][name]) for name in _FIGURES)
        link = Preset(asked["link"]["name"], asked["link"]["what"], alpha, per_op, read, read)
        cost = cls.of(record, size, link, Compute(**asked["compute_us"]))
        return cost, asked.get("hbm_bytes", USUAL_HBM_BYTES)

    def step_us(self, batch: int, overlapped: bool = True) -> float:
        """A whole decode step of `batch` requests with buffers."""
        computed, total = self.compute.us(batch), 0.0
        for misses in self.misses:
            ids = batch * misses
            fetched = self._read_us(ids)
            total += max(computed, fetched) if overlapped else computed + fetched
        return total

    def _read_us(self, ids: float) -> float:
        if ids == 0:
            return 0.0
        link = self.link
        bandwidth = link.read_gb_per_s.value * 1e3  # bytes per us
        return link.alpha_batch_us.value + ids * link.alpha_op_us.value + ids * self.bytes_per_id / bandwidth

    def whole_step_us(self, batch: int) -> float:
        """The same with everything in HBM."""
        return len(self.misses) * self.compute.us(batch)

    def request_bytes(self, context: int, offloaded: bool) -> float:
        """HBM that a request of `context` tokens takes, in all layers."""
        ids = context / self.tokens_per_id
        held = min(self.size, ids) if offloaded else ids
        return len(self.misses) * (held * self.bytes_per_id + ids * self.index_bytes_per_id)

    def most_requests(self, context: int, hbm_bytes: float, offloaded: bool) -> int:
        return int(hbm_bytes // self.request_bytes(context, offloaded))

    def pays_from(self, context: int, hbm_bytes: float) -> int | None:
        """The smallest batch that is faster, in tokens per second, than the largest that fits without
        buffers; None where none is. Below that everything fits in HBM, and a fetch only costs."""
        whole = self.most_requests(context, hbm_bytes, offloaded=False)
        rate = whole / self.whole_step_us(whole) if whole else 0.0
        most = min(self.most_requests(context, hbm_bytes, offloaded=True), MOST_REQUESTS)
        for batch in range(whole + 1, most + 1):
            if batch / self.step_us(batch) > rate:
                return batch
        return None

    def to_json(self, hbm_bytes: float | None) -> dict[str, Any]:
        """For replay.json: by batch, and by context where there is a budget."""
        link = self.link
        record: dict[str, Any] = {
            "kind": "modelled",
            "link": {
                "name": link.name,
                "what": link.what,
                **{name: dataclasses.asdict(getattr(link, name)) for name in _FIGURES},
            },
            "compute_us": self.compute._asdict(),
            "by_batch": [
                {
                    "batch": batch,
                    "whole_ms": self.whole_step_us(batch) / 1e3,
                    "overlapped_ms": self.step_us(batch) / 1e3,
                    "serial_ms": self.step_us(batch, overlapped=False) / 1e3,
                }
                for batch in BATCHES
            ],
        }
        if hbm_bytes is not None:
            record["hbm_bytes"] = hbm_bytes
            record["by_context"] = [self._at_context(context, hbm_bytes) for context in CONTEXTS]
        return record

    def _at_context(self, context: int, hbm_bytes: float) -> dict[str, Any]:
        whole, most = (self.most_requests(context, hbm_bytes, offloaded) for offloaded in (False, True))
        return {
            "context": context,
            "most_requests": whole,
            "most_requests_offloaded": most,
            "tokens_per_s": whole / self.whole_step_us(whole) * 1e6 if whole else 0.0,
            "tokens_per_s_offloaded": most / self.step_us(most) * 1e6 if most else 0.0,
            "pays_from_batch": self.pays_from(context, hbm_bytes),
        }
