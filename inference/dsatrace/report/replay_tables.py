"""What a replay found, as tables: every figure beside its nulls.

for part in replay_parts(record): console.print(part)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..text import counted
from ..units import size_text
from .grid import MAX_ROWS, NONE, Cell, Grid, number, percent, size
from .tables import caveat

Record = Mapping[str, Any]

NULL_TITLES = {
    "uniform": "uniform selector",
    "recency": "recency window",
    "shuffled": "own steps, shuffled in time",
}
_DOORS_WITH_ORDER = ("serve", "layerwise")
"""Those that can record the order, if asked."""


def replay_parts(record: Record) -> Iterator[str | Grid]:
    """In the order of the questions: what it misses, how large it must be, what it costs, and why."""
    overall = record["overall"]
    yield (
        f"{counted(record['num_requests'], 'request')}, {counted(len(record['layers']), 'layer')}, "
        f"{counted(overall['steps'], 'step')} of a layer, "
        f"top-k {_range(record['top_k'])}, unit: {record['unit']}"
    )
    if warning := caveat(record):
        yield warning
    yield from past_answers(record)
    yield from shared_prefixes(record)
    if "sglang" in overall["policies"] and not record["keeps_order"]:
        keeping = "; record with --trace-keep-order for the exact one" * (record["door"] in _DOORS_WITH_ORDER)
        yield (
            "sglang is approximate: the run keeps ids by position, not in the order they were selected "
            f"in{keeping}."
        )
    yield _miss_rates(record)
    yield _served(record)
    if "lru" in overall["policies"]:
        yield _per_size(overall["policies"]["lru"])
    yield from _chosen(record)
    yield _overlap(overall)
    yield _predictors(overall)
    yield _layers(record)
    yield from _sharing(record)


def past_answers(record: Record) -> Iterator[str]:
    """Whether steps past the answers are among those replayed."""
    if past := record["past_answer"]:
        is_cut = record["settings"]["steps"] == "answer"
        taken = "left out" if is_cut else "counted with the rest: `--steps answer` leaves them out"
        untold = f"; of {past['untold']:,} more nothing says whether they do" if past["untold"] else ""
        yield f"{past['past']:,} of {past['steps']:,} decode steps lie past the answers, {taken}{untold}."


def shared_prefixes(record: Record) -> Iterator[str]:
    """What requests share, where those that begin alike have one buffer."""
    if shared := record["shared_prefixes"]:
        untold = shared["untold"]
        unsure = (
            f" {untold:,} more are some other request's too, nobody can tell whose, and count as the "
            "request's own: record with --trace-prefix-key-tokens no longer than what prompts share."
            if untold
            else ""
        )
        yield (
            f"A buffer per layer for requests that begin alike: {shared['requests']} of "
            f"{record['num_requests']} begin with {shared['tokens']:,} tokens of others.{unsure}"
        )


def _miss_rates(record: Record) -> Grid:
    overall = record["overall"]
    sizes = record["settings"]["sizes"]
    rows = [
        (policy, *(_rate(cells[size]) for size in sizes)) for policy, cells in overall["policies"].items()
    ]
    for policy in ("lru", "opt"):
        cells = overall["policies"].get(policy, {})
        for null, title in NULL_TITLES.items():
            if any(null in cells[size].get("nulls", {}) for size in cells):
                rates = (cells[size].get("nulls", {}).get(null) for size in sizes)
                rows.append((f"{policy}, {title}", *(_percent(rate) for rate in rates)))
    drawn = "requests" if record["num_groups"] == record["num_requests"] else "groups of requests"
    few = record["num_groups"] < 5
    note = f"no intervals: they need five {drawn}" if few else f"in brackets: 95 % interval over {drawn}"
    start = record["settings"]["start"]
    title = f"Share of the selected ids that a buffer misses (start: {start})"
    return Grid(title, ("policy", *sizes), rows, note=f"{note}; opt is the least that any policy can miss")


def _rate(cell: Record) -> Cell:
    if cell["miss_rate"] is None:
        return number(None, none="too small" if cell.get("too_small") else NONE)
    interval = cell.get("interval")
    return number(cell["miss_rate"], ".1%", f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def _percent(share: float | None) -> Cell:
    return number(share, ".1%")


def _range(values: list[int]) -> str:
    distinct = sorted(set(values))
    return f"{distinct[0]}" if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"


def _served(record: Record) -> Grid:
    served, top_k = record["overall"]["served"], max(record["top_k"])
    rows = []
    for name, sizes in served.items():
        title = "the run" if name == "run" else NULL_TITLES[name]
        rows.append((title, *(_size(size, top_k) for size in sizes.values())))
    note = "- : no size does, since the rest was never selected before"
    return Grid("Ids in the smallest LRU buffer that serves ...", ("", *served["run"]), rows, note=note)


def _size(ids: float | None, top_k: int) -> Cell:
    return number(ids, ",", "" if ids is None else f" ({ids / top_k:.1f}k)")


def _per_size(cells: Mapping[str, Record]) -> Grid:
    rows: list[tuple[str, ...]] = []
    small: dict[str, list[str]] = {}  # by what a step asks for
    for name, cell in cells.items():
        if cell["miss_rate"] is None:
            rows.append((name, _rate(cell), *[""] * 6))
            if cell.get("too_small"):
                small.setdefault(cell["too_small"], []).append(name)
            continue
        missed = cell["misses_per_step"]
        quantiles = [missed[key] for key in ("p50", "p95", "p99")]
        rows.append(
            (
                name,
                number(cell["ids"], ",.0f"),
                number(missed["mean"], ".1f"),
                Cell(" / ".join(map(str, quantiles)), quantiles),
                percent(cell["step_miss_rate"]),
                size(cell["bytes_per_token"]),
                number(cell["reads_per_token"], ",.0f"),
                Cell(f"{cell['steps_since_selected']['p50']}", cell["steps_since_selected"]["p50"]),
            )
        )
    columns = (
        "size", "ids", "misses per step", "p50 / p95 / p99", "steps with a miss", "bytes per token",
        "reads per token", "age of missed",
    )  # fmt: skip
    note = "per token: all layers of a request's decode step; age: steps since it was last selected, median"
    notes = [note, *(f"too small are {', '.join(sizes)}: {why}" for why, sizes in small.items())]
    return Grid("LRU: a layer's step", columns, rows, note="; ".join(notes))


def _chosen(record: Record) -> Iterator[str | Grid]:
    """What to do about one size."""
    chosen = record["chosen"]
    size = chosen["size"]
    if engines := chosen.get("engines"):
        rows = [(setting["engine"], setting["flags"], setting["note"]) for setting in engines]
        yield Grid(
            f"Settings that give a buffer of {size}", ("engine", "settings", "note"), rows, left=(0, 1, 2)
        )
    if cost := chosen.get("cost"):
        yield _cost(cost, size)
        if "by_context" in cost:
            yield _budget(cost, size)
    if measured := chosen.get("measured"):
        yield _measured(measured, size)


def _measured(measured: Record, size: str) -> Grid:
    rows = [
        ("miss rate", percent(measured["predicted_miss_rate"]), percent(measured["miss_rate"])),
        ("bytes per miss", *(_count(measured[f"{name}bytes_per_miss"]) for name in ("predicted_", ""))),
    ]
    note = f"{measured['hits']:,} hits and {measured['misses']:,} misses counted by the engine"
    title = f"Prediction at {size} beside an engine's counters"
    return Grid(title, ("", "predicted", "measured"), rows, note=note)


def _count(count: float | None) -> Cell:
    return number(count, ",.0f")


def _cost(cost: Record, size: str) -> Grid:
    link = cost["link"]
    rows = [
        (
            number(row["batch"]),
            *(number(row[name], ".2f") for name in ("whole_ms", "overlapped_ms", "serial_ms")),
            number(row["overlapped_ms"] / row["whole_ms"], ".2f"),
        )
        for row in cost["by_batch"]
    ]
    columns = ("batch", "all in HBM", "fetched, overlapped", "fetched, in turn", "overlapped / all in HBM")
    unsure = [
        name for name, part in link.items() if isinstance(part, Mapping) and part["confidence"] != "measured"
    ]
    note = f"{link['what']}; not measured here: {', '.join(unsure)}" if unsure else link["what"]
    return Grid(f"Modelled: a decode step at {size} on {link['name']} (ms)", columns, rows, note=note)


def _budget(cost: Record, size: str) -> Grid:
    rows = [
        (
            number(row["context"], ","),
            number(row["most_requests"], ","),
            number(row["most_requests_offloaded"], ","),
            number(row["tokens_per_s"], ",.0f"),
            number(row["tokens_per_s_offloaded"], ",.0f"),
            number(row["pays_from_batch"], ","),
        )
        for row in cost["by_context"]
    ]
    columns = (
        "context",
        "requests, all in HBM",
        "with buffers",
        "tokens/s",
        "with buffers",
        "pays from batch",
    )
    note = "at the run's own miss rate, whatever the context; - : no batch that fits is faster"
    return Grid(
        f"Modelled: {cost['hbm_bytes'] / 1e9:g} GB ({size_text(cost['hbm_bytes'])}) of HBM for KV, "
        f"buffers of {size}",
        columns,
        rows,
        note=note,
    )


def _overlap(overall: Record) -> Grid:
    run = overall["overlap"]["run"]
    lags = [f"{lag}" for lag in run["lags"]]
    rows = [("in the step that many before", *map(_percent, run["share"]))]
    if run["shifted_share"] is not None:
        rows.append(("the same, moved along with the query", *map(_percent, run["shifted_share"])))
    rows.append(("Jaccard", *map(_percent, run["jaccard"])))
    rows.append(("chance (k / N)", *map(_percent, run["chance"])))
    for name, overlap in overall["overlap"].items():
        if name != "run":
            rows.append((NULL_TITLES[name], *map(_percent, overlap["share"])))
    return Grid("Share of a selection that an earlier step had too, by lag", ("steps back", *lags), rows)


def _predictors(overall: Record) -> Grid:
    rows = [
        (
            name.replace("_", " "),
            _percent(found["recall"]),
            _percent(found["chance_recall"]),
            _percent(found["precision"]),
            _count(found["extra_ids_per_step"]),
            size(found["extra_bytes_per_step"]),
        )
        for name, found in overall["predictors"].items()
    ]
    columns = ("guess of the next selection", "recall", "chance", "precision", "ids in vain", "bytes in vain")
    return Grid("What a prefetch would have guessed, per step of a layer", columns, rows)


def _layers(record: Record) -> Grid:
    sizes = record["settings"]["sizes"]
    rows = []
    for layer in record["layers"]:
        cells = layer.get("policies", {}).get("lru", {})
        rows.append(
            (
                Cell(f"{layer['name']}", layer["name"]),
                _percent(layer["overlap"]["run"]["share"][0]),
                *(_rate(cells[size]) if size in cells else NONE for size in sizes),
                _size((layer.get("served") or {"run": {}})["run"].get("95%"), max(record["top_k"])),
            )
        )
    columns = (
        "layer",
        "overlap with the step before",
        *(f"LRU misses at {size}" for size in sizes),
        "serves 95%",
    )
    return Grid("By layer: what LRU misses", columns, rows, most=MAX_ROWS, rest="replay.json")


def _sharing(record: Record) -> Iterator[str | Grid]:
    for group in record["layer_overlap"]:
        rows = [
            (
                number(entry["least_recall"], ".0%"),
                entry["pattern"],
                number(entry["full_layers"], unit=f" of {len(group['layers'])}"),
                _percent(entry["recall_of_shared"]),
            )
            for entry in group["suggested"]
        ]
        title = "Layers that could use an earlier layer's selection (F computes its own, S shares)"
        columns = ("every layer keeps at least", "pattern", "indexers", "ids kept in shared layers")
        yield Grid(
            title, columns, rows, left=(0, 1), note="overlap only: what it costs in quality is not known"
        )
