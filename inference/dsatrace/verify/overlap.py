"""Shares of a selection, record by record: what the step and the layer before held too, and of the answer.

Part of the second implementation. Keeps each live request's first and last selection.

    overlaps = Overlaps(with_tokens=True)
    overlaps.add(record)             # sparse ones, in the order of the file
    overlaps.to_json()               # {"step_overlap": ..., "layer_overlap": ...}
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dsatrace.verify.selections import ENGINES, Selections

Record = Mapping[str, Any]
_OF_A_PAIR = ("request_id", "layer_id", "step_idx", "seq_len_current", "unique_token_pos_count")
Place = tuple[int, Any]
"""A layer and, where it has several sets, the KV head."""


def num_selected(record: Record) -> int:
    """Ids of a record, of whatever kind."""
    count: int = record.get("num_selected_ids", record["unique_token_pos_count"])
    return count


class Overlaps:
    """Share of a selection that the step before, and the layer before, held too; sparse records only."""

    def __init__(self, with_tokens: bool, kind: Selections = ENGINES) -> None:
        self._with_tokens = with_tokens
        self._kind = kind
        self._by_step = _Shares(kind)
        self._by_layer = _Shares(kind)
        self._layers: set[int] = set()
        selecting = sorted({one.layer for one in kind.sets})
        self._before = dict(zip(selecting, (-1, *selecting), strict=False))  # the last one that selects
        self._last: dict[str, dict[Place, tuple[int, Any]]] = {}  # request -> place -> step, selection
        self._first: dict[str, list[tuple[Record, Any]]] = {}  # request -> its first record of each layer

    def add(self, record: Record) -> None:
        step, layer = record["step_idx"], record["layer_id"]
        place = layer, record.get("kv_head")
        self._layers.add(layer)
        last = self._last.setdefault(record["request_id"], {})
        selected = self.selection(record)
        if place not in last:
            first = {name: record[name] for name in _OF_A_PAIR}
            self._first.setdefault(record["request_id"], []).append((first, selected))
        neighbours = [(self._by_step, step - 1, place)]
        # A selection may be another layer's; experts are others in each layer.
        if "source_layer" not in record and self._kind.unit != "expert":
            neighbours.append((self._by_layer, step, (self._before.get(layer, layer - 1), place[1])))
        for shares, at_step, at in neighbours:
            step_there, tokens = last.get(at, (None, ()))
            if step_there == at_step:
                shares.add(record, self.num_shared(selected, tokens))
        last[place] = (step, selected)

    def selection(self, record: Record) -> Any:
        """What is kept of a record's ids."""
        return array("i", record[self._kind.ids_field] if self._with_tokens else ())

    def num_shared(self, selected: Any, before: Any) -> int:
        return len(set(selected).intersection(before))

    def merge(self, later: Overlaps) -> None:
        """Adds what the records that follow these were found to share."""
        for request_id, firsts in later._first.items():
            last = self._last.get(request_id, {})
            for record, selected in firsts:
                step, tokens = last.get((record["layer_id"], None), (None, ()))
                if step == record["step_idx"] - 1:
                    self._by_step.add(record, self.num_shared(selected, tokens))
        self._by_step.merge(later._by_step)
        self._by_layer.merge(later._by_layer)
        self._layers |= later._layers
        for request_id, layers in later._last.items():
            self._last.setdefault(request_id, {}).update(layers)

    def forget(self, request_id: str) -> None:
        self._last.pop(request_id, None)
        self._first.pop(request_id, None)

    def to_json(self) -> dict[str, Any]:
        layers = self._layers if self._kind.is_engines else range(self._kind.num_layers)
        return {
            "step_overlap": self._by_step.to_json(layers, self._with_tokens),
            "layer_overlap": self._by_layer.to_json(layers, self._with_tokens),
        }


class _Shares:
    """Sums over compared selections; a step, all its sets together, is one pair."""

    def __init__(self, kind: Selections) -> None:
        self._kind = kind
        self._tokens = Counter[int]()  # by layer
        self._shared = Counter[int]()
        self._pairs = Counter[float]()  # a random selector's share -> pairs
        self._step: tuple[Any, ...] | None = None  # the one under way, and the sizes of its sets
        self._sizes: list[int] = []

    def add(self, record: Record, num_shared: int) -> None:
        layer, selected = record["layer_id"], num_selected(record)
        self._tokens[layer] += selected
        self._shared[layer] += num_shared
        step = record["request_id"], record["step_idx"], record["seq_len_current"]
        if step != self._step:
            self._end_pair()
            self._step = step
        self._sizes.append(selected)

    def _end_pair(self) -> None:
        """A random selector holds n of N ids, and so n / N of each set; sets weigh what they hold."""
        if self._step is not None:
            num_visible = self._kind.num_visible(self._step[2])
            self._pairs[sum(n * n for n in self._sizes) / (sum(self._sizes) * num_visible)] += 1
        self._step, self._sizes = None, []

    def merge(self, other: _Shares) -> None:
        self._end_pair()
        other._end_pair()
        self._tokens.update(other._tokens)
        self._shared.update(other._shared)
        self._pairs.update(other._pairs)

    def to_json(self, layers: Iterable[int], with_tokens: bool) -> dict[str, Any]:
        self._end_pair()
        pairs, tokens = self._pairs.total(), self._tokens.total()
        random = math.fsum(share * n for share, n in self._pairs.items()) / pairs if pairs else None
        if not tokens:
            return {"pairs": pairs, "mean": None, "random_mean": random, "per_layer": None}
        if not with_tokens:
            return {"pairs": pairs, "random_mean": random}
        shares = [
            self._shared[layer] / self._tokens[layer] if self._tokens[layer] else None
            for layer in sorted(layers)
        ]
        mean = self._shared.total() / tokens
        return {"pairs": pairs, "mean": mean, "random_mean": random, "per_layer": shares}


class Recalls:
    """Share of the answer's tokens that was selected, over sparse decode records."""

    def __init__(self) -> None:
        self._found: dict[int, Counter[int]] = {}  # layer -> needle tokens -> selected ones, summed
        self._records = Counter[int]()  # by layer
        self._contexts = Counter[float]()  # share of the positions that is selected -> records

    def add(self, record: Record) -> None:
        layer, needle = record["layer_id"], record["needle"]
        self._found.setdefault(layer, Counter())[needle["tokens"]] += needle["selected"]
        self._records[layer] += 1
        self._contexts[record["unique_token_pos_count"] / record["seq_len_current"]] += 1

    def merge(self, other: Recalls) -> None:
        for layer, found in other._found.items():
            self._found.setdefault(layer, Counter()).update(found)
        self._records.update(other._records)
        self._contexts.update(other._contexts)

    def to_json(self) -> dict[str, Any] | None:
        if not self._found:
            return None
        total = self._records.total()
        random = math.fsum(share * count for share, count in self._contexts.items())
        layers = range(max(self._found) + 1)
        return {
            "records": total,
            "mean": _recall(sum(self._found.values(), Counter()), total),
            "random_mean": random / total,
            "per_layer": [
                _recall(self._found[i], self._records[i]) if i in self._found else None for i in layers
            ],
        }


def _recall(found: Counter[int], num_records: int) -> float:
    """Mean of selected / tokens over the records, from the selected ones summed at each size of answer."""
    return math.fsum(selected / tokens for tokens, selected in found.items()) / num_records
