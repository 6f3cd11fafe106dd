"""How large a buffer must be: what LRU misses at every size, beside the optimum, other policies and nulls."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence

from ...selection_replay.figures import MIN_REQUESTS
from ..grid import Cell, number, percent
from ..published import Figure, lru_points
from ..replay_tables import NULL_TITLES, past_answers, shared_prefixes
from .material import Material, Record
from .section import LeftOut, Row, Section, figures_html
from .svg import Axis, Series, known_points, line_chart

TITLE = "How large must the buffer be?"
MAX_POINTS = 128
"""Of a drawn curve."""
NAMES = {"lru": "LRU", "opt": "OPT, the least that any policy misses", "fifo": "FIFO", "sglang": "SGLang"}
"""Of policies that are not written as they are named."""
STARTS = {
    "first-set": "a buffer begins with the first step's set, which is not counted",
    "empty": "a buffer begins empty",
    "first-b": "a buffer begins with the first ids of the context",
    "prefill": "a buffer begins with what the prompt's last rows leave in it",
}
Points = tuple[list[float], list[float]]


def miss_curve(material: Material) -> Section | LeftOut:
    record = material.replay
    if record is None:
        return LeftOut(TITLE, material.no_replay)
    overall, ids = record["overall"], material.ids
    context = overall["contexts"]["p100"] or 0
    curves = on_one_grid(overall["curves"], context)
    series = list(_series(overall, curves))
    sizes = [size for one in series for size in one.xs]
    if not sizes:
        return LeftOut(TITLE, "no step counts")
    published = _published(record, max(sizes))
    for style, (model, points) in enumerate(published.items(), 5):
        xs, ys = [size for size, _ in points], [figure.low for _, figure in points]
        series.append(Series(f"published: {model}, LRU", xs, ys, style, line=False))
    chart = line_chart(
        TITLE,
        _said(overall),
        Axis(f"buffer {material.per}, {ids}", min(sizes), max(sizes), log=True),
        Axis(f"missed, share of the selected {ids}", 0, 1, share=True),
        series,
        list(_lines_at(record)),
    )
    body = figures_html(sizes_that_serve(material, record)) + chart
    table = _table(overall, curves, [point for points in published.values() for point in points])
    note = _note(record, [figure for points in published.values() for _, figure in points])
    return Section("curve", TITLE, body, note, material.replay_command, table)


def on_one_grid(curves: Mapping[str, Mapping[str, Sequence[float]]], context: float) -> dict[str, Points]:
    """LRU's curves as (sizes, miss rates), at most about MAX_POINTS of the sizes of all, the same for each.

    Up to the context, where that is more. Between two of its sizes, and above them, a curve is flat, so
    nothing is estimated; it begins where a step fits in.
    """
    sizes = sorted({size for curve in curves.values() for size in curve["sizes"]})
    if sizes and context > sizes[-1]:
        sizes.append(context)
    if len(sizes) > MAX_POINTS:
        step = math.log(sizes[-1] / sizes[0]) / MAX_POINTS
        kept = [sizes[0]]
        for size in sizes[1:-1]:
            if math.log(size / kept[-1]) >= step:
                kept.append(size)
        sizes = [*kept, sizes[-1]]
    found = {}
    for name, curve in curves.items():
        if curve["sizes"]:
            own = [size for size in sizes if size >= curve["sizes"][0]]
            places = (bisect.bisect_right(curve["sizes"], size) - 1 for size in own)
            found[name] = own, [curve["miss_rate"][place] for place in places]
    return found


def _series(overall: Record, curves: Mapping[str, Points]) -> Iterator[Series]:
    if "run" in curves:
        yield Series(NAMES["lru"], *curves["run"])
    others = [name for name in ("opt", *overall["policies"]) if name in overall["policies"] and name != "lru"]
    for style, name in enumerate(dict.fromkeys(others), 1):
        cells = [cell for cell in overall["policies"][name].values() if cell["miss_rate"] is not None]
        cells.sort(key=lambda cell: cell["ids"])
        sizes, rates = known_points((cell["ids"] for cell in cells), (cell["miss_rate"] for cell in cells))
        yield Series(NAMES.get(name, name), sizes, rates, style, marked=True)
    for style, (null, title) in enumerate(NULL_TITLES.items(), 3):
        if null in curves:
            whose = "its" if null == "shuffled" else "a"
            yield Series(f"LRU on {whose} {title}", *curves[null], style, null=True)


def _lines_at(record: Record) -> Iterator[tuple[float, str]]:
    """The context, and multiples of top-k where it is one number of the replayed ids."""
    if context := record["overall"]["contexts"]["p100"]:
        yield context, "N"
    if top_k := _top_k(record):
        yield from ((top_k * times, "k" if times == 1 else f"{times}k") for times in (1, 2, 4, 8, 16, 32))


def _top_k(record: Record) -> int | None:
    """In replayed ids per buffer, where it is one number."""
    own_ids, own_buffers = record["settings"]["block"] is None, record["settings"]["share"] == "none"
    return record["top_k"][0] if own_ids and own_buffers and len(set(record["top_k"])) == 1 else None


def _published(record: Record, largest: float) -> dict[str, list[tuple[float, Figure]]]:
    """By model, what others found LRU to miss, at as many times top-k; only beside a model's own choice."""
    top_k = _top_k(record)
    if top_k is None or record["unit"] == "expert" or record["selections"] != "model":
        return {}
    found = {
        model: [(figure.buffer_k * top_k, figure) for figure in figures if figure.buffer_k is not None]
        for model, figures in lru_points().items()
    }
    inside = {model: [point for point in points if point[0] <= largest] for model, points in found.items()}
    return {model: points for model, points in inside.items() if points}


