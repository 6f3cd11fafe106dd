"""Blocks touched by a step at several block sizes, over all layers and by layer, beside two baselines.

Over all layers the figures are the summary's. By layer they are counted here, from whole requests of the
run up to `MAX_RECORDS` records.

    section = blocks_touched(material)
    counted_by_layer(run, kind, (16, 32, 64)).means(16)      # (L,) measured, uniform, recency, context
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...trace.kind import SelectionKind
from ...trace.load import Run, touched_blocks
from ...trace.selections import LayerSelections
from ...trace.statistics import count_blocks
from ...trace.summary import context_blocks, recency_blocks, uniform_blocks, unit_blocks
from ..grid import number
from .material import Material
from .section import LeftOut, Row, Section, told
from .svg import Axis, Bar, bars

TITLE = "How many KV blocks does one step touch?"
MAX_RECORDS = 20_000
"""Records that are counted by layer, in whole requests from the run's start; one request at least."""
SELECTORS = ("measured", "uniform", "recency", "context")


@dataclasses.dataclass(eq=False)
class LayerBlocks:
    """Sums over the counted sparse records of each of L layers, at each block size."""

    num_layers: int
    sizes: Sequence[int]
    num_requests: int = 0
    num_records: int = 0
    is_whole: bool = True  # no request was left out

    def __post_init__(self) -> None:
        self.records = np.zeros(self.num_layers, np.int64)
        self.sums = {size: np.zeros((len(SELECTORS), self.num_layers)) for size in self.sizes}

    def means(self, size: int) -> np.ndarray:
        """(4, L) mean blocks per record: measured, uniform, recency, whole context; NaN without records."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums[size] / self.records


def blocks_touched(material: Material) -> Section | LeftOut:
    summary, kind = material.summary, material.kind
    if not summary["counts"]["sparse_records"]:
        return LeftOut(TITLE, "no step saw more tokens than top-k, so every block was touched")
    if not kind.holds("unique_blocks"):
        return LeftOut(TITLE, "its ids are no positions, so which blocks they lie in is not known")
    touched = [row for row in summary["blocks_touched"] if row["mean"] is not None]
    by_layer = None
    if material.manifest["trace"]["level"] != "stats":
        by_layer = counted_by_layer(Run(material.run.folder), kind, _sizes(material))
    body = f'<p class="answer">{told(_answer(touched))}</p>{_over_all(touched)}'
    if by_layer is not None:
        body += "".join(map(_by_layer, by_layer.sizes, (by_layer.means(size) for size in by_layer.sizes)))
    columns = ("layer", "block size", "measured", "uniform selector", "recency selector", "in context")
    rows = [*_rows_over_all(touched), *(_rows_by_layer(by_layer) if by_layer else ())]
    return Section(
        "blocks",
        TITLE,
        body,
        _note(material, by_layer),
        material.command("report", "--no-figure"),
        (columns, rows),
    )


def _sizes(material: Material) -> list[int]:
    """The summary's block sizes that the records tell of."""
    trace = material.manifest["trace"]
    sizes = [row["block_size_tokens"] for row in material.summary["blocks_touched"]]
    own = trace["block_size_tokens"] if trace["level"] == "blocks" else 1
    return [size for size in sizes if size % own == 0]


def counted_by_layer(run: Run, kind: SelectionKind, sizes: Sequence[int]) -> LayerBlocks:
    """Of records past top-k, those of the prompt too, as in the summary."""
    found = LayerBlocks(len(kind.layers), sizes)
    trace = run.manifest["trace"]
    is_blocks = trace["level"] == "blocks"
    for request in run.all_selections():
        if found.num_records >= MAX_RECORDS:
            found.is_whole = False
            break
        found.num_requests += 1
        for (layer_id, _), layer in request.layers.items():
            top_k = kind.layers[layer_id].top_k
            sparse = kind.visible(layer.seq_len) > top_k
            if not sparse.any():
                continue
            rows = _only(layer, sparse)
            found.records[layer_id] += len(rows)
            found.num_records += len(rows)
            id_tokens = trace["block_size_tokens"] if is_blocks else kind.unit_tokens
            num_ids = np.full(len(rows), top_k) if is_blocks else np.diff(rows.ptr)
            for size in sizes:
                found.sums[size][:, layer_id] += _sums(kind, rows, id_tokens, num_ids, size)
    return found


