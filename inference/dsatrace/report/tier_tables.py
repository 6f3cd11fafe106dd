"""Where the selected KV was, if the latents lay in several tiers: what each tier served and moved.

Knows the run's manifest and summary; computes only shares and means of what is in them.

for grid in tier_tables(run.manifest, summary): console.print(grid)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..schema import TIER_NAMES
from ..trace.rates import RATES, run_words, unit_words
from ..units import size_text
from .grid import Cell, Grid, number, percent, size

Record = Mapping[str, Any]
TIER_TITLES = {"hbm": "HBM", "local_pool": "local pool", "remote_pool": "remote pool"}


def tier_tables(manifest: Record, summary: Record) -> Iterator[Grid]:
    """Nothing for a run that had everything in HBM."""
    if manifest.get("tiers") is None:
        return
    yield _served(manifest, summary)
    if summary.get("tiers"):
        yield _stores(manifest, summary)


def tiers_of(setup: Record) -> list[str]:
    """The tiers in the manifest's or the summary's `tiers`, nearest first."""
    return [name for name in TIER_NAMES if setup[name] is not None]


def _served(manifest: Record, summary: Record) -> Grid:
    """Shares are of all selected tokens and of all touched blocks, so each row adds up to 100 %."""
    setup = manifest["tiers"]
    stores = summary.get("tiers") or {}
    names = tiers_of(setup)
    fetched = [summary["kv_fetch"][name] for name in names]
    tokens, blocks = (sum(one[name] for one in fetched) for name in ("hit_tokens", "hit_blocks"))
    words = run_words(manifest)
    rows = (
        (RATES["tokens"].of, *(percent(one["hit_tokens"], tokens) for one in fetched)),
        (RATES["blocks"].of.format(**words), *(percent(one["hit_blocks"], blocks) for one in fetched)),
        ("read", *(size(one["bytes_read"]) for one in fetched)),
        ("read / useful (amplification)", *map(_amplification, fetched)),
        ("reads", *(number(one["read_ops"], ",") for one in fetched)),
        ("a batch of them took (mean)", *(_mean_us(stores.get(name)) for name in names)),
        ("written", *(size(one["bytes_written"]) for one in fetched)),
        (f"{setup['granularity']}s evicted", *(number(one["evicted_units"], ",") for one in fetched)),
        ("errors", *(number(one["errors"], ",") for one in fetched)),
    )
    columns = ("", *(TIER_TITLES[name] for name in names))
    return Grid(f"Where the selected KV was ({words['recorded']})", columns, rows, note=_setup_text(setup))


def _stores(manifest: Record, summary: Record) -> Grid:
    """What the stores counted themselves, including steps without a record."""
    stores = summary["tiers"]
    names = [name for name in TIER_NAMES[1:] if stores[name] is not None]
    pools = [stores[name] for name in names]
    rows = (
        ("batches of reads", *(number(pool["read_batches"], ",") for pool in pools)),
        ("read, for recorded steps", *(size(pool["bytes_read"]["in_records"]) for pool in pools)),
        ("read, for anything else", *(size(pool["bytes_read"]["elsewhere"]) for pool in pools)),
        ("written", *(size(pool["bytes_written"]["store"]) for pool in pools)),
        ("units not found", *(number(pool["missed_units"], ",") for pool in pools)),
        ("errors", *(number(pool["errors"], ",") for pool in pools)),
    )
    since = f", since forward {stores['since_forward']}" if stores["since_forward"] else ""
    columns = ("", *(TIER_TITLES[name] for name in names))
    return Grid(
        f"What the pools did (whole run{since})", columns, rows, note=", ".join(_notes(manifest, summary))
    )


def _notes(manifest: Record, summary: Record) -> Iterator[str]:
    """What has no column per pool: what HBM held, losses, prefetch, and the indexer's keys."""
    stores, rate = summary["tiers"], RATES["units"]
    if counts := rate.counts(summary):
        yield f"{percent(*counts)} of the {rate.name(run_words(manifest))}"
    losses = (
        ("units lost", "lost_units"),
        ("requests computed again", "num_recomputes"),
        ("requests failed", "failed_requests"),
    )
    yield from (f"{name}: {stores[key]}" for name, key in losses if stores[key])
    prefetch = stores["prefetch"]
    if prefetch is not None and prefetch["precision"] is not None:
        fetched = f"{prefetch['units']:,} units, {prefetch['precision']:.1%} of them selected"
        yield f"prefetch: {fetched}, which were {prefetch['recall'] or 0:.1%} of what HBM lacked"
    for name, index in (stores["index_keys"] or {}).items():
        if index is not None:
            read, written = size_text(index["bytes_read"]), size_text(index["bytes_written"])
            yield f"indexer keys: {read} from the {TIER_TITLES[name]}, {written} to it"


def _setup_text(setup: Record) -> str:
    """One line: how much HBM holds, the unit that moves, and where the rest lies."""
    unit = unit_words(setup["unit_tokens"])
    pools = [f"{TIER_TITLES[name]} {setup[name]['store']}" for name in tiers_of(setup) if name != "hbm"]
    return f"{setup['hbm']['blocks']} blocks per layer in HBM ({setup['policy']}), {unit}; {', '.join(pools)}"


def _mean_us(pool: Record | None) -> Cell:
    """Mean of all the run's batches, and how the time was had; `none` for HBM, which reads in place."""
    if pool is None or not pool["read_batches"]:
        return number(None, none="none")
    return number(pool["read_us"] / pool["read_batches"], ",.1f", f" us, {pool['latency_kind']}")


def _amplification(fetched: Record) -> Cell:
    useful = fetched["bytes_useful"]
    return number(fetched["bytes_read"] / useful if useful else None, ".2f", "x", none="none")
