"""Where the selected KV was, of a run whose latents lay in several tiers: what each served and moved.

Knows a run's manifest and summary; computes nothing but shares and means of what is in them.

for part in tier_tables(run.manifest, summary): console.print(part)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from ..schema import TIER_NAMES
from .workload_tables import new_table

Record = Mapping[str, Any]
TIER_TITLES = {"hbm": "HBM", "local_pool": "local pool", "remote_pool": "remote pool"}


def tier_tables(manifest: Record, summary: Record) -> Iterator[RenderableType]:
    """Nothing for a run that had everything in HBM."""
    setup = manifest.get("tiers")
    if setup is None:
        return
    yield _served(setup, summary)
    if said := summary.get("tiers"):
        yield _stores(said)


def tiers_of(setup: Record) -> list[str]:
    """The tiers that the manifest's `tiers`, or the summary's, has; nearest first."""
    return [name for name in TIER_NAMES if setup[name] is not None]


def _served(setup: Record, summary: Record) -> Table:
    """Shares are of all selected tokens and touched blocks, so each column adds up."""
    said = summary.get("tiers") or {}
    there = tiers_of(setup)
    table = new_table(
        "Where the selected KV was (recorded steps)", "", *(TIER_TITLES[name] for name in there)
    )
    fetched = [summary["kv_fetch"][name] for name in there]
    tokens, blocks = (sum(one[name] for one in fetched) for name in ("hit_tokens", "hit_blocks"))
    rows = (
        ("selected tokens", [_share(one["hit_tokens"], tokens) for one in fetched]),
        ("touched blocks", [_share(one["hit_blocks"], blocks) for one in fetched]),
        ("read", [_mb(one["bytes_read"]) for one in fetched]),
        ("read / useful (amplification)", [_amplification(one) for one in fetched]),
        ("reads", [f"{one['read_ops']:,}" for one in fetched]),
        ("a batch of them took (mean)", [_mean_us(said.get(name)) for name in there]),
        ("written", [_mb(one["bytes_written"]) for one in fetched]),
        (f"{setup['granularity']}s evicted", [f"{one['evicted_units']:,}" for one in fetched]),
        ("errors", [f"{one['errors']:,}" for one in fetched]),
    )
    for name, cells in rows:
        table.add_row(name, *cells)
    table.caption, table.caption_justify = _setup(setup), "left"
    return table


def _stores(said: Record) -> Table:
    """What the stores counted themselves, for steps without a record too."""
    pools = {name: said[name] for name in TIER_NAMES[1:] if said[name] is not None}
    since = f", since forward {said['since_forward']}" if said["since_forward"] else ""
    title = f"What the pools did (whole run{since})"
    table = new_table(title, "", *(TIER_TITLES[name] for name in pools))
    rows = (
        ("batches of reads", [f"{pool['read_batches']:,}" for pool in pools.values()]),
        ("read, for recorded steps", [_mb(pool["bytes_read"]["in_records"]) for pool in pools.values()]),
        ("read, for anything else", [_mb(pool["bytes_read"]["elsewhere"]) for pool in pools.values()]),
        ("written", [_mb(pool["bytes_written"]["store"]) for pool in pools.values()]),
        ("units not found", [f"{pool['missed_units']:,}" for pool in pools.values()]),
        ("errors", [f"{pool['errors']:,}" for pool in pools.values()]),
    )
    for name, cells in rows:
        table.add_row(name, *cells)
    counted = (
        ("units lost", "lost_units"),
        ("requests computed again", "num_recomputes"),
        ("requests failed", "failed_requests"),
    )
    notes = [f"{name}: {said[key]}" for name, key in counted if said[key]]
    prefetch = said["prefetch"]
    if prefetch is not None and prefetch["precision"] is not None:
        brought = f"{prefetch['units']:,} units, {prefetch['precision']:.1%} of them selected"
        notes.append(f"prefetch: {brought}, which were {prefetch['recall'] or 0:.1%} of what HBM lacked")
    for name, index in (said["index_keys"] or {}).items():
        if index is not None:
            read, written = _mb(index["bytes_read"]), _mb(index["bytes_written"])
            notes.append(f"indexer keys: {read} from the {TIER_TITLES[name]}, {written} to it")
    if notes:
        table.caption, table.caption_justify = ", ".join(notes), "left"
    return table


def _setup(setup: Record) -> str:
    """One line: how much HBM holds, what moves, and where the rest lies."""
    moved = "rows" if setup["granularity"] == "row" else f"blocks of {setup['unit_tokens']} tokens"
    pools = [
        f"{TIER_TITLES[name]} {setup[name]['store']}" for name in TIER_NAMES[1:] if setup[name] is not None
    ]
    return f"{setup['hbm']['blocks']} blocks a layer in HBM ({setup['policy']}), {moved}; {', '.join(pools)}"


def _mean_us(pool: Record | None) -> str:
    """Of all the run's batches; a time says how it was had. HBM is read where it lies."""
    if pool is None or not pool["read_batches"]:
        return "none"
    return f"{pool['read_us'] / pool['read_batches']:,.1f} us, {pool['latency_kind']}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _amplification(fetched: Record) -> str:
    useful = fetched["bytes_useful"]
    return f"{fetched['bytes_read'] / useful:.2f}x" if useful else "none"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"
