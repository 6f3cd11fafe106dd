"""Two runs of the same tokens, row by row: where their selections differ, and what ties explain.

A row is what one layer, or one of its KV heads, selected in one step of a request. Requests are matched by
id or, where the runs share none, by order, and refused if their prompts cannot be the same. Records hold no
tokens: where two runs' answers part, later rows compare different contexts. Holds a few requests at a time,
and every row that differs.

    found = diff(load("outputs/fp32"), load("outputs/bf16"))
    found.num_differing, found.first              # 12, Row(request_id="p0", layer_id=3, step_idx=7, ...)
    found.to_json()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.load import Run
from dsatrace.trace.selections import LayerSelections, LayerSet, RequestSelections, read_selections

ROUNDING = {"bf16": 2.0**-8, "fp8": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20, "fp64": 2.0**-44}
"""Of a score, relative, by the model's numbers; of several roundings where one would be too small to see."""
FP8_CACHE = 2.0**-4  # the same where one model alone keeps its indexer's keys or its latents in fp8
MAX_ROWS = 100
"""Differing rows that the JSON holds, the first ones."""


@dataclasses.dataclass
class Row:
    """A row that differs."""

    request_id: str
    layer_id: int
    kv_head: int
    step_idx: int
    seq_len: int
    forward_idx: int  # the first run's
    num_shared: int
    only_a: list[int]  # ids
    only_b: list[int]
    margins: tuple[float | None, float | None] = (None, None)  # k-th minus (k+1)-th score, relative

    def is_tie(self, tie: float) -> bool:
        """Whether scores that are equal as far as `tie` tells explain it, in one of the runs.

        An estimate: scores near the k-th lie about its margin apart, so that many margins as ids moved.
        """
        moved = max(len(self.only_a), len(self.only_b))
        return any(margin is not None and margin * moved <= tie for margin in self.margins)

    def to_json(self, tie: float) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "margins": list(self.margins), "is_tie": self.is_tie(tie)}


@dataclasses.dataclass
class LayerDiff:
    """One layer's rows, KV heads together."""

    layer_id: int
    rows: int = 0  # that both runs have
    only_one: int = 0  # that one has
    differing: int = 0  # of `rows`
    shared_ids: int = 0
    all_ids: int = 0  # of the unions
    ties: int = 0  # of `differing`, those that ties explain

    @property
    def overlap(self) -> float | None:
        """Intersection over union, of all rows' ids together."""
        return self.shared_ids / self.all_ids if self.all_ids else None

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "overlap": self.overlap}


class Diff:
    """What was found. Steps count from the prompt's last row, -1."""

    def __init__(self, names: tuple[str, str], num_layers: int, tie: float, matched_by: str) -> None:
        self.names = names
        self.tie = tie
        self.matched_by = matched_by
        self.num_requests = 0
        self.layers = {layer: LayerDiff(layer) for layer in range(num_layers)}
        self.rows: list[Row] = []  # that differ, in the order in which the first run computed them
        self._steps = np.zeros((2, num_layers, 0), np.int64)  # ids shared, and all, by layer and step + 1

    @property
    def num_rows(self) -> int:
        return sum(layer.rows + layer.only_one for layer in self.layers.values())

    @property
    def num_differing(self) -> int:
        """Rows whose sets differ, and rows that one of the runs lacks."""
        return sum(layer.differing + layer.only_one for layer in self.layers.values())

    @property
    def first(self) -> Row | None:
        return self.rows[0] if self.rows else None

    def overlap_by_step(self) -> np.ndarray:
        """(layers, steps + 1) intersection over union, nan where there is no row."""
        shared, of_all = self._steps
        share: np.ndarray = np.divide(shared, of_all, out=np.full(shared.shape, np.nan), where=of_all > 0)
        return share

    def count(self, name: LayerSet, steps: np.ndarray, shared: np.ndarray, of_all: np.ndarray) -> None:
        """Adds the rows that both runs have of one set: (R,) each."""
        layer = self.layers[name.layer_id]
        layer.rows += len(steps)
        layer.differing += int(np.count_nonzero(shared < of_all))
        layer.shared_ids += int(shared.sum())
        layer.all_ids += int(of_all.sum())
        steps = np.maximum(steps, -1)  # all rows of a prompt are one column
        missing = int(steps.max(initial=-1)) + 2 - self._steps.shape[2]
        if missing > 0:
            self._steps = np.pad(self._steps, ((0, 0), (0, 0), (0, missing)))
        np.add.at(self._steps[0, name.layer_id], steps + 1, shared)
        np.add.at(self._steps[1, name.layer_id], steps + 1, of_all)

    def settle(self) -> None:
        """Puts the differing rows into order, and counts their ties."""
        self.rows.sort(key=lambda row: (row.forward_idx, row.layer_id, row.kv_head))
        for row in self.rows:
            self.layers[row.layer_id].ties += row.is_tie(self.tie)

    def to_json(self) -> dict[str, Any]:
        by_step = [
            [None if np.isnan(share) else share for share in row] for row in self.overlap_by_step().tolist()
        ]
        return {
            "runs": list(self.names),
            "matched_by": self.matched_by,
            "num_requests": self.num_requests,
            "num_rows": self.num_rows,
            "num_differing": self.num_differing,
            "tie": self.tie,
            "first": self.first and self.first.to_json(self.tie),
            "layers": [layer.to_json() for layer in self.layers.values() if layer.rows + layer.only_one],
            "rows": [row.to_json(self.tie) for row in self.rows[:MAX_ROWS]],
            "overlap_by_step": by_step,
        }


