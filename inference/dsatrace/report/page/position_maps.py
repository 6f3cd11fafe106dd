"""Position by step: which positions a layer selected in each decode step, as one heat map per chosen layer.

The maps are of one request. Its chosen layers are the first, the last, those whose steps overlap most and
least, and the one that selects most of the answer. A map has at most 500 rows of steps and 2,000 columns
of ids; a request with more shares cells, whose value is the selected ids in them.

    section = position_maps(material)
    layers_to_draw(material)          # {0: ["first layer"], 1: ["most of the answer"], ...}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from ...text import plain
from ...trace.kind import SelectionKind
from ...trace.load import Run
from ...trace.selections import LayerSelections
from ..grid import Cell, number, percent
from ..tables import NUM_RECENT, NUM_SINKS
from .heat_map import Outline, Ramp, heat_map, packed
from .material import Material
from .section import LeftOut, Row, Section, Table, table_html, told
from .svg import Axis

TITLE = "Which positions are selected, step by step?"
MOST_STEPS, MOST_IDS = 500, 2000
"""Rows and columns of a map."""
MAX_BYTES, MOST_MAP_BYTES = 480_000, 160_000
"""Of all maps' cells in the page, and of one's."""
_RANGES = 16
"""Ranges of ids in the table of numbers."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """One request's T decode steps, and what its positions are known for."""

    request_id: str
    step_idx: np.ndarray  # (T,) int64
    seq_len: np.ndarray  # (T,) int64, tokens that the query sees
    visible: np.ndarray  # (T,) int64, ids to choose from
    id_tokens: int  # tokens that an id covers; 0: an id is no place in the context
    answer: tuple[int, ...]  # positions that hold the answer, ascending
    prefix_tokens: int  # tokens of the shared prefix

    @property
    def num_ids(self) -> int:
        return int(self.visible.max(initial=1))


@dataclasses.dataclass(frozen=True, eq=False)
class PositionMap:
    """What a layer selected, as selected ids per cell."""

    layer: int
    why: Sequence[str]
    selections: LayerSelections
    cells: np.ndarray  # (R, C) float64, row 0: the first steps; NaN where no id was visible
    steps_per_row: int
    ids_per_column: int


def position_maps(material: Material) -> Section | LeftOut:
    if why := _why_not(material):
        return LeftOut(TITLE, why)
    run, kind = Run(material.run.folder), material.kind
    layers = layers_to_draw(material)
    shown, selections = _read(run, kind, material, layers)
    if not len(shown.step_idx):
        return LeftOut(TITLE, f"request {plain(shown.request_id)} has no decode step")
    maps = [
        map_of(layer, layers[layer], one, shown.visible, len(layers)) for layer, one in selections.items()
    ]
    unit = _unit(material)
    body = ""
    if shown.id_tokens:
        rows = [_shares_row(one, shown) for one in maps]
        columns = ("layer", *_share_columns(shown))
        caption = f"Where the selections of request {shown.request_id} lie"
        body = table_html((columns, rows), caption, "position-shares")
    body += "".join(_figure(one, shown, unit, kind) for one in maps)
    return Section(
        "positions", TITLE, body, _note(material, shown, maps, unit), _command(material, shown),
        _ranges(maps, shown, unit),
    )  # fmt: skip


def layers_to_draw(material: Material) -> dict[int, list[str]]:
    """Layers, ascending, and why each is drawn. Raises `UserError` for a `--layer` that has no selections."""
    has_sets = [i for i, layer in enumerate(material.kind.layers) if layer.heads]
    if material.layer is not None:
        if material.layer not in has_sets:
            first, last = has_sets[0], has_sets[-1]
            raise UserError(f"--layer {material.layer}: no layer that selects; those are {first} to {last}")
        return {material.layer: ["the chosen layer"]}
    found: dict[int, list[str]] = {}
    overlap = _known(material.summary["step_overlap"]["per_layer"])
    recall = _known((material.summary.get("needle_recall") or {}).get("per_layer"))
    for name, layer in (
        ("first layer", has_sets[0]),
        ("last layer", has_sets[-1]),
        ("keeps most from step to step", max(overlap, key=overlap.__getitem__, default=None)),
        ("keeps least from step to step", min(overlap, key=overlap.__getitem__, default=None)),
        ("selects most of the answer", max(recall, key=recall.__getitem__, default=None)),
    ):
        if layer is not None:
            found.setdefault(layer, []).append(name)
    return dict(sorted(found.items()))


