"""Holds what a run says its tiers' stores did against its records, and against itself.

The engine counts a unit where it asks for it, the store where it gives it; the records are
a part of the first. Standard library only.

    totals = TierTotals(rules, since_forward=0)
    for record in records: totals.add(record)
    check_tier_totals(summary["tiers"], rules, totals, requests, whole=True)   # a note, or None
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsatrace.schema import SUMMARY_FIELDS, TIER_NAMES, Field
from dsatrace.trace.plain.requests import PlainRequests
from dsatrace.trace.verify.mismatch import compare, differs, require, require_range
from dsatrace.trace.verify.rules import Rules

Record = Mapping[str, Any]
_BYTES = ("bytes_read", "bytes_written")
_POOLS = TIER_NAMES[1:]
_AS_MANIFEST = "as the manifest says what there is"
_FIELDS = {field.name: field for field in next(f for f in SUMMARY_FIELDS if f.name == "tiers").children}


class TierTotals:
    """Bytes of the records from a forward on, by pool."""

    def __init__(self, rules: Rules, since_forward: int) -> None:
        self._since_forward = since_forward
        pools = [pool for pool in _POOLS if rules.tiers is not None and pool in rules.tiers.kinds]
        self.moved = {pool: dict.fromkeys(_BYTES, 0) for pool in pools}

    def add(self, record: Record) -> None:
        if record["forward_idx"] >= self._since_forward:
            for pool, totals in self.moved.items():
                for name in _BYTES:
                    totals[name] += record["kv_fetch"][pool][name]


def check_tier_totals(
    said: Record | None, rules: Rules, records: TierTotals, requests: PlainRequests, whole: bool
) -> str | None:
    """`said` is of the schema. Raises `Mismatch`; returns what could not be compared.

    `whole`: no step was lost, so that the records are those which the engine counted.
    """
    if rules.tiers is None:
        require(said is None, "tiers", said, "but the manifest has none")
        return None
    if said is None:
        return "tiers: the run did not say what their stores did"
    last_part = max(rules.resumed_at_forward, default=0)
    if whole and said["since_forward"] != last_part:
        raise differs("tiers.since_forward", said["since_forward"], last_part)
    for name, field in _FIELDS.items():
        _check_counts(said[name], field, f"tiers.{name}")
    index_keys = said["index_keys"]
    require(
        (index_keys is not None) == rules.tiers.offloads_index, "tiers.index_keys", index_keys, _AS_MANIFEST
    )
    _check_prefetch(said["prefetch"])
    if whole:
        _check_losses(said, requests)
    for name in _POOLS:
        pool, is_there = said[name], name in rules.tiers.kinds
        require((pool is not None) == is_there, f"tiers.{name}", pool, _AS_MANIFEST)
        if pool is not None:
            _check_pool(pool, f"tiers.{name}", rules.tiers.unit_bytes)
            compare(pool["latency_kind"], rules.tiers.kinds[name], f"tiers.{name}.latency_kind")
            for moved in _BYTES if whole else ():
                path = f"tiers.{name}.{moved}.in_records"
                compare(pool[moved]["in_records"], records.moved[name][moved], path)
    return None if whole else "tiers: steps were lost, so what the records hold is not all that was counted"


def _check_counts(value: Any, field: Field, path: str) -> None:
    """Nothing that is counted or timed is below 0."""
    for inner in field.children if value is not None else ():
        _check_counts(value[inner.name], inner, f"{path}.{inner.name}")
    if isinstance(value, (int, float)):
        require(value >= 0, path, value, "below 0")


def _check_pool(pool: Record, path: str, unit_bytes: int) -> None:
    """A pool's counts by themselves: every unit found or not, and every byte in somebody's books."""
    asked = pool["hit_units"] + pool["missed_units"]
    rule = f"but {pool['hit_units']} hit and {pool['missed_units']} missed"
    require(pool["requested_units"] == asked, f"{path}.requested_units", pool["requested_units"], rule)
    for name, units in (("bytes_read", "hit_units"), ("bytes_written", "stored_units")):
        moved = pool[name]
        if moved["store"] != pool[units] * unit_bytes:
            raise differs(f"{path}.{name}.store", moved["store"], pool[units] * unit_bytes)
        counted = moved["in_records"] + moved["elsewhere"]
        rule = f"but {counted} in records and elsewhere"
        require(moved["store"] == counted, f"{path}.{name}.store", moved["store"], rule)
    require(pool["timeouts"] <= pool["errors"], f"{path}.timeouts", pool["timeouts"], "more than errors")
    units = sum(pool[name]["store"] for name in _BYTES)
    rule = f"less than the {units} of the units"
    require(pool["bytes_moved"] >= units, f"{path}.bytes_moved", pool["bytes_moved"], rule)


def _check_losses(said: Record, requests: PlainRequests) -> None:
    """A resumed run's requests tell of all its parts, its stores of the last alone."""
    told = {"num_recomputes": requests.num_recomputes, "failed_requests": requests.num_failed}
    for name, most in told.items():
        least = 0 if said["since_forward"] else most
        require_range(f"tiers.{name}", said[name], least, most)


def _check_prefetch(said: Record | None) -> None:
    if said is None:
        return
    rule = f"of {said['units']} units"
    require(said["used_units"] <= said["units"], "tiers.prefetch.used_units", said["used_units"], rule)
    for name in ("recall", "precision"):
        share = said[name]
        require(share is None or share <= 1, f"tiers.prefetch.{name}", share, "no share")