def diff(a: Run, b: Run, tie: float | None = None) -> Diff:
    """Compares every row. Scores that differ by `tie` or less, as a share of the row's largest, are equal;
    by default that is the coarser model's rounding.

    Raises `UserError` for runs that cannot be of the same tokens, or whose ids are of other kinds.
    """
    kind = _same_kind(a, b)
    pairs, matched_by = _matched(a, b)
    _require_same_prompts(a, b, pairs)
    tie = _rounding(a, b) if tie is None else tie
    found = Diff((str(a.folder), str(b.folder)), len(kind.layers), tie, matched_by)
    for one, other in _requests(a, b, pairs):
        found.num_requests += one is not None and other is not None
        _compare(found, a, b, one, other)
    for index, run in enumerate((a, b)):
        _add_margins(found, run, index, {name: other for other, name in pairs.items()} if index else None)
    found.settle()
    return found


def _same_kind(a: Run, b: Run) -> SelectionKind:
    kinds = []
    for run in (a, b):
        if run.kind is None or run.manifest["selections"] == "none":
            raise UserError(f"{run.folder}: no model ran, so there are no selections to compare")
        kinds.append(run.kind)
    told = [
        {
            "unit": kind.unit,
            "tokens per id": kind.unit_tokens,
            "kind of id": kind.id_kind,
            "ids to choose from": kind.num_ids,
            "layers": len(kind.layers),
            "level": run.manifest["trace"]["level"],
            **{f"top-k of layer {i}": layer.top_k for i, layer in enumerate(kind.layers)},
            **{f"sets of layer {i}": layer.heads for i, layer in enumerate(kind.layers)},
        }
        for run, kind in zip((a, b), kinds, strict=True)
    ]
    if told[0]["level"] == told[1]["level"] == "blocks":
        for one, run in zip(told, (a, b), strict=True):
            one["block size"] = run.manifest["trace"]["block_size_tokens"]
    for name, value in told[0].items():
        if told[1].get(name) != value:
            raise UserError(
                f"{a.folder} and {b.folder} cannot be compared: {name}: {value} and {told[1].get(name)}"
            )
    return kinds[0]


def _matched(a: Run, b: Run) -> tuple[dict[str, str], str]:
    """The first run's requests with the second's, and how that was found."""
    ids_a, ids_b = a.request_ids, b.request_ids
    common = set(ids_a) & set(ids_b)
    if common:
        return {name: name for name in ids_a if name in common}, "id"
    if len(ids_a) != len(ids_b) or not ids_a:
        raise UserError(
            f"{a.folder} and {b.folder}: no request has one id in both, and {len(ids_a)} cannot be matched "
            f"with {len(ids_b)} by order; compare runs of the same requests"
        )
    return dict(zip(ids_a, ids_b, strict=True)), "order"


def _require_same_prompts(a: Run, b: Run, pairs: dict[str, str]) -> None:
    facts = []
    for run in (a, b):
        lines = {line["request_id"]: line["num_prompt_tokens"] for line in run.reader.requests()}
        facts.append({"prompt tokens": lines})
    keyed = [[run.manifest["trace"][f"prefix_key_{of}"] for of in ("id", "tokens")] for run in (a, b)]
    if keyed[0] == keyed[1]:
        for known, run in zip(facts, (a, b), strict=True):
            known["prompt digest"] = _digests(run)
    for what, of_a in facts[0].items():
        for one, other in pairs.items():
            left, right = of_a.get(one), facts[1][what].get(other)
            if left is not None and right is not None and left != right:
                raise UserError(
                    f"{a.folder} and {b.folder}: not the same tokens: request {one!r}"
                    + (f", {other!r} in the second" if one != other else "")
                    + f": {what} {left} and {right}"
                )


def _digests(run: Run) -> dict[str, Any]:
    """Of each prompt's first tokens; empty where the door has none."""
    found: dict[str, Any] = {}
    has_keys = run.kind is not None and run.kind.holds("prefix")
    for batch in run.records.batches(("request_id", "prefix_key")) if has_keys else ():
        for name, key in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if key is not None:
                found.setdefault(name, key)
    return found


def _rounding(a: Run, b: Run) -> float:
    """The coarser model's; where one alone keeps its cache in fp8, that of fp8."""
    configs = [run.manifest["model_config"] for run in (a, b)]
    if any(len({bool(config.get(key)) for config in configs}) > 1 for key in ("index_fp8", "latent_fp8")):
        return FP8_CACHE
    long = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
    names = [
        f"{config.get('dtype') or config.get('torch_dtype')}".removeprefix("torch.") for config in configs
    ]
    return max(ROUNDING.get(long.get(name, name), max(ROUNDING.values())) for name in names)


