"""A study's folder as a page: its policies by capacity, or by GiB, in one picture, and all its tables.

Knows the folder's JSON; computes nothing but GiB. Only `study size` knows a model: for the others, what a
token takes has to be told.

    study_html(Path("outputs/sweep"), bytes_per_token=40016)
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import read_json
from ...study.output_folder import MANIFEST_FILE
from ...study.sweep_cells import POOL
from ...text import plain
from ...units import size_text
from ..grid import Grid, number, percent
from ..study_folder import study_parts
from .page import document
from .section import LeftOut, Row, Section, table_html, told
from .stacked import Part, Stack, amounts
from .svg import Axis, Series, line_chart

TITLE = "What does each policy hit, at which capacity?"
BOUND, FIRST = "opt", "lru"
"""What the names of bounds begin with, and the policy that is drawn first."""
COLUMNS = (
    *("workload", "tokens per block", "policy", "capacity, blocks", "GiB", "hit rate", "95% from", "to"),
    *("hits", "blocks asked"),
)
GIB = 1 << 30
Cell = Mapping[str, Any]


def study_html(folder: Path, bytes_per_token: int | None = None) -> str:
    """The page. Raises `UserError` for what is no study's result."""
    parts = list(study_parts(folder))
    command = shlex.join(["dsatrace", "report", f"{folder}"])
    lines = [part for part in parts if isinstance(part, str)]
    grids = [part for part in parts if isinstance(part, Grid)]
    manifest = read_json(folder / MANIFEST_FILE)
    results: dict[Path, Sequence[Cell]] = {}
    made: list[Section | LeftOut] = []
    for path in sorted(folder.glob("*.json")):
        record = read_json(path, broken="; run the study again")
        if path.name == MANIFEST_FILE or not isinstance(record, dict):
            continue
        if record.get("cells"):
            results[path] = record["cells"]
        elif record.get("curve"):
            if bytes_per_token is not None:
                raise UserError(f"--bytes-per-token {bytes_per_token}: {path} has its model's; leave it out")
            made.append(rates_by_memory(path, record, command))
            lines = [record["recommendation"]["text"], *lines]
    order = _order(results)
    made += [
        policies_by_capacity(path, cells, order, bytes_per_token, command) for path, cells in results.items()
    ]
    if not made:
        made.append(LeftOut(TITLE, "the study compares no policies, or it did not end"))
    made += [_table(i, grid, command) for i, grid in enumerate(grids)]
    made.append(_how(manifest, command))
    name = folder.absolute().name
    said = "".join(f'<p class="verdict">{told(line, None)}</p>' for line in lines[:1])
    rest = "".join(f"<li>{told(line, None)}</li>" for line in lines[1:] if not line.startswith("files: "))
    head = f"<header>\n<h1>{told(name)}</h1>\n{said}" + (f"<ul>{rest}</ul>" if rest else "") + "</header>"
    return document(name, head, made, f"{folder}")


def rates_by_memory(path: Path, record: Mapping[str, Any], command: str) -> Section:
    """The curve of `study size`, with the size that it recommends."""
    try:
        advice, layout = record["recommendation"], record["layout"]
        (unlimited,) = (row for row in record["curve"] if row["bytes_per_device"] is None)
        rows = [row for row in record["curve"] if row is not unlimited]
        sizes = sorted({row["bytes_per_device"] / GIB for row in rows})
        of_each: dict[str, list[float]] = {}
        for row in rows:
            of_each.setdefault(row["policy"], []).append(100 * row["hit_rate"])
        of_each[unlimited["policy"]] = [100 * unlimited["hit_rate"]] * len(sizes)
        series = [
            Series(name, sizes, rates, place, null=name.startswith((BOUND, unlimited["policy"])), marked=True)
            for place, (name, rates) in enumerate(of_each.items())
        ]
        chosen = advice["bytes_per_device"]
        mark = [(chosen / GIB, f"recommended: {size_text(chosen)}")] if advice["is_reached"] else []
        x = Axis("cache on one device", sizes[0], sizes[-1], log=True)
        y = Axis("hit rate, %", 0, max(map(max, of_each.values())) or 1, nice=True)
        ticks = [(size, size_text(size * GIB).replace(".0 ", " ")) for size in sizes]
        chart = line_chart("Hit rate by GiB of cache", advice["text"], x, y, series, mark, ticks)
        several = f" Replicas: {record['replicas']}, {record['routing']}." if record["replicas"] > 1 else ""
        note = (
            f"Hit rate: hits / {unlimited['accesses']:,} full prompt blocks of {unlimited['block_size']} "
            f"tokens. {POOL}: vLLM's block pool, of which the recommendation is; grey: bounds, and that pool "
            f"without a limit. GiB are per device: {layout['bytes_per_token']:,} bytes per token of "
            f"{layout['name']} in {layout['dtype']}, {_ranks(layout)}.{several} Simulated on the study's "
            "requests; nothing was timed."
        )
        table = (COLUMNS, [_row(row, None) for row in rows])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise _no_result(path, error) from error
    return Section(f"memory-{path.stem}", "How many GiB of cache is it worth?", chart, note, command, table)


def _ranks(layout: Mapping[str, Any]) -> str:
    if layout["is_split"]:
        return f"KV heads split over {layout['tensor_parallel']} tensor parallel rank(s)"
    return "all of which every tensor parallel rank holds"


