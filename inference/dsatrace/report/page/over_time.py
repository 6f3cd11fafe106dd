"""Requests over time, where they arrive one after the other: arrivals, finishes, and how long they waited.

Knows the summary alone.

    section = requests_over_time(material)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...text import plain
from ..grid import number
from ..workload_tables import DURATIONS
from .material import Material, Record
from .section import LeftOut, Row, Section, table_html, told
from .svg import Axis, Series, line_chart

TITLE = "How were the requests served over time?"
_CURVES = (("admission", "queue_us"), ("first token", "time_to_first_token_us"), ("finish", "latency_us"))
_STATISTICS = ("p50", "p95", "p99", "max", "mean")
_MOST_POINTS = 240
"""Of a curve."""


def requests_over_time(material: Material) -> Section | LeftOut:
    serving = material.summary.get("serving")
    if not serving:
        kind = material.kind
        why = "its requests did not arrive over time; they were all there at the start"
        return LeftOut(TITLE, f"door {kind.door} tells no times" if "timing" in kind.missing else why)
    buckets = serving["requests_over_time"]
    counts = ", ".join(f"{count:,} {name}" for name, count in serving["counts"].items())
    said = f"{plain(serving['mode'])} serving: {counts}."
    if serving["span_s"]:
        said += (
            f" From the first arrival to the last finish {serving['span_s']:,.1f} s: "
            f"{serving['requests_per_s']:,.2f} requests/s, {serving['output_tokens_per_s']:,.1f} output "
            "tokens/s."
        )
    clock = plain(serving["clock"])
    body = f'<p class="answer">{told(said)}</p>'
    body += _arrivals(buckets, said) if buckets else ""
    body += _waits(material.summary["histograms"], clock)
    rows = [
        (name, *(number(serving[key][one], ",.1f", none="none") for one in _STATISTICS))
        for name, key in DURATIONS
    ]
    body += table_html((("ms", *_STATISTICS), rows), f"Times of the {clock} clock, ms", "served")
    note = (
        f"Times are of the {clock} clock, of served requests, from a request's arrival; percentiles by "
        "nearest rank. A bucket counts what arrives and what finishes in it; in flight: arrived and not yet "
        "finished at its end, so requests that never finish stay."
    )
    columns = ("from s", "arrived", "finished", "in flight")
    return Section(
        "requests",
        TITLE,
        body,
        note,
        material.command("report", "--no-figure"),
        (columns, list(_rows(buckets))),
    )


def in_flight(buckets: Sequence[Record]) -> list[int]:
    """Requests that have arrived and not finished, at the end of each bucket."""
    requests: list[int] = np.cumsum([bucket["arrived"] - bucket["finished"] for bucket in buckets]).tolist()
    return requests


def _rows(buckets: Sequence[Record]) -> Iterator[Row]:
    for bucket, there in zip(buckets, in_flight(buckets), strict=True):
        yield tuple(
            number(value) for value in (*(bucket[key] for key in ("start_s", "arrived", "finished")), there)
        )


def _arrivals(buckets: Sequence[Record], said: str) -> str:
    starts = [bucket["start_s"] for bucket in buckets]
    wide = starts[1] - starts[0] if len(starts) > 1 else 1
    end = starts[-1] + wide
    columns: Mapping[str, list[int]] = {
        "arrived": [bucket["arrived"] for bucket in buckets],
        "finished": [bucket["finished"] for bucket in buckets],
        "in flight at its end": in_flight(buckets),
    }
    edges = [edge for start in starts for edge in (start, start + wide)]
    series = [
        Series(name, edges, np.repeat(values, 2).tolist(), style)
        for style, (name, values) in enumerate(columns.items())
    ]
    most = max(max(values) for values in columns.values())
    return line_chart(
        "Requests over time", said, Axis("s from the run's start", starts[0], end),
        Axis(f"requests, in {wide} s", 0, max(1.06 * most, 1), whole=True), series,
    )  # fmt: skip


def _waits(histograms: Mapping[str, Record], clock: str) -> str:
    series = []
    for style, (name, key) in enumerate(_CURVES):
        stored = histograms.get(key) or {"values": [], "counts": []}
        if stored["values"]:
            xs, ys = cdf_of(stored)
            series.append(Series(name, xs, ys, style))
    if not series:
        return ""
    low = min(one.xs[0] for one in series)
    high = max(one.xs[-1] for one in series)
    desc = "; ".join(f"{one.name}: at most {one.xs[-1]:,.1f} ms" for one in series)
    return "<h3>From a request's arrival to ...</h3>" + line_chart(
        "From a request's arrival to its admission, first token and finish", desc,
        Axis(f"ms, {clock} clock", low, high, log=True),
        Axis("served requests within that", 0, 1, share=True), series,
    )  # fmt: skip


def cdf_of(stored: Record) -> tuple[list[float], list[float]]:
    """Upper ends in ms, 0.1 at least since the axis is logarithmic, and the share within."""
    share = np.cumsum(stored["counts"]) / np.sum(stored["counts"])
    kept = np.unique(np.linspace(0, len(share) - 1, min(len(share), _MOST_POINTS)).round().astype(int))
    return np.maximum(np.array(stored["values"], float)[kept] / 1e3, 0.1).tolist(), share[kept].tolist()
