"""What a run's manifest says of its selections, as far as the records depend on it.

A second reading of the manifest's `selection`, beside the writer's own. Standard library only; knows no
record. A *set* is one record's selection: a layer's, or that of one of its KV heads.

    selections = Selections.of(manifest)       # raises Mismatch for one that contradicts itself
    selections.sets[0]                         # Set(layer=0, head=None, num_heads=1, top_k=2048, source=None)
    selections.num_visible(seq_len=4099)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsatrace.schema import (
    DOORS,
    ID_KINDS,
    LAYER_FIELDS,
    MISSING,
    UNITS,
    Field,
    problems,
    record_fields,
    told,
)
from dsatrace.verify.mismatch import Mismatch, compare, require


class Set(NamedTuple):
    """What stands in one record."""

    layer: int
    head: int | None  # of a layer with several
    num_heads: int  # sets of the layer, which share its bytes
    top_k: int
    source: int | None  # the layer whose set it is, where that is another


@dataclasses.dataclass(frozen=True)
class Selections:
    """Those of one step, set by set in the order of the file, and what their ids are."""

    sets: tuple[Set, ...]
    unit: str = "token"
    unit_tokens: int = 1
    is_slot: bool = False
    num_ids: int | None = None
    door: str = "serve"
    tells: frozenset[str] = told(None)
    sparse_active: int | None = None  # as stored

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Selections:
        """Of a manifest that follows the schema; one that is older than `selection` is of the engine."""
        selection, model = manifest.get("selection"), manifest["model_config"]
        if selection is None:
            return cls(tuple(Set(i, None, 1, model["index_topk"], None) for i in range(model["n_layers"])))
        for name, choices in (("unit", UNITS), ("id_kind", ID_KINDS), ("door", DOORS)):
            value = selection[name]
            require(value in choices, f"selection.{name}", value, f"not one of {', '.join(choices)}")
        for i, name in enumerate(selection.get("missing", ())):
            is_one = name in MISSING and name not in selection["missing"][:i]
            require(is_one, f"selection.missing[{i}]", name, f"not one of {', '.join(MISSING)}, each once")
        size, unit = selection["unit_tokens"], selection["unit"]
        is_size = size == 1 if unit in ("token", "expert") else size >= 1
        require(is_size, "selection.unit_tokens", size, f"no size of a {unit}")
        num_ids = selection.get("num_ids")
        sets: list[Set] = []
        for i, layer in enumerate(selection["layers"]):
            sets += _sets_of(i, layer, sets)
        if num_ids is not None or unit == "expert":
            most = max((one.top_k for one in sets), default=1)
            holds = num_ids is not None and num_ids >= most
            require(holds, "selection.num_ids", num_ids, f"and a set holds up to {most}")
        if selection["door"] == "serve":
            _check_engine(selection, model)
        return cls(
            sets=tuple(sets),
            unit=unit,
            unit_tokens=size,
            is_slot=selection["id_kind"] == "slot",
            num_ids=num_ids,
            door=selection["door"],
            tells=told(selection),
            sparse_active=selection.get("sparse_active"),
        )

    @property
    def is_engines(self) -> bool:
        return self.door == "serve"

    @property
    def is_plain(self) -> bool:
        """Whether ids are token positions, and each layer has one set, as the engine's have."""
        return self.unit == "token" and not self.is_slot and all(one.num_heads == 1 for one in self.sets)

    @property
    def fields(self) -> tuple[Field, ...]:
        """The table of the run's records."""
        return record_fields(self.tells)

    @property
    def is_located(self) -> bool:
        """Whether ids tell which tokens they are."""
        return "positions" in self.tells

    @property
    def ids_field(self) -> str:
        """The field of a record that holds its ids."""
        return "selected_ids" if "other ids" in self.tells else "selected_token_pos"

    @property
    def num_layers(self) -> int:
        """Up to the last layer that selects."""
        return max((one.layer for one in self.sets), default=-1) + 1

    @property
    def source_layers(self) -> dict[int, int]:
        return {one.layer: one.source for one in self.sets if one.source is not None}

    @property
    def least_visible(self) -> int:
        """Positions that a query must see so that there is an id to choose."""
        return self.unit_tokens if self.unit == "entry" else 1

    def num_visible(self, seq_len: int) -> int:
        """Ids to choose from: an entry once it is whole, a block once it begins."""
        if self.num_ids is not None:
            return self.num_ids
        whole, rest = divmod(seq_len, self.unit_tokens)
        return whole + (rest > 0 and self.unit != "entry")

    def tokens(self, ids: list[int], seq_len: int) -> list[int]:
        """The token positions that the ids cover, ascending; none where they do not tell."""
        if not self.is_located:
            return []
        size = self.unit_tokens
        if size == 1:
            return sorted(ids)
        return sorted(p for one in ids for p in range(one * size, min(one * size + size, seq_len)))


ENGINES = Selections(())
"""What the engine selects, in any number of layers."""


def _sets_of(i: int, layer: Any, before: list[Set]) -> list[Set]:
    path = f"selection.layers[{i}]"
    if found := problems(layer, "full", LAYER_FIELDS, f"{path}."):
        field, _, what = found[0].partition(": ")
        raise Mismatch(field, what)
    heads, top_k, source = layer["heads"], layer["top_k"], layer["source_layer"]
    require(heads >= 0, f"{path}.heads", heads, "not a count")
    require(top_k >= 1 or not heads, f"{path}.top_k", top_k, "not a count")
    for name, tokens in (layer.get("always_selected") or {}).items():
        require(tokens >= 0, f"{path}.always_selected.{name}", tokens, "not a count")
    if source is not None:
        same = [one for one in before if one.layer == source and one.source is None]
        fits = len(same) == heads and all(one.top_k == top_k for one in same)
        require(bool(same) and fits, f"{path}.source_layer", source, "no layer before it that has an indexer")
    return [Set(i, head if heads > 1 else None, heads, top_k, source) for head in range(heads)]


def _check_engine(selection: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    expected = {"unit": "token", "unit_tokens": 1, "id_kind": "position"}
    compare(selection, expected, "selection")
    require(selection.get("num_ids") is None, "selection.num_ids", selection.get("num_ids"), "derived None")
    require(not selection.get("missing"), "selection.missing", selection.get("missing"), "of the engine")
    layers = selection["layers"]
    require(
        len(layers) == model["n_layers"],
        "selection.layers",
        layers,
        f"{model['n_layers']} layers in model_config",
    )
    for i, layer in enumerate(layers):
        compare(layer, {"top_k": model["index_topk"], "heads": 1}, f"selection.layers[{i}]")