def _only(layer: LayerSelections, kept: np.ndarray) -> LayerSelections:
    """The marked steps, (T,) bool, their ids ascending."""
    sizes = np.diff(layer.ptr)
    row = np.repeat(np.arange(len(layer)), sizes)
    chosen = kept[row]
    ids, row = layer.ids[chosen], row[chosen]
    if np.any((np.diff(ids) < 0) & (np.diff(row) == 0)):  # recorded in the order of the scores
        ids = ids[np.lexsort((ids, row))]
    ptr = np.concatenate([[0], np.cumsum(sizes[kept])]).astype(np.int64)
    return LayerSelections(
        layer.step_idx[kept], layer.seq_len[kept], layer.forward_idx[kept], layer.phase[kept], ids, ptr
    )


def _sums(
    kind: SelectionKind, rows: LayerSelections, id_tokens: int, num_ids: np.ndarray, size: int
) -> tuple[float, ...]:
    """Over the rows, in the order of `SELECTORS`."""
    seq_len = rows.seq_len
    if size % id_tokens:
        touched = np.diff(touched_blocks(rows, id_tokens, size).ptr)
    else:
        touched = count_blocks(rows.ids, rows.ptr, size // id_tokens)
    context = context_blocks(seq_len, size)
    if kind.unit_tokens == 1:
        uniform, recency = uniform_blocks(seq_len, num_ids, size), recency_blocks(seq_len, num_ids, size)
        return float(touched.sum()), float(uniform.sum()), float(recency.sum()), float(context.sum())
    pairs, counts = np.unique(np.stack([seq_len, num_ids]), axis=1, return_counts=True)
    expected = np.array([unit_blocks(kind, n, k, size) for n, k in pairs.T.tolist()])  # (P, 2)
    uniform, recency = expected.T @ counts
    return float(touched.sum()), float(uniform), float(recency), float(context.sum())


def _answer(touched: Sequence[Mapping[str, Any]]) -> str:
    def one(row: Mapping[str, Any]) -> str:
        whole = row["context_mean"]
        return (
            f"{row['mean']:,.1f} of {whole:,.1f} blocks of {row['block_size_tokens']} tokens "
            f"({row['mean'] / whole:.1%}; uniform {row['uniform_mean'] / whole:.1%})"
        )

    return f"A step of a layer touches {', '.join(map(one, touched))}."


def _over_all(touched: Sequence[Mapping[str, Any]]) -> str:
    values = [
        Bar(
            f"{row['block_size_tokens']}",
            row["mean"] / row["context_mean"],
            [row[key] / row["context_mean"] for key in ("uniform_mean", "recency_mean")],
        )
        for row in touched
    ]
    return bars(
        "Share of the context's blocks that a step touches, by block size", _answer(touched),
        "block size (tokens)", Axis("blocks touched, of the context's", 0, 1, share=True), values,
        ("measured, all layers", "uniform selector", "recency selector"), whiskers=False,
    )  # fmt: skip


def _by_layer(size: int, means: np.ndarray) -> str:
    measured, uniform, recency, context = means
    layers = np.flatnonzero(np.isfinite(measured))
    values = [
        Bar(f"{i}", measured[i] / context[i], [uniform[i] / context[i], recency[i] / context[i]])
        for i in layers
    ]
    most, least = layers[np.argmax(measured[layers])], layers[np.argmin(measured[layers])]
    title = f"By layer, blocks of {size} tokens"
    desc = (
        f"Most in layer {most} ({measured[most]:.1f} blocks), least in layer {least} ({measured[least]:.1f})."
    )
    names = ("measured", "uniform selector", "recency selector")
    y = Axis("blocks touched, of the context's", 0, 1, share=True)
    return f"<h3>{told(title)}</h3>" + bars(
        title, desc, "layer", y, values, names, whiskers=False, height=230
    )


def _rows_over_all(touched: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for row in touched:
        keys = ("mean", "uniform_mean", "recency_mean", "context_mean")
        yield "all", number(row["block_size_tokens"]), *(number(row[key], ",.1f") for key in keys)


def _rows_by_layer(found: LayerBlocks) -> Iterator[Row]:
    for size in found.sizes:
        for layer, means in enumerate(found.means(size).T):
            if found.records[layer]:
                yield f"{layer}", number(size), *(number(float(mean), ",.1f") for mean in means)


def _note(material: Material, found: LayerBlocks | None) -> str:
    sparse = material.summary["counts"]["sparse_records"]
    note = (
        f"A block is touched if a selected token lies in it; mean over the {sparse:,} records past top-k, of "
        "the blocks that the whole context has. Uniform: expected of as many tokens drawn at random; "
        "recency: the newest ones. Both are exact expectations, not measured."
    )
    if found is None:
        return f"{note} By layer records of level stats do not tell."
    which = "all" if found.is_whole else "the first"
    requests = f"{found.num_requests} request{'s' if found.num_requests > 1 else ''}"
    return f"{note} By layer: {found.num_records:,} of these, {which} {requests}."