def _known(per_layer: Sequence[float | None] | None) -> dict[int, float]:
    return {layer: share for layer, share in enumerate(per_layer or ()) if share is not None}


def _why_not(material: Material) -> str:
    counts, level = material.summary["counts"], material.manifest["trace"]["level"]
    if not counts["records"]:
        return "no step was recorded"
    if level == "stats":
        return "records of level stats hold no positions; record with --trace-level full"
    if material.kind.id_kind == "slot":
        return "its ids are an engine's slots, which say nothing of positions"
    if not counts["sparse_records"]:
        return "no step saw more than top-k, so every position was selected"
    return ""


def _read(
    run: Run, kind: SelectionKind, material: Material, layers: Mapping[int, Any]
) -> tuple[Shown, dict[int, LayerSelections]]:
    lines = {line["request_id"]: line for line in run.reader.requests()}
    request_id = material.request if material.request is not None else _request(run, kind, lines)
    chosen = {layer: _decode_steps(run.selections(request_id, layer)) for layer in layers}
    first = next(iter(chosen.values()))
    trace, is_blocks = material.manifest["trace"], material.manifest["trace"]["level"] == "blocks"
    id_tokens = 0 if kind.unit == "expert" else trace["block_size_tokens"] if is_blocks else kind.unit_tokens
    visible = -(-first.seq_len // id_tokens) if is_blocks else kind.visible(first.seq_len)
    shown = Shown(
        request_id,
        first.step_idx,
        first.seq_len,
        visible,
        id_tokens,
        tuple(lines.get(request_id, {}).get("needle_positions") or ()) if id_tokens else (),
        _prefix_tokens(run, request_id) if id_tokens and kind.holds("prefix") else 0,
    )
    return shown, chosen


def _request(run: Run, kind: SelectionKind, lines: Mapping[str, Mapping[str, Any]]) -> str:
    """The first request that is past top-k and whose answer's place is known, else the first past top-k."""

    def rank(request_id: str) -> tuple[bool, bool]:
        line = lines.get(request_id, {})
        context = line.get("num_prompt_tokens", 0) + line.get("num_output_tokens", 0)
        past = bool(kind.visible(np.array([context]))[0] > kind.top_k.min())
        return past, past and bool(line.get("needle_positions"))

    return max(run.request_ids, key=rank)  # the first of equals


def _prefix_tokens(run: Run, request_id: str) -> int:
    """Tokens of the shared prefix, as the request's first record has it."""
    fields = ("request_id", "block_size_tokens", "prefix.prefix_cached_blocks")
    own = (record for record in run.reader.steps(fields) if record["request_id"] == request_id)
    record = next(own, None)
    return record["prefix"]["prefix_cached_blocks"] * record["block_size_tokens"] if record else 0


def _decode_steps(layer: LayerSelections) -> LayerSelections:
    kept = np.flatnonzero(layer.phase != "prefill")
    rows = layer.rows()
    ids = [rows[i] for i in kept.tolist()]
    return LayerSelections(
        layer.step_idx[kept],
        layer.seq_len[kept],
        layer.forward_idx[kept],
        layer.phase[kept],
        np.concatenate(ids) if ids else layer.ids[:0],
        np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64),
    )


