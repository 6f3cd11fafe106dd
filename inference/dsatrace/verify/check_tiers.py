"""Checks what a run with several tiers records of them: each record, then the totals.

Which tier held a token is the engine's word. `check_fetches` checks that a record's `kv_fetch` loses
and doubles nothing from HBM to the last tier, that whole units were moved, and that tokens, blocks
and reads fit the selection. `BatchTimes` compares the times in the records of one forward.
`TierTotals` adds up the records' bytes, and `check_tier_totals` compares `tiers` of summary.json with
them, with requests.jsonl and with itself. Standard library only; keeps no record.

    check_fetches(record, selected, rules.tiers)    # raises Mismatch naming the field
    times = BatchTimes(); times.add(line, record)
    moved = TierTotals(rules, since_forward=0); moved.add(record)
    check_tier_totals(summary["tiers"], rules, moved, requests, whole=True)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsatrace.schema import OFFLOADED_FETCH, SUMMARY_FIELDS, TIER_NAMES, Field
from dsatrace.verify.mismatch import Mismatch, compare, require, require_range
from dsatrace.verify.plain_record import NOTHING, NOTHING_MOVED, chain
from dsatrace.verify.requests import PlainRequests
from dsatrace.verify.rules import Rules, TierRules

Record = Mapping[str, Any]
_OFFLOADED = frozenset(OFFLOADED_FETCH)
_COUNTED = ("read_ops", "evicted_units", "errors", "bytes_read", "bytes_useful", "bytes_written")


@dataclasses.dataclass(frozen=True)
class Selected:
    """What is known of a record's selection; None where its level lacks it."""

    num_tokens: int
    num_blocks: int
    block_size: int  # tokens
    latent_bytes: int  # per token and layer
    missing: int  # free places in the last touched block, if it is the request's last
    positions: Sequence[int] | None  # in any order
    blocks: Sequence[int] | None  # ascending

    def tokens_of(self, blocks: int) -> tuple[int, int]:
        """The fewest and the most selected tokens in `blocks` of the touched blocks."""
        counts = self._tokens_in_blocks
        if counts is not None:
            return sum(counts[:blocks]), sum(counts[len(counts) - blocks :])
        others = self.num_blocks - blocks
        fewest = max(blocks, self.num_tokens - others * self.block_size)
        return fewest, min(blocks * self.block_size, self.num_tokens - others)

    def runs_of(self, num_hit: int, by_row: bool) -> tuple[int, int]:
        """The fewest and the most runs of adjacent ids among `num_hit` of the tokens, or of the blocks."""
        ids, num_all = (self.positions, self.num_tokens) if by_row else (self.blocks, self.num_blocks)
        if ids is None:
            return min(num_hit, 1), num_hit
        lengths = sorted(_run_lengths(sorted(ids)), reverse=True)
        fewest, covered = 0, 0
        while covered < num_hit:
            covered += lengths[fewest]
            fewest += 1
        # Leaving out an id splits at most one run.
        return fewest, min(num_hit, len(lengths) + num_all - num_hit)

    def num_units(self, unit_tokens: int) -> int | None:
        """Units that the selection touches; None without positions."""
        if self.positions is None:
            return None
        return len({position // unit_tokens for position in self.positions})

    @functools.cached_property
    def _tokens_in_blocks(self) -> list[int] | None:
        """Selected tokens per touched block, ascending; None without positions."""
        if self.positions is None:
            return None
        counts: dict[int, int] = {}
        for position in self.positions:
            block = position // self.block_size
            counts[block] = counts.get(block, 0) + 1
        return sorted(counts.values())


def offloaded_field(record: Record) -> str | None:
    """The first field in any tier's account that only a run with tiers has."""
    for tier in TIER_NAMES:
        fetched = record["kv_fetch"][tier]
        if not _OFFLOADED.isdisjoint(fetched):
            return next(f"kv_fetch.{tier}.{name}" for name in OFFLOADED_FETCH if name in fetched)
    return None


def check_fetches(record: Record, selected: Selected, rules: TierRules) -> None:
    """Raises `Mismatch` at the first wrong field of any tier."""
    fetched = record["kv_fetch"]
    for name in TIER_NAMES:
        for field in OFFLOADED_FETCH:
            require(field in fetched[name], f"kv_fetch.{name}.{field}", None, "missing, the run has tiers")
        for field in _COUNTED:
            require(fetched[name][field] >= 0, f"kv_fetch.{name}.{field}", fetched[name][field], "below 0")
    _check_chain(fetched, selected, rules)
    _check_tokens_in_blocks(fetched, selected, rules)
    _check_hbm(fetched["hbm"], selected, rules)
    for name in list(rules.kinds)[1:]:
        _check_pool(name, fetched[name], selected, rules, own=_is_alone(record))
    # What is fetched from a pool is fetched into HBM.
    fetched_bytes = sum(fetched[name]["bytes_read"] for name in TIER_NAMES[1:])
    compare(fetched["hbm"]["bytes_written"], fetched_bytes, "kv_fetch.hbm.bytes_written")


def _is_alone(record: Record) -> bool:
    """Whether no other request shares the units, so that all that the record missed is charged to it."""
    batch_size: int = record["kv_fetch"]["hbm"]["batch_size"]
    return record["phase"] == "decode" and batch_size == 1


def _check_chain(fetched: Record, selected: Selected, rules: TierRules) -> None:
    """Each tier is asked for what the one before it missed; the last one misses nothing."""
    hits: dict[str, dict[str, int]] = {}
    for field, total in (("hit_tokens", selected.num_tokens), ("hit_blocks", selected.num_blocks)):
        hits[field] = {name: fetched[name][field] for name in rules.kinds}
        for name, count in hits[field].items():
            require_range(f"kv_fetch.{name}.{field}", count, 0, total)
        found = sum(hits[field].values())
        rule = f"{found} in all tiers, {total} selected"
        require(found == total, f"kv_fetch.{list(rules.kinds)[-1]}.{field}", found, rule)
    asked = chain(hits["hit_tokens"], hits["hit_blocks"])
    batch_size = fetched["hbm"]["batch_size"]
    for name in TIER_NAMES:
        derived: dict[str, Any] = dict(asked[name])
        if name in rules.kinds:
            derived |= {"batch_size": batch_size, "latency_kind": rules.kinds[name]}
        else:  # a tier that the run does not have
            derived |= NOTHING | NOTHING_MOVED
        compare(fetched[name], derived, f"kv_fetch.{name}")


def _check_tokens_in_blocks(fetched: Record, selected: Selected, rules: TierRules) -> None:
    """A block is hit in the furthest tier of its tokens, so hit tokens and hit blocks bound each other."""
    total, num_blocks = selected.num_tokens, selected.num_blocks
    # No unit ends inside a block: all its tokens come from one tier.
    whole = not rules.by_row and rules.unit_tokens % selected.block_size == 0
    tokens_near = blocks_near = 0
    for name in rules.kinds:
        tokens, blocks = fetched[name]["hit_tokens"], fetched[name]["hit_blocks"]
        tokens_near, blocks_near = tokens_near + tokens, blocks_near + blocks
        fewest, most = selected.tokens_of(blocks)
        if whole:
            require_range(f"kv_fetch.{name}.hit_tokens", tokens, fewest, most)
        # Blocks hit up to this tier have all tokens there; each of the others has at least one beyond.
        fewest, _ = selected.tokens_of(blocks_near)
        far = num_blocks - blocks_near
        low, high = fewest - (tokens_near - tokens), total - far - (tokens_near - tokens)
        require_range(f"kv_fetch.{name}.hit_tokens", tokens, max(low, blocks), high)


def _check_hbm(hbm: Record, selected: Selected, rules: TierRules) -> None:
    """What was read in HBM."""
    hit_tokens, hit_blocks = hbm["hit_tokens"], hbm["hit_blocks"]
    derived: dict[str, Any] = {
        "bytes_useful": hit_tokens * selected.latent_bytes,
        "latency_us": 0.0,
        "errors": 0,
    }
    field, read = "kv_fetch.hbm.bytes_read", hbm["bytes_read"]
    if rules.by_row:
        derived["bytes_read"] = derived["bytes_useful"]
    else:
        whole = hit_blocks * selected.block_size
        # The request's last block, which holds fewer tokens, may be among them.
        possible = {whole - selected.missing} if hit_blocks == selected.num_blocks else {whole}
        if 0 < hit_blocks < selected.num_blocks:
            possible.add(whole - selected.missing)
        in_bytes = sorted(tokens * selected.latent_bytes for tokens in possible)
        require(read in in_bytes, field, read, f"derived {' or '.join(map(str, in_bytes))}")
    compare(hbm, derived, "kv_fetch.hbm")
    fewest, most = selected.runs_of(hit_tokens if rules.by_row else hit_blocks, rules.by_row)
    require_range("kv_fetch.hbm.read_ops", hbm["read_ops"], fewest, most)


def _run_lengths(ascending: Sequence[int]) -> Iterator[int]:
    start = 0
    for i in range(1, len(ascending) + 1):
        if i == len(ascending) or ascending[i] != ascending[i - 1] + 1:
            yield i - start
            start = i


def _check_pool(name: str, pool: Record, selected: Selected, rules: TierRules, own: bool) -> None:
    """What the pool's store moved: whole units, which hold the record's tokens.

    `own`: all that the record missed is charged to it.
    """
    where, latent = f"kv_fetch.{name}", selected.latent_bytes
    latency = pool["latency_us"]
    require(latency >= 0, f"{where}.latency_us", latency, "below 0")
    for field, size in (
        ("bytes_read", rules.unit_bytes),
        ("bytes_written", rules.unit_bytes),
        ("bytes_useful", latent),
    ):
        require(pool[field] % size == 0, f"{where}.{field}", pool[field], f"not a multiple of {size}")
    units = pool["bytes_read"] // rules.unit_bytes
    fewest, most = _possible_units(pool, selected, rules)
    low, high = fewest * rules.unit_bytes if own else 0, most * rules.unit_bytes
    require_range(f"{where}.bytes_read", pool["bytes_read"], low, high)
    # A fetched unit holds at least one selected token, and at most `unit_tokens`.
    low = pool["hit_tokens"] if own else units
    high = min(pool["hit_tokens"], units * rules.unit_tokens)
    require_range(f"{where}.bytes_useful", pool["bytes_useful"], low * latent, high * latent)


def _possible_units(pool: Record, selected: Selected, rules: TierRules) -> tuple[int, int]:
    """The fewest and the most units that hold the tier's hit tokens."""
    fewest, most = -(-pool["hit_tokens"] // rules.unit_tokens), pool["hit_tokens"]
    if not rules.by_row and rules.unit_tokens % selected.block_size == 0:  # a block lies within a unit
        blocks_a_unit = rules.unit_tokens // selected.block_size
        fewest, most = max(fewest, -(-pool["hit_blocks"] // blocks_a_unit)), min(most, pool["hit_blocks"])
    touched = selected.num_units(rules.unit_tokens)
    if touched is not None:
        most = min(most, touched)
    return fewest, most


class BatchTimes:
    """A layer's batch of reads takes one time, which all requests of the forward record."""

    def __init__(self) -> None:
        self._forward_idx: int | None = None
        self._seen: dict[int, tuple[int, list[float]]] = {}  # layer -> line, time of each tier

    def add(self, line: int, record: Record) -> None:
        """Takes the records in the order of the file."""
        if record["kv_fetch"] is None:
            return
        if record["forward_idx"] != self._forward_idx:
            self._forward_idx, self._seen = record["forward_idx"], {}
        times = [record["kv_fetch"][name]["latency_us"] for name in TIER_NAMES]
        first, known = self._seen.setdefault(record["layer_id"], (line, times))
        for name, stored, other in zip(TIER_NAMES, times, known, strict=True):
            if stored != other:
                what = f"stored {stored}, {other} in the same forward and layer, line {first}"
                raise Mismatch(f"kv_fetch.{name}.latency_us", what)


_BYTES = ("bytes_read", "bytes_written")
_POOLS = TIER_NAMES[1:]
_AS_MANIFEST = "as the manifest says what there is"
_FIELDS = {field.name: field for field in next(f for f in SUMMARY_FIELDS if f.name == "tiers").children}


class TierTotals:
    """Bytes in the records from forward `since_forward` on, by pool."""

    def __init__(self, rules: Rules, since_forward: int) -> None:
        self._since_forward = since_forward
        pools = [pool for pool in _POOLS if rules.tiers is not None and pool in rules.tiers.kinds]
        self.moved = {pool: dict.fromkeys(_BYTES, 0) for pool in pools}

    def add(self, record: Record) -> None:
        if record["forward_idx"] >= self._since_forward:
            for pool, totals in self.moved.items():
                for name in _BYTES:
                    totals[name] += record["kv_fetch"][pool][name]

    def merge(self, later: TierTotals) -> None:
        for pool, totals in later.moved.items():
            for name, count in totals.items():
                self.moved[pool][name] += count


def check_tier_totals(
    said: Record | None, rules: Rules, records: TierTotals, requests: PlainRequests, whole: bool
) -> str | None:
    """Raises `Mismatch`; returns what could not be compared. `said` follows the schema.

    `whole`: no step was lost, so the records are those that the engine counted.
    """
    if rules.tiers is None:
        require(said is None, "tiers", said, "but the manifest has none")
        return None
    if said is None:
        return "tiers: the run did not say what their stores did"
    last_part = max(rules.resumed_at_forward, default=0)
    if whole:
        compare(said["since_forward"], last_part, "tiers.since_forward")
    for name, field in _FIELDS.items():
        if name in said:  # an older run has not all
            _check_counts(said[name], field, f"tiers.{name}")
    if "selected_units" in said:
        _check_asked(said["selected_units"], "tiers.selected_units")
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
            _check_pool_totals(pool, f"tiers.{name}", rules.tiers.unit_bytes)
            compare(pool["latency_kind"], rules.tiers.kinds[name], f"tiers.{name}.latency_kind")
            for moved in _BYTES if whole else ():
                path = f"tiers.{name}.{moved}.in_records"
                compare(pool[moved]["in_records"], records.moved[name][moved], path)
    return None if whole else "tiers: steps were lost, so what the records hold is not all that was counted"


def _check_counts(value: Any, field: Field, path: str) -> None:
    """No count and no time is below 0."""
    for inner in field.children if value is not None else ():
        if inner.optional and inner.name not in value:
            continue
        _check_counts(value[inner.name], inner, f"{path}.{inner.name}")
    if isinstance(value, (int, float)):
        require(value >= 0, path, value, "below 0")


def _check_asked(tier: Record, path: str) -> None:
    asked = tier["hit_units"] + tier["missed_units"]
    rule = f"but {tier['hit_units']} hit and {tier['missed_units']} missed"
    require(tier["requested_units"] == asked, f"{path}.requested_units", tier["requested_units"], rule)


def _check_pool_totals(pool: Record, path: str, unit_bytes: int) -> None:
    """A pool's counts add up: every unit is hit or missed, every byte is counted somewhere."""
    _check_asked(pool, path)
    for name, units in (("bytes_read", "hit_units"), ("bytes_written", "stored_units")):
        moved = pool[name]
        compare(moved["store"], pool[units] * unit_bytes, f"{path}.{name}.store")
        counted = moved["in_records"] + moved["elsewhere"]
        rule = f"but {counted} in records and elsewhere"
        require(moved["store"] == counted, f"{path}.{name}.store", moved["store"], rule)
    require(pool["timeouts"] <= pool["errors"], f"{path}.timeouts", pool["timeouts"], "more than errors")
    skipped = pool.get("skipped_batches", 0)
    rule = "more than the errors that did not time out"
    require(skipped <= pool["errors"] - pool["timeouts"], f"{path}.skipped_batches", skipped, rule)
    units = sum(pool[name]["store"] for name in _BYTES)
    rule = f"less than the {units} of the units"
    require(pool["bytes_moved"] >= units, f"{path}.bytes_moved", pool["bytes_moved"], rule)


def _check_losses(said: Record, requests: PlainRequests) -> None:
    """Of a resumed run requests.jsonl counts all parts, `tiers` only the last."""
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
