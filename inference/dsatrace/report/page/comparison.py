"""Two or three runs on one page: what differs, their curves in one picture, and their maps side by side.

A run has one colour, dash and marker on the whole page. Only runs whose ids mean the same are compared.

    comparison_html([Material.of(RunReader(folder), record) for folder, record in replayed.items()], diff)
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import UserError
from ...text import plain
from ..grid import Cell, number, percent
from .differences import differences
from .layer_misses import misses_by_step
from .layer_overlap import layer_overlap
from .made import how_it_was_made
from .material import Material, Record
from .miss_curve import on_one_grid
from .moved import kv_found_and_moved
from .offsets import measured, points
from .over_time import cdf_of
from .page import document
from .position_maps import layers_to_draw, position_maps
from .prefix import shared_prefix
from .same_tokens import same_tokens
from .section import LeftOut, Row, Section, prose, told
from .svg import Axis, Series, known_points, line_chart, line_key
from .verdict import verdict_html, warnings_of

MOST_RUNS = 3
Points = tuple[Sequence[float], Sequence[float]]
SIDE_BY_SIDE = (
    misses_by_step,
    layer_overlap,
    position_maps,
    kv_found_and_moved,
    shared_prefix,
    how_it_was_made,
)


def comparison_html(materials: Sequence[Material], same: Record | str) -> str:
    """The page. `same` is diff.json's record of two runs, or why there is none.

    Raises `UserError` for runs that cannot be compared.
    """
    require_comparable(materials)
    _require_one_replay(materials)
    if all(material.layer is None for material in materials):  # one map a run, of the same layer
        layer = _mapped_layer(materials[0])
        materials = [dataclasses.replace(material, layer=layer) for material in materials]
    names = run_names(materials)
    made: list[Section | LeftOut] = [differences(materials, names, _command(materials))]
    folders = [f"{material.run.folder}" for material in materials]
    made.append(same_tokens(same, shlex.join(["dsatrace", "diff", *folders])))
    made += [curves.section(materials, names, _command(materials)) for curves in CURVES]
    made += [_beside(make, materials, names) for make in SIDE_BY_SIDE]
    title = " beside ".join(material.run.folder.absolute().name for material in materials)
    return document(title, _header(materials, names, title), made, _command(materials), wide=True)


def _require_one_replay(materials: Sequence[Material]) -> None:
    """Raises `UserError` where replays were made with other settings, or another size was chosen in them:
    their misses differ by those."""
    replayed = [material for material in materials if material.replay is not None]
    for other in replayed[1:]:
        first, second = ({**(m.replay or {})["settings"], "size": m.size} for m in (replayed[0], other))
        if apart := [name for name in {**first, **second} if first.get(name) != second.get(name)]:
            raise UserError(
                f"the replays of {replayed[0].run.folder} and {other.run.folder} cannot be compared: "
                f"{apart[0]} is {plain(first.get(apart[0]))} in the first, {plain(second.get(apart[0]))} in "
                "the second"
            )


def run_names(materials: Sequence[Material]) -> list[str]:
    """A, B, C and the folder's name."""
    letters = "ABC"
    return [f"{letters[i]} {plain(m.run.folder.absolute().name, 60)}" for i, m in enumerate(materials)]


def require_comparable(materials: Sequence[Material]) -> None:
    """Raises `UserError` naming the first thing for which two runs' figures would not mean the same."""
    first = materials[0]
    for other in materials[1:]:
        for what, value in _meaning(first).items():
            if (theirs := _meaning(other)[what]) != value:
                raise UserError(
                    f"{first.run.folder} and {other.run.folder} cannot be compared: {what}: {plain(value)} "
                    f"in the first, {plain(theirs)} in the second"
                )


def _meaning(material: Material) -> dict[str, Any]:
    """What must be the same in all runs."""
    kind, manifest = material.kind, material.manifest
    records = material.summary["counts"]["records"]
    return {
        "what was recorded": "selections" if records else "no selections",
        "unit": f"{kind.unit} of {kind.unit_tokens}",
        "ids": kind.id_kind,
        "trace level": "blocks" if manifest["trace"]["level"] == "blocks" else "positions",
        "model type": manifest["model_config"].get("model_type"),
        "layers": len(kind.layers),
        "k by layer": _runs_of([layer.top_k for layer in kind.layers]),
        "sets by layer": _runs_of([layer.heads for layer in kind.layers]),
    }


def _runs_of(values: Sequence[int]) -> str:
    """`2048 x 61`, or `0, 16 x 3`."""
    parts: list[list[int]] = []
    for value in values:
        if parts and parts[-1][0] == value:
            parts[-1][1] += 1
        else:
            parts.append([value, 1])
    return ", ".join(f"{value} x {count}" if count > 1 else f"{value}" for value, count in parts)


def _mapped_layer(material: Material) -> int | None:
    """The layer that selects most of the answer where one does, else the last that selects."""
    if not material.summary["counts"]["records"]:
        return None
    layers = layers_to_draw(material)
    answer = [layer for layer, why in layers.items() if "selects most of the answer" in why]
    return (answer or [max(layers)])[0]