def map_of(
    layer: int, why: Sequence[str], selections: LayerSelections, visible: np.ndarray, num_maps: int
) -> PositionMap:
    """Of T steps that choose from `visible` (T,) ids, in as fine cells as the limits allow.

    Ids share a cell in powers of two, so that blocks stay whole.
    """
    steps = -(-len(selections) // MOST_STEPS)
    ids, most = 1, int(visible.max())
    while ids * MOST_IDS < most:
        ids *= 2
    while True:
        cells = counted(selections, visible, steps, ids)
        if (
            len(packed(cells, float(np.nanmax(cells)))) <= min(MAX_BYTES // num_maps, MOST_MAP_BYTES)
            or ids >= most
        ):
            return PositionMap(layer, why, selections, cells, steps, ids)
        ids *= 2


def counted(selections: LayerSelections, visible: np.ndarray, steps: int, ids: int) -> np.ndarray:
    """(R, C) selected ids in cells of `steps` by `ids`; NaN where none was visible yet. `visible`: (T,)."""
    num_rows, num_columns = -(-len(selections) // steps), -(-int(visible.max()) // ids)
    row = np.repeat(np.arange(len(selections)) // steps, np.diff(selections.ptr))
    flat = row * num_columns + selections.ids // ids
    cells = np.bincount(flat, minlength=num_rows * num_columns).reshape(num_rows, num_columns).astype(float)
    most = np.maximum.reduceat(visible, np.arange(0, len(selections), steps))
    cells[np.arange(num_columns) * ids >= most[:, None]] = np.nan
    return cells


def _regions(shown: Shown) -> list[tuple[str, int | np.ndarray, int | np.ndarray]]:
    """Name, first token and end of each region, the same for all steps or (T,)."""
    regions: list[tuple[str, Any, Any]] = [
        (f"first {NUM_SINKS} tokens", 0, NUM_SINKS),
        (f"last {NUM_RECENT} tokens", shown.seq_len - NUM_RECENT, shown.seq_len),
    ]
    if shown.prefix_tokens:
        regions.append((f"shared prefix, {shown.prefix_tokens:,} tokens", 0, shown.prefix_tokens))
    return regions


def _share_columns(shown: Shown) -> Iterator[str]:
    for name, _, _ in _regions(shown):
        yield from (name, "uniform")
    if shown.answer:
        yield from ("of the answer's tokens, selected", "uniform (k / N)")


def _shares_row(one: PositionMap, shown: Shown) -> Row:
    """Of the selected ids, the share that covers any token of a region, and a uniform selector's."""
    cells: list[Cell] = [number(one.layer)]
    for share, uniform in region_shares(one.selections, shown):
        cells += [number(share, ".2%"), number(uniform, ".2%")]  # of a long context a region is little
    return cells


def region_shares(selections: LayerSelections, shown: Shown) -> Iterator[tuple[float, float]]:
    """Measured and expected of a uniform selector of the same k: by region, then the answer's recall."""
    sizes = np.diff(selections.ptr)
    step = np.repeat(np.arange(len(selections)), sizes)
    first = selections.ids.astype(np.int64) * shown.id_tokens
    for _, *sides in _regions(shown):
        begin, end = (np.broadcast_to(side, sizes.shape) for side in sides)
        within = (first + shown.id_tokens > begin[step]) & (first < end[step])
        low = np.maximum(begin, 0) // shown.id_tokens
        there = np.clip(np.minimum(-(-end // shown.id_tokens), shown.visible) - low, 0, None)
        yield float(within.mean()), float((sizes * there / shown.visible).sum() / sizes.sum())
    if shown.answer:
        answer = np.array(shown.answer) // shown.id_tokens  # ids, one per token
        held = np.isin(selections.ids, answer)
        tokens = np.bincount(answer, minlength=int(selections.ids.max()) + 1)
        recall = tokens[selections.ids[held]].sum() / (len(shown.answer) * len(selections))
        yield float(recall), float((sizes / shown.visible).mean())


def _figure(one: PositionMap, shown: Shown, unit: str, kind: SelectionKind) -> str:
    steps = shown.step_idx
    per_id = shown.id_tokens or 1
    x_title = "position (tokens)" if shown.id_tokens else unit
    high = float(np.nanmax(one.cells))
    follows = bool(np.all(np.diff(steps) == 1))  # else some were not recorded
    first, y_title = (int(steps[0]), "decode step") if follows else (0, "recorded decode step")
    what = "selected ids" if unit != "token" else "selected tokens"
    cell = one.steps_per_row * one.ids_per_column
    head = ", its first KV head" if kind.layers[one.layer].heads > 1 else ""
    title = f"Layer {one.layer}{head}: {', '.join(one.why)}"
    svg = heat_map(
        title,
        f"{len(steps)} decode steps by {shown.num_ids:,} {_plural(unit)}; the table above and the numbers "
        "below say the same in figures.",
        one.cells,
        Ramp(f"{what} in a cell of {cell:,}" if cell > 1 else "selected", high, root=True),
        Axis(x_title, 0, one.cells.shape[1] * one.ids_per_column * per_id),
        Axis(y_title, first, first + one.cells.shape[0] * one.steps_per_row),
        pool="mean",
        max_bytes=MAX_BYTES,
        outlines=_outlines(one, shown),
        said=_pooled(one, unit),
    )
    return f"<h3>{told(title)}</h3>{svg}"


def _plural(unit: str) -> str:
    return {"entry": "entries", "token": "positions"}.get(unit, f"{unit}s")


def _pooled(one: PositionMap, unit: str) -> str:
    """What a cell stands for, where it is not one id in one step."""
    parts = []
    if one.ids_per_column > 1:
        parts.append(f"{one.ids_per_column} {_plural(unit)}")
    if one.steps_per_row > 1:
        parts.append(f"{one.steps_per_row} steps")
    if not parts:
        return ""
    return (
        f"Pooled to fit: a cell is {' by '.join(parts)} and shows how many of their ids were selected, so "
        "the mean times the cell's size."
    )


def _outlines(one: PositionMap, shown: Shown) -> list[Outline]:
    """Sinks, shared prefix and answer as bars above the map, the recent band's edge as a line in it."""
    if not shown.id_tokens:
        return []
    wide = shown.id_tokens * one.ids_per_column  # tokens per column
    rows = one.cells.shape[0]

    def bar(name: str, first: float, end: float, style: int, level: int) -> Outline:
        y = -rows * (0.012 + 0.014 * level)
        return Outline(name, ((first / wide, y), (end / wide, y)), style, wide=True)

    found = [bar(f"first {NUM_SINKS} tokens (sinks)", 0, NUM_SINKS, 0, 0)]
    if shown.prefix_tokens:
        found.append(bar("shared prefix", 0, shown.prefix_tokens, 1, 1))
    place = np.linspace(0, len(shown.seq_len) - 1, min(len(shown.seq_len), 64)).astype(int)
    edge = (shown.seq_len[place] - NUM_RECENT).clip(0) / wide
    line = [(float(x), (float(i) + 0.5) / one.steps_per_row) for x, i in zip(edge, place, strict=True)]
    found.append(Outline(f"last {NUM_RECENT} tokens begin", tuple(line), 2))
    for first, end in _runs(shown.answer):  # upright, so that its shape tells it from the other bars
        x = (first + end) / 2 / wide
        found.append(Outline("the answer", ((x, -rows * 0.045), (x, -rows * 0.008)), 3, wide=True))
    return found


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and end of each run of adjacent positions."""
    start = None
    for i, position in enumerate(positions):
        start = position if start is None else start
        if i + 1 == len(positions) or positions[i + 1] != position + 1:
            yield start, position + 1
            start = None


def _ranges(maps: Sequence[PositionMap], shown: Shown, unit: str) -> Table:
    """Selected ids of each map in 16 ranges of whole columns."""
    rows: list[Row] = []
    for one in maps:
        columns = np.nansum(one.cells, axis=0)
        wide = -(-len(columns) // _RANGES)
        for first in range(0, len(columns), wide):
            ids = one.ids_per_column * first, min(one.ids_per_column * (first + wide), shown.num_ids)
            count = int(columns[first : first + wide].sum())
            rows.append(
                (
                    number(one.layer),
                    number(ids[0]),
                    number(ids[1] - 1),
                    number(count),
                    percent(count, columns.sum()),
                )
            )
    return ("layer", f"from {unit}", f"to {unit}", "selected, all steps", "share"), rows


def _unit(material: Material) -> str:
    return "block" if material.manifest["trace"]["level"] == "blocks" else material.kind.unit


def _note(material: Material, shown: Shown, maps: Sequence[PositionMap], unit: str) -> str:
    steps, selected = len(shown.step_idx), sum(len(one.selections.ids) for one in maps)
    covers = f" of {shown.id_tokens} tokens" if shown.id_tokens > 1 else ""
    parts = [
        f"Request {plain(shown.request_id)}, {steps:,} decode steps, {selected:,} selected ids in "
        f"{len(maps)} maps; an id is one {unit}{covers}.",
    ]
    if material.request is None:
        parts.append(
            "It is the first request past top-k, of those whose answer's place is known where any is."
        )
    if material.layer is None:
        parts.append(
            "Layers: the first, the last, those that keep most and least of a selection from step to step, "
            "and the one that selects most of the answer; --request and --layer draw others."
        )
    if shown.id_tokens:
        parts.append(
            "Shares are of the selected ids; uniform: expected of a selector that draws as many of the "
            "visible ids at random. Blank: not yet visible."
        )
    return " ".join(parts)


def _command(material: Material, shown: Shown) -> str:
    layer = () if material.layer is None else ("--layer", f"{material.layer}")
    return material.command("report", "--html", "page.html", "--request", shown.request_id, *layer)
