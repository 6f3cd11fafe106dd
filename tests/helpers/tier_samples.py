"""A small engine's tiers without an engine: LRU in HBM, pools that hold the rest, and what they say moved.

Knows no tensor and no time: latencies are drawn, everything else follows from which units a
forward selects. What `fetched` adds to captures and what `described` says belong together.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from typing import Any

import numpy as np

from dsatrace.kv.tiers.fetches import StepFetches
from dsatrace.schema import TIER_NAMES
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.manifest import PoolSettings, TierSettings
from helpers.trace_samples import LAYOUT

LATENT = LAYOUT.latent_bytes_per_token
RAM = PoolSettings("ram", 512, "measured")
REMOTE = PoolSettings("redis://user:secret@10.0.0.7:6379", None, "modelled")
Unit = tuple[str, int]  # request, number in it


def setup(
    unit_tokens: int = 4, hbm_blocks: int = 3, local: bool = True, remote: bool = True, row: bool = False
) -> TierSettings:
    unit_tokens = 1 if row else unit_tokens
    return TierSettings(
        granularity="row" if row else "block",
        unit_tokens=unit_tokens,
        unit_bytes=unit_tokens * LATENT,
        policy="lru",
        prefetch="none",
        on_error="recompute",
        index_keys="hbm",
        hbm_blocks=hbm_blocks,
        local_pool=RAM if local else None,
        remote_pool=REMOTE if remote else None,
    )


SETUPS = {
    "block": setup(),
    "block of two": setup(unit_tokens=8, remote=False),
    "half a block": setup(unit_tokens=2, hbm_blocks=4, local=False),
    "row": setup(row=True, hbm_blocks=9),
}
"""For statistics in blocks of 4 tokens."""


class SimulatedTiers:
    """Serves captures in order; units live by request, each layer has an LRU of its own."""

    def __init__(self, setup: TierSettings, seed: int = 0) -> None:
        self.setup = setup
        self.since_forward = 0
        self._rng = np.random.default_rng(seed)
        self._pools = [TIER_NAMES.index(name) for name in setup.pools]
        self._hbm: dict[int, OrderedDict[Unit, None]] = {}
        self._homes: dict[tuple[int, Unit], int] = {}
        self._counted: dict[int, Counter[str]] = {pool: Counter() for pool in self._pools}
        self._read_us = dict.fromkeys(self._pools, 0.0)

    def fetched(self, capture: StepCapture) -> StepCapture:
        """The capture, with where its positions were found and what was moved for them."""
        num_layers, batch, _ = capture.positions.shape
        counted = {
            name: np.zeros((num_layers, batch, 3), dtype=np.int64)
            for name in ("bytes_read", "bytes_useful", "read_ops", "evicted_units", "bytes_written", "errors")
        }
        served_by = np.full(capture.positions.shape, -1, dtype=np.int8)
        latency_us = np.zeros((num_layers, 3))
        for layer in range(num_layers):
            self._serve_layer(capture, layer, served_by[layer], {n: c[layer] for n, c in counted.items()})
            for pool in self._pools:
                if counted["bytes_read"][layer, :, pool].any():
                    latency_us[layer, pool] = waited_us = self._rng.uniform(1, 900)
                    self._read_us[pool] += waited_us
                    self._counted[pool]["read_batches"] += 1
        for pool in self._pools:
            for name, values in counted.items():
                self._counted[pool][name] += int(values[:, :, pool].sum())
        return dataclasses.replace(
            capture, fetches=StepFetches(served_by=served_by, latency_us=latency_us, **counted)
        )

    def _serve_layer(
        self, capture: StepCapture, layer: int, served_by: np.ndarray, counted: dict[str, np.ndarray]
    ) -> None:
        hbm = self._hbm.setdefault(layer, OrderedDict())
        size = self.setup.unit_tokens
        tokens: list[Counter[Unit]] = []  # a row each
        for b, request_id in enumerate(capture.request_ids):
            newest = (request_id, (int(capture.seq_len[b]) - 1) // size)
            hbm[newest] = None  # just written
            row = capture.positions[layer, b]
            units = [(request_id, position // size) for position in row[row >= 0].tolist()]
            tokens.append(Counter(units))
            served_by[b, row >= 0] = [0 if unit in hbm else self._home(layer, unit) for unit in units]
        missed = {unit for row in tokens for unit in row if unit not in hbm}
        for b, row in enumerate(tokens):
            charged = sorted(unit for unit in row if unit in missed)
            missed.difference_update(charged)
            for unit in charged:
                pool = self._home(layer, unit)
                counted["bytes_read"][b, pool] += self.setup.unit_bytes
                counted["bytes_useful"][b, pool] += row[unit] * LATENT
                counted["read_ops"][b, pool] += (unit[0], unit[1] - 1) not in charged
                counted["bytes_written"][b, 0] += self.setup.unit_bytes
            for unit in row:
                hbm[unit] = None
                hbm.move_to_end(unit)
            self._evict(hbm, b, counted)
            for pool in self._pools:
                counted["errors"][b, pool] = self._rng.random() < 0.1
                counted["evicted_units"][b, pool] = self._rng.integers(2)

    def _evict(self, hbm: OrderedDict[Unit, None], b: int, counted: dict[str, np.ndarray]) -> None:
        room = self.setup.hbm_blocks * (4 if self.setup.granularity == "row" else 1)
        while len(hbm) > room:
            hbm.popitem(last=False)
            counted["evicted_units"][b, 0] += 1
            if self._rng.random() < 0.3:  # it was written since it came
                counted["bytes_written"][b, self._pools[0]] += self.setup.unit_bytes

    def _home(self, layer: int, unit: Unit) -> int:
        """The pool that keeps it."""
        return self._homes.setdefault((layer, unit), int(self._rng.choice(self._pools)))

    def described(self, num_recomputes: int = 0) -> dict[str, Any]:
        """What the run says at its end: some of everything was moved for what has no record."""
        pools = {TIER_NAMES[pool]: self._described(pool) for pool in self._pools}
        return {
            "since_forward": self.since_forward,
            "selected_units": {"requested_units": 40, "hit_units": 29, "missed_units": 11},
            "local_pool": pools.get("local_pool"),
            "remote_pool": pools.get("remote_pool"),
            "prefetch": {"units": 9, "used_units": 6, "missed_units": 3, "recall": 2 / 3, "precision": 2 / 3},
            "index_keys": self._index_keys(),
            "lost_units": 2,
            "num_recomputes": num_recomputes,
            "failed_requests": 0,
        }

    def _index_keys(self) -> dict[str, Any] | None:
        if self.setup.index_keys == "hbm":
            return None
        names = (
            "bytes_read",
            "bytes_written",
            "read_batches",
            "read_us",
            "write_batches",
            "write_us",
            "errors",
        )
        counted = {name: float(i) if name.endswith("us") else i for i, name in enumerate(names)}
        return {name: counted if i in self._pools else None for i, name in enumerate(TIER_NAMES) if i}

    def _described(self, pool: int) -> dict[str, Any]:
        counted, unit_bytes = self._counted[pool], self.setup.unit_bytes
        hit, stored = counted["bytes_read"] // unit_bytes + 5, counted["bytes_written"] // unit_bytes + 3
        moved = {
            name: {"in_records": counted[name], "elsewhere": more, "store": counted[name] + more}
            for name, more in (("bytes_read", 5 * unit_bytes), ("bytes_written", 3 * unit_bytes))
        }
        return {
            **moved,
            "requested_units": hit + 7,
            "hit_units": hit,
            "missed_units": 7,
            "corrupt_units": 1,
            "read_batches": counted["read_batches"] + 1,
            "read_ops": counted["read_ops"] + 4,
            "read_us": self._read_us[pool] + 12.5,
            "write_batches": 4,
            "write_us": 81.25,
            "stored_units": stored,
            "evicted_units": counted["evicted_units"],
            "errors": counted["errors"],
            "timeouts": 0,
            "skipped_batches": 0,
            "retries": 2,
            "bytes_moved": (hit + stored) * unit_bytes + 512,
            "latency_kind": self.setup.pools[TIER_NAMES[pool]].latency_kind,
        }