def _command(materials: Sequence[Material]) -> str:
    folders = [f"{material.run.folder}" for material in materials]
    return shlex.join(["dsatrace", "report", *folders, "--html", "page.html"])


def _header(materials: Sequence[Material], names: Sequence[str], title: str) -> str:
    parts = []
    for i, (material, name) in enumerate(zip(materials, names, strict=True)):
        warnings = "".join(f"<li>{prose(text)}</li>" for text in warnings_of(material))
        key = line_key(Series(name, (), (), i))
        parts.append(
            f'<div class="run"><p class="run-name">{key}</p>'
            + (f'<ul class="warnings">{warnings}</ul>' if warnings else "")
            + f'<p class="verdict">{verdict_html(material)}</p></div>'
        )
    return f'<header>\n<h1>{told(title)}</h1>\n<div class="beside">{"".join(parts)}</div>\n</header>'


def _beside(
    make: Callable[[Material], Section | LeftOut], materials: Sequence[Material], names: Sequence[str]
) -> Section | LeftOut:
    """The section of each run, in columns."""
    made = [make(material) for material in materials]
    sections = [one for one in made if isinstance(one, Section)]
    if not sections:
        whys = [
            f"{name}: {one.why}" for name, one in zip(names, made, strict=True) if isinstance(one, LeftOut)
        ]
        return LeftOut(made[0].title, "; ".join(whys))
    columns, notes = [], []
    for i, (one, name) in enumerate(zip(made, names, strict=True)):
        if isinstance(one, LeftOut):
            body = f'<p class="note">Not shown: {told(one.why)}</p>'
        else:
            body = re.sub(r' id="', f' id="run{i}-', one.body)  # each id stands once in a page
            notes.append(f"{name}: {one.note}")
        key = line_key(Series(name, (), (), i))
        columns.append(f'<div class="run"><p class="run-name">{key}</p>{body}</div>')
    first = sections[0]
    commands = "\n".join(dict.fromkeys(one.command for one in sections))
    same = len({one.note for one in sections}) == 1
    note = first.note if same else " ".join(notes)
    body = f'<div class="beside">{"".join(columns)}</div>'
    return Section(first.key, first.title, body, note, commands, _joined(made, names))


def _joined(
    made: Sequence[Section | LeftOut], names: Sequence[str]
) -> tuple[Sequence[str], list[Row]] | None:
    """The runs' numbers one below the other, where they have the same columns."""
    tables = [(one.table, name) for one, name in zip(made, names, strict=True) if isinstance(one, Section)]
    known = [(table, name) for table, name in tables if table is not None]
    if not known or len({tuple(table[0]) for table, _ in known}) > 1:
        return None
    return ["run", *known[0][0][0]], [(name, *row) for table, name in known for row in table[1]]


@dataclasses.dataclass(frozen=True)
class Curves:
    """One picture of all runs: a line a run, and where it has one a grey line of its baseline."""

    key: str
    title: str
    x: str
    y: str
    of: Callable[[Material], Points | str]  # or why there is none
    note: str
    baseline: Callable[[Material], Points | None] = lambda _: None
    log: bool = False
    share: bool = True
    whole: bool = False

    def section(self, materials: Sequence[Material], names: Sequence[str], command: str) -> Section | LeftOut:
        found = {name: self.of(material) for name, material in zip(names, materials, strict=True)}
        missing = [f"{name}: {why}" for name, why in found.items() if isinstance(why, str)]
        series, rows = [], list[Row]()
        for i, (name, material) in enumerate(zip(names, materials, strict=True)):
            line = found[name]
            if isinstance(line, str) or not len(line[0]):
                continue
            series.append(Series(name, *line, i, marked=len(line[0]) <= 64))
            base = self.baseline(material)
            if base is not None and len(base[0]):
                series.append(Series(f"{name}: chance", *base, i + 4, null=True))
            rows += [(name, number(x, "g"), self._cell(y)) for x, y in zip(*line, strict=True)]
        if not series:
            return LeftOut(self.title, "; ".join(missing) or "no run has a point")
        xs, ys = [x for one in series for x in one.xs], [y for one in series for y in one.ys]
        high = max(xs)
        chart = line_chart(
            self.title,
            f"{self.title} {self.y} by {self.x}, a line per run.",
            Axis(self.x, min(xs), high, log=self.log, whole=self.whole),
            Axis(self.y, 0, 1, share=True) if self.share else Axis(self.y, 0, max(ys) or 1, nice=True),
            series,
        )
        note = " ".join([self.note, *(f"Not shown, {one}." for one in missing)])
        return Section(self.key, self.title, chart, note, command, (("run", self.x, self.y), rows))

    def _cell(self, y: float) -> Cell:
        return percent(y) if self.share else number(y, ",.4g")


def _miss_curve(material: Material) -> Points | str:
    return material.no_replay if material.replay is None else _lru(material).get("run", ([], []))


def _uniform_curve(material: Material) -> Points | None:
    return None if material.replay is None else _lru(material).get("uniform")


