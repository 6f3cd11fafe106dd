"""What a run selects: of what kind its ids are, how many sets a step has, and whose they are.

The manifest's `selection` as an object; `schema.told` and `schema.record_fields` say what follows for
the records. A *set* is what one layer selects in one step or, where its KV heads select apart, what one
of them does: the first axis of a capture's arrays. Knows no capture and no file; imports numpy where it
is used, for the run that needs nothing installed writes a manifest too.

    kind = SelectionKind(layers=(Layer(512), Layer(0, heads=0)), unit="entry", unit_tokens=4, door="attach")
    kind.set_layers          # array([0]): the second layer selects nothing
    kind.visible(np.array([4099]))    # array([1024]), whole entries that the query can see
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from dsatrace.schema import DOORS, ID_KINDS, MISSING, UNITS, Field, record_fields, told

if TYPE_CHECKING:
    import numpy as np

Unit = Literal["token", "entry", "block", "expert"]
Door = Literal["serve", "attach", "import", "layerwise"]


@dataclasses.dataclass(frozen=True)
class Always:
    """Tokens that a layer reads in any case; its records do not count them."""

    sinks: int = 0
    window: int = 0
    tail: int = 0


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer of the model selects per step."""

    top_k: int  # most ids in a set
    heads: int = 1  # sets: one, one per KV head, or none
    source_layer: int | None = None  # the earlier layer whose sets it uses
    always_selected: Always | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Layer:
        always = record.get("always_selected")
        if always is not None:
            always = Always(always["sinks"], always["window"], always["tail"])
        return cls(record["top_k"], record["heads"], record["source_layer"], always)

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        if self.always_selected is None:  # as in manifests that are older than the field
            del record["always_selected"]
        return record


