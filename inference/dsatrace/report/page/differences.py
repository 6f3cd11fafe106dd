"""What differs between runs: their settings where those are not the same, and their figures with differences.

Knows manifests, summaries and replays; computes differences only.

    section = differences(materials, ["A first", "B second"], command)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...text import plain
from ...units import size_text
from ..grid import Cell, number, percent
from .material import Material, Record
from .section import Row, Section, table_html

TITLE = "What differs?"
_SETTINGS = (
    "model_config_digest", "selections", "data_source", "tokenizer", "chat", "device", "world_size", "seed",
    "prefix_source", "tool_version", "cache_layout",
)  # fmt: skip
Figure = tuple[str, list[float | None], str]
"""A name, a value per run, and how it is read: share, count, bytes, or a format."""


def differences(materials: Sequence[Material], names: Sequence[str], command: str) -> Section:
    known = (figure for figure in _figures(materials) if any(value is not None for value in figure[1]))
    rows = [_row(*figure) for figure in known]
    columns = ["figure", *names, *(f"{name[:1]} - A" for name in names[1:])]
    settings = list(_settings(materials))
    body = ""
    if settings:
        body = table_html((["setting", *names], settings), "Settings that are not the same")
    note = (
        "Each figure is the run's own, over its own records; a difference in points is of percentages. "
        + ("" if settings else "All settings that the page knows are the same. ")
        + "The runs need not have the same prompts: a difference may be theirs."
    )
    return Section("differences", TITLE, body, note, command, (columns, rows), is_open=True)


def _row(name: str, values: Sequence[float | None], form: str) -> Row:
    first = values[0]
    return name, *(_shown(value, form) for value in values), *(_apart(first, one, form) for one in values[1:])


def _shown(value: float | None, form: str) -> Cell:
    if value is None:
        return number(None)
    if form == "share":
        return percent(value)
    return Cell(size_text(value), value) if form == "bytes" else number(value, form)


def _apart(first: float | None, other: float | None, form: str) -> Cell:
    if first is None or other is None:
        return number(None)
    apart = other - first
    if form == "share":
        return Cell(f"{100 * apart:+.1f} points", apart)
    relative = f" ({apart / first:+.1%})" if first and apart else ""
    if form == "bytes":
        return Cell(f"{'-' if apart < 0 else '+'}{size_text(abs(apart))}{relative}", apart)
    return Cell(f"{apart:+{form}}{relative}" if apart else "0", apart)


def _settings(materials: Sequence[Material]) -> Iterator[Row]:
    """Only those that are not the same in all runs."""
    columns: dict[str, list[Any]] = {}
    for material in materials:
        for name, value in _settings_of(material.manifest).items():
            columns.setdefault(name, []).append(value)
    for name, values in columns.items():
        if len({f"{value}" for value in values}) > 1:
            yield name.replace("_", " "), *(plain(value, 200) for value in values)


def _settings_of(manifest: Record) -> dict[str, Any]:
    tiers, trace = manifest.get("tiers"), manifest["trace"]
    return {
        **{name: manifest.get(name) for name in _SETTINGS},
        "door": (manifest.get("selection") or {}).get("door"),
        **{
            f"trace {name}": trace.get(name)
            for name in ("level", "block_size_tokens", "sample_rate", "prefill")
        },
        "serving": manifest.get("serving"),
        "tiers": "all in HBM" if tiers is None else tiers,
    }


def _figures(materials: Sequence[Material]) -> Iterator[Figure]:
    summaries = [material.summary for material in materials]

    def each(name: str, path: Sequence[str], form: str) -> Figure:
        return name, [_at(summary, path) for summary in summaries], form

    for name in ("requests", "steps", "records", "sparse_records"):
        yield each(name.replace("_", " "), ("counts", name), ",d")
    yield from _misses(materials)
    shares = (
        ("selected in the step before", ("step_overlap", "mean")),
        ("chance of that (k / N)", ("step_overlap", "random_mean")),
        ("selected in the layer before", ("layer_overlap", "mean")),
        ("of the answer's tokens, selected", ("needle_recall", "mean")),
        ("touched blocks in a shared prefix", ("prefix_intersection_ratio", "mean")),
    )
    for name, path in shares:
        yield each(name, path, "share")
    yield from _blocks(summaries)
    yield "selected tokens found in HBM", [_in_hbm(summary) for summary in summaries], "share"
    yield each("latents read", ("bytes_read", "without_indexer_scan"), "bytes")
    yield each("offset, median (tokens)", ("offsets", "p50"), ",d")
    for label, key in (
        ("latency, median (ms)", "latency_ms"),
        ("first token, median (ms)", "time_to_first_token_ms"),
    ):
        yield each(label, ("serving", key, "p50"), ",.1f")


def _at(record: Any, path: Sequence[str]) -> float | None:
    for name in path:
        record = record.get(name) if record else None
    value: float | None = record
    return value


def _misses(materials: Sequence[Material]) -> Iterator[Figure]:
    """LRU and OPT at the sizes that all runs were replayed at."""
    policies = [(m.replay or {}).get("overall", {}).get("policies", {}) for m in materials]
    for policy, label in (("lru", "LRU"), ("opt", "OPT")):
        cells = [found.get(policy, {}) for found in policies]
        for size in cells[0] or next(filter(None, cells), {}):
            yield (
                f"{label} misses at {size}",
                [(of.get(size) or {}).get("miss_rate") for of in cells],
                "share",
            )


def _blocks(summaries: Sequence[Record]) -> Iterator[Figure]:
    touched = [{row["block_size_tokens"]: row for row in summary["blocks_touched"]} for summary in summaries]
    for size in touched[0]:
        rows = [of.get(size) for of in touched]
        shares = [
            row["mean"] / row["context_mean"] if row and row["mean"] is not None else None for row in rows
        ]
        yield f"blocks of {size} touched, of the context's", shares, "share"


def _in_hbm(summary: Record) -> float | None:
    fetch = summary["kv_fetch"]
    if not fetch or "hit_tokens" not in fetch["hbm"]:
        return None
    total = sum(one["hit_tokens"] for one in fetch.values())
    found: float | None = fetch["hbm"]["hit_tokens"] / total if total else None
    return found