def _lru(material: Material) -> dict[str, tuple[list[float], list[float]]]:
    assert material.replay is not None, "only a replay has curves"
    overall = material.replay["overall"]
    return on_one_grid(overall["curves"], overall["contexts"]["p100"] or 0)


def _misses_by_layer(material: Material) -> Points | str:
    record, size = material.replay, material.size
    if record is None or size is None:
        return material.no_replay or "no replayed size holds a step's ids"
    cells = [layer.get("policies", {}).get("lru", {}).get(size) for layer in record["layers"]]
    means = [cell and (cell.get("misses_per_step") or {}).get("mean") for cell in cells]
    return known_points(range(len(means)), means)


def _overlap(key: str) -> Callable[[Material], Points | str]:
    def found(material: Material) -> Points | str:
        shares = (material.summary.get(key) or {}).get("per_layer")
        return known_points(range(len(shares)), shares) if shares else "nothing was compared"

    return found


def _chance(key: str) -> Callable[[Material], Points | None]:
    def found(material: Material) -> Points | None:
        line = _overlap(key)(material)
        if isinstance(line, str) or not line[0]:
            return None
        return [line[0][0], line[0][-1]], [material.summary[key]["random_mean"]] * 2

    return found


def _blocks(name: str) -> Callable[[Material], Points]:
    def found(material: Material) -> Points:
        rows = [row for row in material.summary["blocks_touched"] if row["mean"] is not None]
        return [row["block_size_tokens"] for row in rows], [row[name] / row["context_mean"] for row in rows]

    return found


def _measured_blocks(material: Material) -> Points | str:
    if not material.summary["counts"]["sparse_records"] or not material.kind.holds("unique_blocks"):
        return "which blocks are touched is not known, or all are"
    return _blocks("mean")(material)


def _uniform_blocks(material: Material) -> Points | None:
    return None if isinstance(_measured_blocks(material), str) else _blocks("uniform_mean")(material)


def _lags(name: str) -> Callable[[Material], Any]:
    def found(material: Material) -> Any:
        if material.replay is None:
            return material.no_replay if name == "share" else None
        run = material.replay["overall"]["overlap"]["run"]
        return known_points(run["lags"], run[name])

    return found


def _offsets(material: Material) -> Points | str:
    stored = material.summary["histograms"]["offsets"]
    if not material.kind.holds("offset_max") or not stored["values"]:
        return "how far back selected tokens lie is not known"
    at = points(int(stored["values"][-1]))
    return (at + 1).tolist(), measured(stored, at).tolist()


def _latencies(name: str) -> Callable[[Material], Points | str]:
    def found(material: Material) -> Points | str:
        if not material.summary.get("serving"):
            return "its requests did not arrive over time"
        stored = material.summary["histograms"].get(name) or {"values": [], "counts": []}
        return cdf_of(stored) if stored["values"] else "no request was served"

    return found


CURVES = (
    Curves(
        "curve", "How large must the buffer be?", "buffer per layer, ids",
        "missed, share of the selected ids",
        _miss_curve, "LRU at every size, of the selected ids of each run; chance: LRU on a uniform selector.",
        _uniform_curve, log=True,
    ),
    Curves(
        "by-layer", "How many misses has a step, by layer?", "layer, its place among those that select",
        "missed ids per step (mean)", _misses_by_layer,
        "LRU at the size that the page's verdict names, mean over the steps of all requests.",
        share=False, whole=True,
    ),
    Curves(
        "step-overlap", "How much was selected in the step before?", "layer", "share of a selection",
        _overlap("step_overlap"), "Of sparse selections, what the step before had too; chance is k / N.",
        _chance("step_overlap"), whole=True,
    ),
    Curves(
        "answer", "How much of the answer is selected?", "layer", "share of the answer's tokens",
        _overlap("needle_recall"),
        "Over sparse decode records of requests with a known answer, up to its end; past it too for a run "
        "whose summary.json has past_answer and no needle_recall_past. Chance is k / N.",
        _chance("needle_recall"), whole=True,
    ),
    Curves(
        "stays", "Does a selection stay?", "steps back", "share of the selected ids", _lags("share"),
        "Share of a selection that the same layer selected so many steps earlier; chance is k / N.",
        _lags("chance"), log=True,
    ),
    Curves(
        "blocks", "How many KV blocks does one step touch?", "block size (tokens)",
        "blocks touched, of the context's", _measured_blocks,
        "Mean over records past top-k, of the blocks that the context has; chance: a uniform selector's "
        "expectation.",
        _uniform_blocks, log=True,
    ),
    Curves(
        "offsets", "How far back do the selected tokens lie?", "offset from the query + 1 (tokens)",
        "selected tokens within that offset", _offsets, "Of all selected tokens of each run.", log=True,
    ),
    Curves(
        "latency", "How long from a request's arrival to its finish?", "ms", "served requests within that",
        _latencies("latency_us"), "Served requests, of each run's own clock.", log=True,
    ),
)  # fmt: skip