@dataclasses.dataclass(frozen=True)
class SelectionKind:
    """The selections of a run. Raises `ValueError` for what contradicts itself."""

    layers: tuple[Layer, ...]
    unit: Unit = "token"
    unit_tokens: int = 1  # tokens that an id covers: id j those from j * unit_tokens on
    id_kind: Literal["position", "slot"] = "position"
    num_ids: int | None = None  # to choose from, where that is not what the query can see
    door: Door = "serve"
    missing: tuple[str, ...] = ()  # what the door cannot tell: see `schema.MISSING`

    def __post_init__(self) -> None:
        named = (("unit", UNITS), ("id_kind", ID_KINDS), ("door", DOORS))
        for name, choices in named:
            if getattr(self, name) not in choices:
                raise ValueError(f"selection.{name} {getattr(self, name)}: not one of {', '.join(choices)}")
        if self.door == "serve" and not self._is_the_engines:
            raise ValueError(
                "selection.door serve: the engine's selections are token positions, one set a layer"
            )
        if unknown := set(self.missing) - set(MISSING):
            raise ValueError(f"selection.missing {min(unknown)}: not one of {', '.join(MISSING)}")
        if self.unit_tokens < 1 or (self.unit in ("token", "expert") and self.unit_tokens != 1):
            raise ValueError(f"selection.unit_tokens {self.unit_tokens}: no size of a {self.unit}")
        if self.unit == "expert" and self.num_ids is None:
            raise ValueError("selection.num_ids: name the number of experts per layer")
        if self.num_ids is not None and self.num_ids < max((layer.top_k for layer in self.layers), default=0):
            raise ValueError(f"selection.num_ids {self.num_ids}: fewer than a set holds")
        for i, layer in enumerate(self.layers):
            self._check_layer(i, layer)

    @property
    def _is_the_engines(self) -> bool:
        alike = len({(layer.top_k, layer.heads) for layer in self.layers}) <= 1
        one_each = all(layer.heads == 1 for layer in self.layers)
        is_position = self.unit == "token" and self.id_kind == "position" and self.num_ids is None
        return is_position and alike and one_each and not self.missing

    def _check_layer(self, i: int, layer: Layer) -> None:
        if layer.heads < 0 or (layer.heads and layer.top_k < 1):
            raise ValueError(f"layer {i}: {layer.heads} sets of at most {layer.top_k} ids")
        source = layer.source_layer
        if source is None:
            return
        its = self.layers[source] if 0 <= source < i else Layer(0, heads=0)
        has_sets = its.heads > 0 and its.source_layer is None
        if not has_sets or (layer.heads, layer.top_k) != (its.heads, its.top_k):
            raise ValueError(f"layer {i}: source_layer {source} selects nothing that it could use")

    @classmethod
    def of(cls, selection: Mapping[str, Any]) -> SelectionKind:
        """From the manifest's `selection`."""
        return cls(
            layers=tuple(map(Layer.of, selection["layers"])),
            unit=selection["unit"],
            unit_tokens=selection["unit_tokens"],
            id_kind=selection["id_kind"],
            num_ids=selection.get("num_ids"),
            door=selection["door"],
            missing=tuple(selection.get("missing", ())),
        )

    def to_json(self, sparse_active: int | None = None) -> dict[str, Any]:
        """The manifest's `selection`."""
        return {
            "unit": self.unit,
            "unit_tokens": self.unit_tokens,
            "id_kind": self.id_kind,
            "num_ids": self.num_ids,
            "layers": [layer.to_json() for layer in self.layers],
            "door": self.door,
            "missing": list(self.missing),
            "sparse_active": sparse_active,
        }

    @functools.cached_property
    def tells(self) -> frozenset[str]:
        return told(self.to_json())

    @functools.cached_property
    def fields(self) -> tuple[Field, ...]:
        """The table of this run's step records."""
        return record_fields(self.tells)

    @functools.cached_property
    def null_fields(self) -> tuple[str, ...]:
        """Fields that are null in every record."""
        return tuple(field.name for field in self.fields if field.type == "null")

    def holds(self, name: str) -> bool:
        """Whether a record of the run may have this field, and not null."""
        return name in self._held

    @property
    def ids_field(self) -> str:
        """The field that holds a record's ids."""
        return "selected_ids" if self.holds("selected_ids") else "selected_token_pos"

    @functools.cached_property
    def _held(self) -> frozenset[str]:
        return frozenset(field.name for field in self.fields if field.type != "null")

    @property
    def is_exact(self) -> bool:
        """Whether a set holds as many ids as it can: the engine's do."""
        return self.door == "serve"

    @property
    def max_width(self) -> int:
        """Ids in the largest set: the last axis of a capture's arrays."""
        return max((layer.top_k for layer in self.layers if layer.heads), default=0)

    @functools.cached_property
    def set_layers(self) -> np.ndarray:
        """(S,) int64: the layer of each set."""
        return _int64(i for i, layer in enumerate(self.layers) for _ in range(layer.heads))

    @functools.cached_property
    def set_heads(self) -> list[int | None]:
        """(S,): which of its layer's sets it is; None where there is one."""
        return [head if layer.heads > 1 else None for layer in self.layers for head in range(layer.heads)]

    @functools.cached_property
    def num_heads(self) -> np.ndarray:
        """(S,) int64: sets of the set's layer. Bytes per token and layer are shared among them."""
        return _int64(self.layers[i].heads for i in self.set_layers.tolist())

    @functools.cached_property
    def set_sources(self) -> list[int | None]:
        """(S,): the layer whose set it is, where that is another."""
        return [self.layers[i].source_layer for i in self.set_layers.tolist()]

    @functools.cached_property
    def source_sets(self) -> dict[int, int]:
        """For each set that is another layer's: which set that is."""
        own = {
            (layer, head): s
            for s, (layer, head) in enumerate(zip(self.set_layers.tolist(), self.set_heads, strict=True))
        }
        return {
            s: own[source, self.set_heads[s]]
            for s, source in enumerate(self.set_sources)
            if source is not None
        }

    @functools.cached_property
    def top_k(self) -> np.ndarray:
        """(S,) int64: most ids in each set."""
        return _int64(self.layers[i].top_k for i in self.set_layers.tolist())

    @functools.cached_property
    def has_indexer(self) -> np.ndarray:
        """(S,) bool: the set is its layer's own."""
        return _int64(source is None for source in self.set_sources).astype(bool)

    def per_layer(self, counts: np.ndarray) -> np.ndarray:
        """(S,) counts -> (layers,) int64, up to the last that selects."""
        if self.is_exact:
            return counts
        import numpy as np

        return np.bincount(self.set_layers, counts).astype(np.int64)

    @functools.cached_property
    def set_before(self) -> np.ndarray:
        """(S,) int64: the same KV head's set in the layer before that selects; -1 where there is none, where
        the selection is not the layer's own, and for experts, which are others in each layer."""
        return _int64(self._set_before(s) for s in range(len(self.set_layers)))

    def _set_before(self, s: int) -> int:
        if self.set_sources[s] is not None or self.unit == "expert":
            return -1
        layers = self.set_layers.tolist()
        before = max((layer for layer in layers if layer < layers[s]), default=None)
        same = (i for i in range(s) if layers[i] == before and self.set_heads[i] == self.set_heads[s])
        return next(same, -1)

    def limits(self, seq_len: np.ndarray) -> np.ndarray:
        """(R,) int64: every id is below it."""
        if self.id_kind == "slot":
            return seq_len * 0 + 2**31
        return self.visible(seq_len)

    def visible(self, seq_len: np.ndarray) -> np.ndarray:
        """(R,) int64: ids to choose from, of a query that sees `seq_len` (R,) int64 positions."""
        if self.num_ids is not None:
            return seq_len * 0 + self.num_ids
        if self.unit == "entry":
            return seq_len // self.unit_tokens
        return -(-seq_len // self.unit_tokens)


def inactive(num_sparse: int, sparse_active: int | None) -> str | None:
    """What a reader must know of a run in which sparse attention was never seen at work, or None."""
    if not num_sparse or sparse_active is None or sparse_active > 0:
        return None
    return (
        f"WARNING: in none of {num_sparse} records past top-k is there anything but the newest ids. Either "
        "sparse attention was not active when this was recorded, or the model has a plain window."
    )


def _int64(values: Iterable[int]) -> np.ndarray:
    import numpy as np

    return np.array(list(values), dtype=np.int64)


@functools.lru_cache
def engine_kind(
    num_layers: int, top_k: int, shared_layers: tuple[tuple[int, int], ...] = ()
) -> SelectionKind:
    """Token positions, one set per layer; `shared_layers`: the items of `manifest.shared_layers`."""
    sources = dict(shared_layers)
    return SelectionKind(tuple(Layer(top_k, source_layer=sources.get(i)) for i in range(num_layers)))
