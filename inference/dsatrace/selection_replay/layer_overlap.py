"""How much the layers of one request select the same, and which of them could share an index.

A *full* layer computes its index and selects; a *shared* one uses the selection of the nearest full layer
before it. Layers are comparable only where they choose from the same ids; a request whose layers have
several units is measured once per unit.

    overlap = LayerOverlap.of({0: steps_0, 1: steps_1, 2: steps_2}) + other_request
    overlap.recalls()[0][2]                           # share of layer 2's ids that layer 0 selects too
    suggest_sharing(overlap, recall=0.9).letters      # "FSF"
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.selection_replay.bits import ONE, popcount
from dsatrace.selection_replay.nulls import CHANCE_UNIT, expected_shared
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.sums import Sums, shares

_CHUNK_IDS = 1 << 22  # ids of all layers that are copied together, 16 MiB


@dataclasses.dataclass(frozen=True)
class LayerOverlap(Sums):
    """|S_l & S_m| of the same step, summed over counted steps, for all pairs of layers."""

    SAME = ("layers",)

    layers: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]
    """(L, L) ids in both; on the diagonal those that the layer selects."""
    chance: tuple[tuple[int, ...], ...]
    """(L, L) the same of two random sets, in CHANCE_UNIT."""

    @classmethod
    def of(cls, layers: Mapping[int, Steps]) -> LayerOverlap:
        """Raises ValueError where layers differ in their steps or in what they choose from."""
        streams = [layers[layer] for layer in sorted(layers)]
        first = streams[0]
        for layer, steps in zip(sorted(layers), streams, strict=True):
            if steps.num_warm != first.num_warm or not np.array_equal(steps.visible, first.visible):
                raise ValueError(f"layers {min(layers)} and {layer} do not choose from the same ids")
        sizes, group = np.unique(
            [steps.sizes[first.num_warm :] for steps in streams], axis=0, return_inverse=True
        )
        visible = first.visible[first.num_warm :]
        chance = [[expected_shared(one, other, visible) for other in sizes] for one in sizes]
        return cls(
            tuple(sorted(layers)),
            tuple(map(tuple, _shared(streams).tolist())),
            tuple(tuple(chance[a][b] for b in group.tolist()) for a in group.tolist()),
        )

    @property
    def selected(self) -> tuple[int, ...]:
        """(L,) ids that each layer selects."""
        return tuple(row[index] for index, row in enumerate(self.shared))

    def recalls(self) -> tuple[tuple[float | None, ...], ...]:
        """(L, L) share of layer m's ids that layer l selects too, at [l][m]."""
        return tuple(shares(row, self.selected) for row in self.shared)

    def chance_recalls(self) -> tuple[tuple[float | None, ...], ...]:
        """(L, L) the same for a random set of layer l's size: k_l / N."""
        return tuple(shares(row, self.selected, CHANCE_UNIT) for row in self.chance)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Which layers compute an index, and what the others lose by using it."""

    layers: tuple[int, ...]
    sources: tuple[int, ...]  # per layer the one whose selection it uses; itself where it is full
    selected: tuple[int, ...]  # per layer the ids that it selects itself
    kept: tuple[int, ...]  # per layer those of them that its source selects too

    @property
    def letters(self) -> str:
        """One letter per layer: F computes its index, S uses the last F's."""
        pairs = zip(self.layers, self.sources, strict=True)
        return "".join("F" if layer == source else "S" for layer, source in pairs)

    @property
    def num_full(self) -> int:
        return self.letters.count("F")

    def recalls(self) -> tuple[float | None, ...]:
        """(L,) share of each layer's ids that stay; 1 - this is what sharing loses."""
        return shares(self.kept, self.selected)

    def recall_of_shared(self) -> float | None:
        """The same of all shared layers together; None where there is none."""
        rows = zip(self.letters, self.kept, self.selected, strict=True)
        shared = [(kept, selected) for letter, kept, selected in rows if letter == "S"]
        return shares([sum(kept for kept, _ in shared)], [sum(selected for _, selected in shared)])[0]


