"""What a replay found: sums per layer and per request, which add. `figures` derives the shares from them.

Results of parts of a run add up to that of the whole, bit for bit, since all of it is whole numbers.

    total = replay_part(...)
    total.add(replay_part(...), "outputs/mine")
    total.write(path); Result.read(path)
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.files import read_json, write_atomically
from dsatrace.selection_replay.layer_overlap import LayerOverlap
from dsatrace.selection_replay.locality import MEASURES
from dsatrace.selection_replay.lru import LruResult
from dsatrace.selection_replay.nulls import expected_shared
from dsatrace.selection_replay.predictors import PREDICTORS, Prediction
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.sums import Sums, histogram_of

RESULT_VERSION = 2
RUN = "run"
"""The stream of the run's own selections, among its nulls."""
_ADDED = ("buffers", "locality", "between")


@dataclasses.dataclass(frozen=True)
class Asked(Sums):
    """What the counted steps of some buffers asked for."""

    buffers: int
    steps: int
    selected: int  # ids
    step_sizes: Counter[int]  # ids of a step -> steps, the warm-up's too
    at_step: Counter[int]  # counted step, from 0 -> buffers that have it
    contexts: Counter[int]  # ids that the last step could choose from -> buffers
    chance: int  # of the selected ids, those that a random set of the same size would hold, in CHANCE_UNIT

    @classmethod
    def of(cls, steps: Steps) -> Asked:
        counted, visible = steps.sizes[steps.counted], steps.visible[steps.counted]
        chance = expected_shared(counted, counted, visible)
        at_step, contexts = Counter(range(len(counted))), Counter(steps.visible[-1:].tolist())
        sizes = histogram_of(steps.sizes)
        return cls(1, len(counted), int(counted.sum()), sizes, at_step, contexts, chance)


@dataclasses.dataclass(frozen=True)
class Cell(Sums):
    """One policy at one size, over the buffers that hold every step."""

    buffers: int
    too_small: int  # buffers that do not: a step of theirs is larger, and they are not counted below
    ids: int  # the buffers' sizes, summed
    steps: int
    selected: int
    missed: int
    missed_steps: int  # steps that missed any id
    evictions: int
    misses: Counter[int]  # missed ids of a step -> steps
    by_seed: tuple[int, ...] | None  # missed ids by seed, where chance decides
    ages: Counter[int] | None  # steps since a missed id was last selected -> ids; LRU only
    never: int | None  # missed ids that were not selected before; LRU only
    missed_at: Counter[int] | None  # counted step -> missed ids; LRU only

    @classmethod
    def unfit(cls, has_seeds: int, has_ages: bool) -> Cell:
        zeros = (0,) * has_seeds if has_seeds else None
        ages = Counter[int]() if has_ages else None
        never, missed_at = (0, Counter[int]()) if has_ages else (None, None)
        return cls(0, 1, 0, 0, 0, 0, 0, 0, Counter(), zeros, ages, never, missed_at)


@dataclasses.dataclass(frozen=True)
class Misses(Sums):
    """A cell of one request."""

    selected: int
    missed: int


@dataclasses.dataclass(frozen=True)
class AnswerSteps(Sums):
    """Decode steps of a request that was kept from ending its answer."""

    steps: int
    past: int  # of those, steps that lie past the answer
    untold: int  # steps of which nothing says whether they do


@dataclasses.dataclass(frozen=True)
class SharedTokens(Sums):
    """What a request begins with and another had before."""

    requests: int  # that begin so
    tokens: int
    untold: int  # tokens that some other request had before, nobody knows which; not counted as shared


_PER_OCTAVE = 64


