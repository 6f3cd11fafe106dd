"""What the tiers of a run moved, and how much of it is in the records: for the summary and for users.

totals = TierTotals(cache, since_forward=0)
totals.record(fetches)                        # what went into a capture
totals.to_json(num_recomputes=0, failed_requests=0)
totals.to_text()                              # "tiers: 93.1 % of the selected blocks of 4 tokens found ..."
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from dsatrace.engine.runner import BlocksLost
from dsatrace.kv.stores.interface import StoreStats
from dsatrace.kv.tiers.fetches import LOCAL, NUM_TIERS, REMOTE, LayerFetch, StepFetches
from dsatrace.kv.tiers.stack import TierStack
from dsatrace.runner.offload.cache import OffloadedCache
from dsatrace.runner.offload.layer_units import UnitsLost
from dsatrace.schema import TIER_NAMES
from dsatrace.trace.rates import RATES, unit_words
from dsatrace.units import size_text

_STORE_STATS = (
    *("requested_units", "hit_units", "missed_units", "corrupt_units", "read_batches", "read_ops", "read_us"),
    *("write_batches", "write_us", "stored_units", "evicted_units", "errors", "timeouts"),
    *("skipped_batches", "retries"),
)
"""Fields of `StoreStats` in the summary."""
_SELECTED_UNITS = ("requested_units", "hit_units", "missed_units")


@dataclasses.dataclass
class TierTotals:
    """What the tiers moved since forward `since_forward`, and how much of it is in the records."""

    cache: OffloadedCache
    since_forward: int = 0
    lost_units: int = 0
    recorded_read: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(NUM_TIERS, dtype=np.int64))
    recorded_written: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(NUM_TIERS, dtype=np.int64)
    )

    def reporting(self, on_fetch: Callable[[LayerFetch], None]) -> contextlib.AbstractContextManager[None]:
        """Calls `on_fetch` for every layer of the forwards run inside."""
        return self.cache.reporting(on_fetch)

    def record(self, fetches: StepFetches) -> None:
        """These went into a capture."""
        self.recorded_read += fetches.bytes_read.sum((0, 1))
        self.recorded_written += fetches.bytes_written.sum((0, 1))

    def lose(self, lost: UnitsLost) -> BlocksLost:
        """Counts the units, and says which blocks they were."""
        self.lost_units += len(lost.units)
        return BlocksLost(lost.block_ids, str(lost))

    def to_json(self, num_recomputes: int, failed_requests: int) -> dict[str, Any]:
        """The summary's `tiers`."""
        pools = {name: self._pool(tier) for tier, name in enumerate(TIER_NAMES) if tier != 0}
        return {
            "since_forward": self.since_forward,
            "selected_units": {name: getattr(self.cache.total, name) for name in _SELECTED_UNITS},
            **pools,
            "prefetch": self.cache.prefetcher.to_json(),
            "index_keys": self.cache.index and _index_keys(self.cache.index.tiers),
            "lost_units": self.lost_units,
            "num_recomputes": num_recomputes,
            "failed_requests": failed_requests,
        }

    def to_text(self) -> str:
        """A line for users."""
        total, rate = self.cache.total, RATES["units"]
        parts = []
        if total.requested_units:
            share = 100 * total.hit_units / total.requested_units
            parts.append(f"{share:.1f} % of the {rate.name({'unit': unit_words(self.cache.unit_tokens)})}")
        for name, stats in zip(TIER_NAMES, self.cache.tiers.stats(), strict=True):
            if stats is not None:
                parts.append(f"{name.replace('_', ' ')} {_moved(stats)}")
        if self.lost_units:
            parts.append(f"{self.lost_units} units lost")
        return f"tiers: {'; '.join(parts)}"

    def _pool(self, tier: int) -> dict[str, Any] | None:
        tiers, unit_bytes = self.cache.tiers, self.cache.unit_bytes
        stats = tiers.stats()[tier]
        if stats is None:
            return None
        recorded = int(self.recorded_read[tier]), int(self.recorded_written[tier])
        moved = int(tiers.read_units[tier]) * unit_bytes, int(tiers.written_units[tier]) * unit_bytes
        in_store = stats.hit_units * unit_bytes, stats.stored_units * unit_bytes
        return {
            name: {"in_records": told, "elsewhere": engine - told, "store": store}
            for name, told, engine, store in zip(
                ("bytes_read", "bytes_written"), recorded, moved, in_store, strict=True
            )
        } | _counted(stats)


def _index_keys(tiers: TierStack) -> dict[str, Any]:
    def pool(stats: StoreStats | None) -> dict[str, Any] | None:
        if stats is None:
            return None
        return {
            "bytes_read": stats.hit_units * tiers.unit_bytes,
            "bytes_written": stats.stored_units * tiers.unit_bytes,
            "read_batches": stats.read_batches,
            "read_us": stats.read_us,
            "write_batches": stats.write_batches,
            "write_us": stats.write_us,
            "errors": stats.errors + stats.corrupt_units,
        }

    stats = tiers.stats()
    return {TIER_NAMES[tier]: pool(stats[tier]) for tier in (LOCAL, REMOTE)}


def _counted(stats: StoreStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in _STORE_STATS} | {
        "bytes_moved": stats.bytes_read + stats.bytes_written,
        "latency_kind": stats.latency_kind,
    }


def _moved(stats: StoreStats) -> str:
    seconds = (stats.read_us + stats.write_us) / 1e6
    line = f"{size_text(stats.bytes_read)} read, {size_text(stats.bytes_written)} written in {seconds:.2g} s"
    line += " (modelled)" if stats.latency_kind == "modelled" else ""
    for count, name in ((stats.errors, "errors"), (stats.retries, "retries")):
        line += f", {count} {name}" if count else ""
    return line