def _requests(
    a: Run, b: Run, pairs: dict[str, str]
) -> Iterator[tuple[RequestSelections | None, RequestSelections | None]]:
    """Matched requests, then those of one run. Both are read along where they have one order."""
    if list(pairs) == list(a.request_ids) and list(pairs.values()) == list(b.request_ids):
        yield from zip(read_selections(a.reader), read_selections(b.reader), strict=True)
        return
    for one in read_selections(a.reader):
        other = pairs.get(one.request_id)
        yield one, None if other is None else b.request_selections(other)
    for name in b.request_ids:
        if name not in pairs.values():
            yield None, b.request_selections(name)


def _compare(
    found: Diff, a: Run, b: Run, one: RequestSelections | None, other: RequestSelections | None
) -> None:
    names = {*(one.layers if one else ()), *(other.layers if other else ())}
    for name in sorted(names):
        left = one.layers.get(name) if one else None
        right = other.layers.get(name) if other else None
        if left is None or right is None:
            found.layers[name.layer_id].only_one += len(left or right or ())
            continue
        assert one is not None
        steps, i, j = np.intersect1d(left.step_idx, right.step_idx, return_indices=True)
        _require_same_lengths(a, b, one.request_id, name, left, right, steps, i, j)
        _compare_rows(found, one.request_id, name, left, right)


def _require_same_lengths(
    a: Run,
    b: Run,
    request_id: str,
    name: LayerSet,
    left: LayerSelections,
    right: LayerSelections,
    steps: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
) -> None:
    others = np.flatnonzero((steps >= 0) & (left.seq_len[i] != right.seq_len[j]))
    if len(others):
        at = others[0]
        raise UserError(
            f"{a.folder} and {b.folder}: not the same tokens: request {request_id!r}, layer {name.layer_id}, "
            f"step {steps[at]}: sees {left.seq_len[i[at]]} and {right.seq_len[j[at]]} positions"
        )


def _compare_rows(
    found: Diff, request_id: str, name: LayerSet, left: LayerSelections, right: LayerSelections
) -> None:
    """Rows are the same where step and length are: a prompt's rows are told apart by their lengths."""
    keys = [one.step_idx * (1 << 32) + one.seq_len for one in (left, right)]
    _, i, j = np.intersect1d(keys[0], keys[1], return_indices=True)
    found.layers[name.layer_id].only_one += len(left) + len(right) - 2 * len(i)
    places = []
    for one, chosen in ((left, i), (right, j)):
        row = np.full(len(one), -1, np.int64)
        row[chosen] = np.arange(len(chosen))
        of_id = np.repeat(row, np.diff(one.ptr))
        places.append(np.unique((of_id * (1 << 32) + one.ids)[of_id >= 0]))
    both = np.intersect1d(places[0], places[1], assume_unique=True)
    shared, of_a, of_b = (np.bincount(one >> 32, minlength=len(i)) for one in (both, *places))
    found.count(name, left.step_idx[i], shared, of_a + of_b - shared)
    for r in np.flatnonzero((shared < of_a) | (shared < of_b)).tolist():
        at, to = int(i[r]), int(j[r])
        mine = left.ids[left.ptr[at] : left.ptr[at + 1]]
        its = right.ids[right.ptr[to] : right.ptr[to + 1]]
        found.rows.append(
            Row(
                request_id,
                name.layer_id,
                name.kv_head,
                int(left.step_idx[at]),
                int(left.seq_len[at]),
                int(left.forward_idx[at]),
                int(shared[r]),
                np.setdiff1d(mine, its).tolist(),
                np.setdiff1d(its, mine).tolist(),
            )
        )


_KEYS = ("request_id", "layer_id", "kv_head", "step_idx", "seq_len_current")
_SCORES = ("kth_margin", "scores_stats_min", "scores_stats_max", "scores_topk")


def _add_margins(found: Diff, run: Run, index: int, names: dict[str, str] | None) -> None:
    """The relative margins of the rows that differ; `names` gives the first run's ids of the requests."""
    wanted: dict[tuple[Any, ...], Row] = {
        (row.request_id, row.layer_id, row.kv_head, row.step_idx, row.seq_len): row for row in found.rows
    }
    if not wanted:
        return
    for batch in run.records.batches((*_KEYS, *_SCORES)):
        columns = [column.to_pylist() for column in batch.columns]
        for request_id, layer, head, step, seq_len, margin, low, high, scores in zip(*columns, strict=True):
            name = request_id if names is None else names.get(request_id)
            row = wanted.get((name, layer, head or 0, step, seq_len))
            if row is None or margin is None:
                continue
            ends = [abs(end) for end in (low, high, *(scores or ())) if end is not None]
            largest = max(ends, default=0.0)
            relative = margin / largest if largest else 0.0 if margin == 0 else None
            row.margins = (relative, row.margins[1]) if index == 0 else (row.margins[0], relative)