def sharing_of(overlap: LayerOverlap, full: Collection[int]) -> Sharing:
    """What a given pattern loses. Raises ValueError where the first layer is not among the `full` ones."""
    if not overlap.layers or overlap.layers[0] not in full:
        raise ValueError("the first layer has no earlier one to share with: it must be a full layer")
    sources: list[int] = []
    for index, layer in enumerate(overlap.layers):
        sources.append(index if layer in full else sources[-1])
    kept = tuple(overlap.shared[source][index] for index, source in enumerate(sources))
    return Sharing(overlap.layers, tuple(overlap.layers[each] for each in sources), overlap.selected, kept)


def suggest_sharing(overlap: LayerOverlap, recall: float) -> Sharing:
    """The pattern that loses the fewest ids, among those with the fewest full layers.

    Every shared layer keeps at least `recall`, up to 1, of its ids. It is the optimum, not a greedy guess:
    between two full layers nothing depends on the rest.
    """
    num_layers = len(overlap.layers)
    lost = [[overlap.selected[m] - row[m] for m in range(num_layers)] for row in overlap.shared]
    enough = [[row[m] >= recall * overlap.selected[m] for m in range(num_layers)] for row in overlap.shared]
    # best[end]: the fewest ids lost in the layers before `end`, and the full layers that lose them.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0, ())}
    while num_layers not in best:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (before, full) in best.items():
            total = before
            for end in range(start + 1, num_layers + 1):  # layers from `start` to before `end` share
                if not enough[start][end - 1]:
                    break
                total += lost[start][end - 1]
                if total < longer.get(end, (math.inf, ()))[0]:
                    longer[end] = total, (*full, overlap.layers[start])
        best = longer
    return sharing_of(overlap, best[num_layers][1])


def _shared(streams: list[Steps]) -> np.ndarray:
    """(L, L) int64; the layers of a few steps are laid side by side, so that memory stays small."""
    shared = np.zeros((len(streams), len(streams)), np.int64)
    ends = np.sum([steps.ptr for steps in streams], axis=0)
    num_ids = max(steps.num_ids for steps in streams)
    step, num_steps = streams[0].num_warm, streams[0].num_steps
    while step < num_steps:
        end = max(step + 1, int(np.searchsorted(ends, ends[step] + _CHUNK_IDS, side="right")) - 1)
        end = min(end, num_steps)
        parts = [steps.ids[steps.ptr[step] : steps.ptr[end]] for steps in streams]
        starts = np.cumsum([0, *map(len, parts[:-1])])
        ptr = np.array([steps.ptr[step : end + 1] - steps.ptr[step] for steps in streams]) + starts[:, None]
        _count_pairs(np.concatenate(parts), ptr, num_ids, shared)
        step = end
    return np.triu(shared) + np.triu(shared, 1).T


@cached_njit(nogil=True)
def _count_pairs(ids, ptr, num_ids, shared):  # type: ignore[no-untyped-def]
    """Adds to shared[l, m], l <= m, the ids that both layers select in the same step.

    Per step the ids that any layer selects are numbered, so that a layer's set is a short row of bits
    whatever the context: an id costs one look-up, a pair of layers some hundred words.
    """
    num_layers, num_steps = ptr.shape[0], ptr.shape[1] - 1
    seen = np.full(num_ids, -1, np.int64)  # the step that numbered the id
    number = np.empty(num_ids, np.int64)
    most = 0
    for step in range(num_steps):
        most = max(most, (ptr[:, step + 1] - ptr[:, step]).sum())
    rows = np.zeros((num_layers, most // 64 + 1), np.uint64)
    for step in range(num_steps):
        num = 0
        for layer in range(num_layers):
            row = rows[layer]
            for place in range(ptr[layer, step], ptr[layer, step + 1]):
                id_ = ids[place]
                if seen[id_] != step:
                    seen[id_] = step
                    number[id_] = num
                    num += 1
                bit = number[id_]
                row[bit >> 6] |= ONE << np.uint64(bit & 63)
        words = num // 64 + 1
        for layer in range(num_layers):
            for other in range(layer, num_layers):
                total = np.int64(0)
                one, two = rows[layer, :words], rows[other, :words]
                for word in range(words):
                    total += popcount(one[word] & two[word])
                shared[layer, other] += total
        rows[:, :words] = 0