def sizes_that_serve(material: Material, record: Record) -> list[str | Cell]:
    """The sizes that serve most reads, and what no buffer serves; texts and numbers in turn."""
    overall = record["overall"]
    served = {share: size for share, size in overall["served"]["run"].items() if size is not None}
    not_served = [share for share in overall["served"]["run"] if share not in served]
    said: list[str | Cell] = []
    for i, (share, size) in enumerate(served.items()):
        said += [", " if i else "LRU serves ", f"{share} of the reads from ", number(size, ",")]
    if served:
        said.append(f" {material.ids} {material.per} on")
    if not_served:
        said.append(f"{'; none' if served else 'No LRU buffer'} serves {_listed(not_served)}")
    said.append(". ")
    if (never := overall["reuse"]["never_selected_before"]) is not None:
        said += [percent(never), " of the reads are first ones, which no buffer holds."]
    return said


def _listed(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _said(overall: Record) -> str:
    """The figure in words."""
    cells = overall["policies"].get("lru", {}).values()
    rates = [
        f"{cell['miss_rate']:.1%} at {cell['ids']:,.0f}" for cell in cells if cell["miss_rate"] is not None
    ]
    return f"Miss rate by buffer size. LRU misses {', '.join(rates) or 'nothing'}."


def _note(record: Record, published: Sequence[Figure]) -> str:
    overall, settings = record["overall"], record["settings"]
    drawn = "requests" if record["num_groups"] == record["num_requests"] else "groups of requests"
    few = record["num_groups"] < MIN_REQUESTS
    return " ".join((
        f"Missed of selected ids, over {overall['steps']:,} steps of a layer in {record['num_requests']:,}"
        f" requests and {len(record['layers']):,} layers; {STARTS[settings['start']]}.",
        *(("The layers of a request share a buffer.",) if settings["share"] == "request" else ()),
        *shared_prefixes(record),
        *(past_answers(record) if settings["steps"] != "all" else ()),
        "A step's ids are in the buffer together; at k, every policy misses what the step before did not"
        " select. Grey: sets of the same sizes, but of other ids; the distance to them is locality.",
        "N: the largest context.",
        *((f"Published (of other data, at as many k): {_sources(published)}.",) if published else ()),
        *(("Where top-k differs by layer, policies stand at the mean size of a layer's buffer.",)
          if len(set(record["top_k"])) > 1 else ()),
        f"No intervals: they need five {drawn}." if few else f"The numbers have 95% intervals over {drawn}.",
        "Replayed from the recorded selections; nothing was timed.",
    ))  # fmt: skip


def _sources(published: Sequence[Figure]) -> str:
    return "; ".join(dict.fromkeys(f"{figure.of.source} ({figure.of.seen})" for figure in published))


def _table(
    overall: Record, curves: Mapping[str, Points], published: Sequence[tuple[float, Figure]]
) -> tuple[Sequence[str], list[Row]]:
    """A row per size that was replayed, then one per point of LRU's curves, then what others published."""
    policies, nulls = overall["policies"], [name for name in NULL_TITLES if name in overall["curves"]]
    null_policies = [name for name in ("lru", "opt") if name in policies]
    columns = [
        "buffer, ids",
        "size",
        *(f"{name} missed" for name in policies),
        *(("lru, 95% from", "to") if "lru" in policies else ()),
        *(f"{name}, {NULL_TITLES[null]}" for name in null_policies for null in nulls),
        *(("published", "of") if published else ()),
    ]
    empty: dict[str, str] = dict.fromkeys(columns, "")
    rows: list[Row] = []
    for size in next(iter(policies.values()), {}):
        cells = {name: policies[name][size] for name in policies}
        known = [cell for cell in cells.values() if cell["miss_rate"] is not None]
        if known:
            interval = (cells["lru"]["interval"] or (None, None)) if "lru" in cells else ()
            of_nulls = (cells[name].get("nulls", {}).get(null) for name in null_policies for null in nulls)
            shares = (*(cell["miss_rate"] for cell in cells.values()), *interval, *of_nulls)
            of_size = (number(known[0]["ids"], ",.0f"), size, *map(rate, shares))
            rows.append((*of_size, *[""] * (len(columns) - len(of_size))))
    points: dict[float, dict[str, float]] = {}
    for name, curve in curves.items():
        for size_ids, share in zip(*curve, strict=True):
            points.setdefault(size_ids, {})[name] = share
    for size_ids, shares_at in sorted(points.items()):
        at = {f"lru, {NULL_TITLES[null]}": rate(shares_at.get(null)) for null in nulls}
        row = empty | at | {"buffer, ids": number(size_ids, ","), "lru missed": rate(shares_at.get("run"))}
        rows.append([row[column] for column in columns])
    for size_ids, figure in published:
        shown = {"buffer, ids": number(size_ids, ",.0f"), "published": rate(figure.low)}
        rows.append(list((empty | shown | {"of": figure.of.model}).values()))
    return columns, rows


def rate(share: float | None) -> str:
    """Nothing for none, as where a column has no such point."""
    return "" if share is None else number(share, ".2%")
