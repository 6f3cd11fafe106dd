"""Where the KV was found that a run's steps selected, and apart from that what was moved, in MiB.

Knows the manifest and the summary; computes only shares and sums of what is in them.

    section = kv_found_and_moved(material)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...units import size_text
from ..grid import Cell, number, percent, size
from ..tier_tables import TIER_TITLES, tiers_of
from .material import Material, Record
from .section import LeftOut, Row, Section, told
from .stacked import Part, Stack, amounts, stacked

TITLE = "Where was the KV, and how many bytes did the steps read?"
_FOUND = (("selected tokens", "hit_tokens"), ("touched blocks", "hit_blocks"))
_MOVED = (("read", "bytes_read"), ("of that, selected", "bytes_useful"), ("written", "bytes_written"))


def kv_found_and_moved(material: Material) -> Section | LeftOut:
    summary = material.summary
    if not summary["counts"]["records"]:
        return LeftOut(TITLE, "no step was recorded")
    read, fetch, setup = summary["bytes_read"], summary["kv_fetch"], material.manifest.get("tiers")
    amount = [
        (name, count) for name, count in _bytes(read, fetch, in_tiers=setup is not None) if count is not None
    ]
    if not amount:
        return LeftOut(TITLE, "the records tell of no bytes")
    body, rows = "", list[Row]()
    if setup is not None:
        body += _tiers(setup, fetch)
        rows += _tier_rows(setup, fetch)
    title = "Bytes read, all records"
    desc = "; ".join(f"{name}: {size_text(count)}" for name, count in amount)
    stacks = [Stack(name, [Part("", count, size_text(count))]) for name, count in amount]
    body += f"<h3>{told(title)}</h3>{amounts(title, desc, stacks)}"
    rows += [("all", name, size(count), number(count)) for name, count in amount]
    columns = ("tier", "what", "as people read it", "count or bytes")
    return Section(
        "bytes",
        TITLE,
        body,
        _note(material, setup),
        material.command("report", "--no-figure"),
        (columns, rows),
    )


def _bytes(read: Record, fetch: Record | None, in_tiers: bool) -> Iterator[tuple[str, int | None]]:
    if fetch is not None:
        yield "latents of the selected tokens alone", sum(one["bytes_useful"] for one in fetch.values())
    yield (
        ("latents read, all tiers" if in_tiers else "latents of the touched blocks"),
        read["without_indexer_scan"],
    )
    yield "indexer keys (it scans every token)", read["indexer_scan"]
    yield "latents and indexer keys together", read["with_indexer_scan"]


def _tiers(setup: Record, fetch: Record) -> str:
    names = tiers_of(setup)
    found = []
    for label, key in _FOUND:
        total = sum(fetch[name][key] for name in names)
        parts = [
            Part(
                TIER_TITLES[name],
                fetch[name][key],
                f"{percent(fetch[name][key], total)} ({fetch[name][key]:,})",
            )
            for name in names
        ]
        found.append(Stack(label, parts))
    moved = [
        Stack(
            TIER_TITLES[name],
            [Part(label, fetch[name][key], size_text(fetch[name][key])) for label, key in _MOVED],
        )
        for name in names
    ]
    return (
        "<h3>Found: where a step's selection lay</h3>"
        + stacked("Where the selected KV was found", _said(found), found)
        + "<h3>Moved: what that took</h3>"
        + amounts("Bytes read from and written to each tier", _said(moved), moved)
    )


def _said(stacks: Sequence[Stack]) -> str:
    return "; ".join(
        f"{stack.label}: {', '.join(f'{part.name} {part.text}' for part in stack.parts)}" for stack in stacks
    )


def _tier_rows(setup: Record, fetch: Record) -> Iterator[Row]:
    for name in tiers_of(setup):
        one = fetch[name]
        for label, key in _FOUND:
            total = sum(fetch[other][key] for other in tiers_of(setup))
            yield TIER_TITLES[name], f"{label} found", percent(one[key], total), number(one[key])
        for label, key in _MOVED:
            yield TIER_TITLES[name], f"{label}, bytes", size(one[key]), number(one[key])
        for label, key in (("reads", "read_ops"), (f"{setup['granularity']}s evicted", "evicted_units")):
            yield TIER_TITLES[name], label, number(one[key], ","), number(one[key])
        useful = one["bytes_useful"]
        times = one["bytes_read"] / useful if useful else None
        yield TIER_TITLES[name], "read / selected", number(times, ".2f", "x", none="none"), Cell("", times)


def _note(material: Material, setup: Record | None) -> str:
    counts = material.summary["counts"]
    note = f"Counted over all {counts['records']:,} records, prompt rows included."
    if setup is None:
        return (
            f"{note} Everything lay in HBM, so nothing was moved: bytes are the latents of the blocks that a "
            "step touches, per layer, and the indexer's keys."
        )
    what = (
        "a token of a layer" if setup["granularity"] == "row" else f"a block of {setup['unit_tokens']} tokens"
    )
    kinds = sorted({setup[name]["latency_kind"] for name in tiers_of(setup) if name != "hbm"})
    return (
        f"{note} Found: the tier that held a selected token when it was selected; a touched block counts for "
        f"the furthest tier that one of its selected tokens came from. Moved: {what} moves as one, so more "
        "is read than is selected; written into HBM is what was fetched. HBM keeps "
        f"{setup['hbm']['blocks']:,} blocks per layer ({setup['policy']}); times of the pools are "
        f"{' and '.join(kinds)}."
    )