def policies_by_capacity(
    path: Path, cells: Sequence[Cell], order: Sequence[str], bytes_per_token: int | None, command: str
) -> Section | LeftOut:
    """A chart per workload, of the smallest block size; the numbers hold every size. `order`: the page's
    policies, which gives each its colour."""
    try:
        sizes = sorted({cell["block_size"] for cell in cells})
        drawn = [cell for cell in cells if cell["block_size"] == sizes[0]]
        body = "".join(
            _chart(workload, [cell for cell in drawn if cell["workload"] == workload], order, bytes_per_token)
            for workload in dict.fromkeys(cell["workload"] for cell in drawn)
        )
        rows = [_row(cell, bytes_per_token) for cell in cells]
    except (KeyError, TypeError) as error:
        raise _no_result(path, error) from error
    also = f"; {', '.join(map(str, sizes[1:]))} are among the numbers" if len(sizes) > 1 else ""
    room = "Blocks only: the study knows no model, so what a block takes is not told; --bytes-per-token does."
    if bytes_per_token is not None:
        room = f"GiB: at {bytes_per_token:,} bytes per token, in all layers together."
    note = (
        f"Hit rate: hits / full prompt blocks, of a cache with so many blocks; drawn: blocks of {sizes[0]} "
        f"tokens{also}. A policy has one colour and dash in all pictures of the page; grey: {BOUND} and its "
        f"kind, which are bounds. {room} Simulated on the study's requests; nothing was timed."
    )
    return Section(f"policies-{path.stem}", TITLE, body, note, command, (COLUMNS, rows))


def _order(results: Mapping[Path, Sequence[Cell]]) -> list[str]:
    """All policies: LRU, the others by what they hit in all results together, bounds last."""
    hits: dict[str, float] = {}
    for path, cells in results.items():
        try:
            for cell in cells:
                hits[cell["policy"]] = hits.get(cell["policy"], 0.0) + cell["hit_rate"]
        except (KeyError, TypeError) as error:
            raise _no_result(path, error) from error
    return sorted(hits, key=lambda name: (name.startswith(BOUND), name != FIRST, -hits[name]))


def _no_result(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a result of a study: {error!r}; run the study again")


def _chart(workload: str, cells: Sequence[Cell], order: Sequence[str], bytes_per_token: int | None) -> str:
    capacities = sorted({cell["capacity_blocks"] for cell in cells})
    rates: dict[str, dict[int, float]] = {}
    for cell in cells:
        rates.setdefault(cell["policy"], {})[cell["capacity_blocks"]] = cell["hit_rate"]
    most = {name: max(of.values()) for name, of in rates.items()}
    names = [name for name in order if name in rates]
    best = max(names, key=lambda name: (not name.startswith(BOUND), most[name]))
    title = f"Hit rate of {plain(workload, 60)} by capacity"
    desc = f"At {capacities[-1]:,} blocks {best} hits most, {most[best]:.1%}."
    heading = f"<h3>{told(plain(workload, 80))}</h3>"
    if len(capacities) == 1:
        stacks = [Stack(name, [_bar(name, most[name], order)]) for name in names]
        size = f"<p>{capacities[0]:,} blocks{_room(cells[0], bytes_per_token)}</p>"
        return f"{heading}{size}{amounts(title, desc, stacks)}"
    series = [
        Series(name, sorted(rates[name]), [rates[name][size] for size in sorted(rates[name])],
               order.index(name), null=name.startswith(BOUND), marked=True)
        for name in names
    ]  # fmt: skip
    some = {cell["capacity_blocks"]: cell for cell in cells}
    labels = [(size, f"{size:,}{_room(some[size], bytes_per_token)}") for size in capacities]
    unit = "blocks" if bytes_per_token is None else "blocks (GiB)"
    x = Axis(f"capacity, {unit}", capacities[0], capacities[-1], log=True)
    return heading + line_chart(title, desc, x, Axis("hit rate", 0, 1, share=True), series, x_labels=labels)


def _bar(name: str, rate: float, order: Sequence[str]) -> Part:
    return Part("", rate, f"{rate:.1%}", order.index(name), null=name.startswith(BOUND))


def _gib(cell: Cell, bytes_per_token: int | None) -> float | None:
    if "bytes_per_device" in cell:
        return float(cell["bytes_per_device"] / GIB)
    if bytes_per_token is None:
        return None
    return float(cell["capacity_blocks"] * cell["block_size"] * bytes_per_token / GIB)


def _room(cell: Cell, bytes_per_token: int | None) -> str:
    gib = _gib(cell, bytes_per_token)
    return "" if gib is None else f" ({gib:.2g})"


def _row(cell: Cell, bytes_per_token: int | None) -> Row:
    return (
        plain(cell["workload"]),
        number(cell["block_size"]),
        plain(cell["policy"]),
        number(cell["capacity_blocks"], ","),
        number(_gib(cell, bytes_per_token), ".3g"),
        percent(cell["hit_rate"]),
        *(number(cell.get(name), ".1%") for name in ("hit_rate_low", "hit_rate_high")),
        number(cell["hits"], ","),
        number(cell["accesses"], ","),
    )


def _table(i: int, grid: Grid, command: str) -> Section:
    columns = [column or ("" if place else "name") for place, column in enumerate(grid.columns)]
    return Section(f"table-{i}", grid.title, "", grid.note, command, (columns, grid.rows), is_open=True)


def _how(manifest: Cell, command: str) -> Section:
    rows = list(_facts(manifest))
    body = table_html((("", ""), rows), "The study")
    return Section("made", "How it was made", body, "As the study's manifest has it.", command)


def _facts(manifest: Cell) -> Iterator[Row]:
    yield "its command", shlex.join(map(str, manifest.get("argv") or [])) or "-"
    facts = {
        **{name: manifest.get(name) for name in ("study", "state", "started_utc", "tool_version", "sources")},
        **{f"tokenizer's {name}": value for name, value in (manifest.get("tokenizer") or {}).items()},
        **(manifest.get("settings") or {}),
    }
    for name, value in facts.items():
        if value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"
            yield name.replace("_", " "), plain(shown)