@dataclasses.dataclass(frozen=True)
class Curve(Sums):
    """LRU at every size: ids and steps by the smallest buffer that serves them, on a grid of sizes.

    The grid has all sizes up to 128, and 64 per octave above, so all usual multiples of all usual top-k.
    """

    serves: Counter[int]  # size on the grid -> ids that hit from there on
    never: int  # ids that miss at every size
    serves_steps: Counter[int]  # size on the grid -> steps without a miss from there on
    never_steps: int

    @classmethod
    def of(cls, result: LruResult) -> Curve:
        served, steps = _on_grid(result.depths), _on_grid(result.deepest)
        if result.pinned:
            served[1] += result.pinned
        return cls(served, result.never, steps, result.deepest_never)

    def misses(self, largest_step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sizes from `largest_step` on, (P,), and ids and steps that miss there, (P,) each."""
        sizes = np.array(sorted({largest_step, *self.serves, *self.serves_steps}), np.int64)
        sizes = sizes[sizes >= largest_step]
        return (
            sizes,
            _above(self.serves, sizes) + self.never,
            _above(self.serves_steps, sizes) + self.never_steps,
        )


def _on_grid(depths: np.ndarray) -> Counter[int]:
    """(D,) counts by depth, as counts by the smallest size on the grid that is above the depth."""
    depth = np.flatnonzero(depths)
    size = depth + 1
    unit = 1 << np.maximum(np.ceil(np.log2((size + 1) / (2 * _PER_OCTAVE))), 0).astype(np.int64)
    points, first = np.unique(-(-size // unit) * unit, return_index=True)  # they ascend with the depth
    counts = np.add.reduceat(depths[depth], first) if len(first) else first
    return Counter(dict(zip(points.tolist(), counts.tolist(), strict=True)))


def _above(counts: Counter[int], sizes: np.ndarray) -> np.ndarray:
    values = np.array(sorted(counts), np.int64)
    numbers = np.array([counts[value] for value in values.tolist()], np.int64)
    up_to = np.concatenate(([0], np.cumsum(numbers)))
    above: np.ndarray = up_to[-1] - up_to[np.searchsorted(values, sizes, side="right")]
    return above


Tree = dict[str, Any]
"""Nested by name; its leaves are `Sums`."""

LEAVES: dict[str, type[Sums]] = {
    "asked": Asked,
    "curve": Curve,
    **MEASURES,
    **dict.fromkeys(PREDICTORS, Prediction),
    "layer_overlap": LayerOverlap,
    "answer": AnswerSteps,
    "prefix": SharedTokens,
}
"""Of a result's trees, by name."""
CELLS: dict[str, type[Sums]] = {"policies": Cell, "misses": Misses}
"""What stands under these names, by policy and size."""


@dataclasses.dataclass
class Result:
    """Of some requests. `header` says what all of them share; adding two that differ in it is refused."""

    header: dict[str, Any]  # the settings, the model and what its ids are
    requests: Tree
    """By "run/request": what is told of it, and its `misses`, which the intervals are drawn from; of requests
    that share buffers the first has those of all."""
    buffers: Tree  # by layer, or "all" where a request's layers share one; then by stream: run, or a null
    locality: Tree  # by layer and stream
    between: Tree  # what compares layers: by the layers that choose from the same ids

    def add(self, other: Result, name: str) -> None:
        """Raises `UserError`, which begins with `name`, if both hold a request, or are of two kinds."""
        for key, value in self.header.items():
            if other.header[key] != value:
                raise UserError(
                    f"{name}: its {key.replace('_', ' ')} is {_short(other.header[key])}, not "
                    f"{_short(value)} as before; replay runs of one model, with one set of flags"
                )
        if twice := self.requests.keys() & other.requests.keys():
            raise UserError(f"{name}: request {min(twice)} stands in another file too; name each run once")
        self.requests.update(other.requests)
        for tree in _ADDED:
            add_to(getattr(self, tree), getattr(other, tree))

    def to_json(self) -> dict[str, Any]:
        trees = {name: _to_json(getattr(self, name)) for name in ("requests", *_ADDED)}
        return {"result_version": RESULT_VERSION, "header": self.header, **trees}

    @classmethod
    def from_json(cls, record: Any, name: str) -> Result:
        """Raises `UserError` for what `to_json` did not make."""
        if not isinstance(record, Mapping) or record.get("result_version") != RESULT_VERSION:
            raise UserError(f"{name}: no result of this version of `dsatrace replay`; replay the runs again")
        try:
            return cls(
                record["header"],
                *(_from_json(record[tree]) for tree in ("requests", *_ADDED)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{name}: damaged: {type(error).__name__} {error}; replay the runs again"
            ) from error

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.to_json(), separators=(",", ":")).encode())

    @classmethod
    def read(cls, path: Path) -> Result:
        record = read_json(path, broken="; replay the runs again")
        return cls.from_json(record.get("sums", record) if isinstance(record, dict) else record, str(path))


def added(trees: Iterable[Tree]) -> Tree:
    """The sum of trees of one shape."""
    total: Tree = {}
    for tree in trees:
        add_to(total, tree)
    return total


def add_to(total: Tree, part: Tree) -> None:
    """Adds a tree of the same shape, or of other names."""
    for name, value in part.items():
        if isinstance(value, Sums):
            total[name] = total[name] + value if name in total else value
        else:
            add_to(total.setdefault(name, {}), value)


def _to_json(tree: Tree) -> Tree:
    return {
        name: value.to_json() if isinstance(value, Sums) else _to_json(value) for name, value in tree.items()
    }


def _from_json(stored: Mapping[str, Any], above: tuple[str, ...] = ()) -> Tree:
    tree: Tree = {}
    for name, value in stored.items():
        kind = CELLS.get(above[-2]) if len(above) > 1 and above[-2] in CELLS else LEAVES.get(name)
        tree[name] = kind.from_json(value) if kind else _from_json(value, (*above, name))
    return tree


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
