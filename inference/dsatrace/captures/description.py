"""What a capture does not say of itself: layers, top-k, unit, where its rows begin.

Each field is a flag of `dsatrace import` and a key of `--describe capture.json`; a flag wins. Knows no
format.

    described = Description.of(args, Path("capture.json"))
    kind = described.kind("token", shape=(61, 2048), id_kind="slot")
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from dsatrace.errors import UserError
from dsatrace.files import read_json
from dsatrace.flags import Flag, check, flags_of, option, values_of
from dsatrace.trace.kind import Layer, SelectionKind, Unit

_MOST = 1 << 20
"""Layers, heads or ids that one may name; more is a mistake."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What the user says of a capture; None: the format says it, or nobody does."""

    layers: Annotated[
        str | None,
        Flag(
            "layers that a row holds: a count, or the model's layer of each, such as 0,1,2,6-60", metavar="L"
        ),
    ] = None
    top_k: Annotated[int | None, Flag("ids per row and layer", metavar="K", at_least=1)] = None
    unit: Annotated[Unit | None, Flag("what an id stands for (default: the format's)")] = None
    unit_tokens: Annotated[
        int | None, Flag("tokens per id, for entries and blocks", metavar="N", at_least=1)
    ] = None
    heads: Annotated[int | None, Flag("sets per layer, one per KV head", metavar="N", at_least=1)] = None
    experts: Annotated[int | None, Flag("experts to choose from", metavar="N", at_least=1)] = None
    prompt_tokens: Annotated[
        int | None, Flag("prompt's length, where the capture does not say", metavar="N", at_least=1)
    ] = None
    start: Annotated[
        int | None, Flag("position of the first row, where the capture does not say", metavar="N", at_least=0)
    ] = None
    ids: Annotated[
        Literal["position", "slot"] | None,
        Flag("say yourself what the ids are; what contradicts it is still refused"),
    ] = None
    model: Annotated[str | None, Flag("the model's name, for the manifest", metavar="NAME")] = None
    requests: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    """Of single requests, by name: `prompt_tokens` and `start`. In the file only."""

    def __post_init__(self) -> None:
        check(self)
        for field in ("top_k", "heads", "experts"):
            if (getattr(self, field) or 0) > _MOST:
                raise UserError(f"{option(field)} {getattr(self, field)}: use at most {_MOST:,}")
        if self.unit in ("entry", "block") and self.unit_tokens is None:
            raise UserError(f"--unit {self.unit} needs --unit-tokens: the tokens that one id covers")
        if self.unit_tokens not in (None, 1) and self.unit not in ("entry", "block"):
            raise UserError(f"--unit-tokens {self.unit_tokens}: give --unit entry or block with it")
        self.layer_ids  # noqa: B018 - refused here, not later

    @classmethod
    def of(cls, args: argparse.Namespace, file: Path | None) -> Description:
        """The file's keys, and the flags over them."""
        given = {name: value for name, value in values_of(args, FLAGS).items() if value is not None}
        return cls(**{**(_read(file) if file else {}), **given})

    def with_said(self, said: Mapping[str, Any]) -> Description:
        """With what a capture says of itself, where nothing was given."""
        return dataclasses.replace(
            self, **{name: value for name, value in said.items() if getattr(self, name) is None}
        )

    def with_layers(self, layer_ids: Sequence[int]) -> Description:
        return dataclasses.replace(self, layers=layers_text(layer_ids))

    @property
    def layer_ids(self) -> list[int] | None:
        """The model's layer of each row's set, ascending."""
        return None if self.layers is None else _layer_ids(str(self.layers))

    def kind(
        self,
        unit: Unit,
        shape: tuple[int, int],
        id_kind: Literal["position", "slot"] = "position",
        sources: Mapping[int, int] | None = None,
    ) -> SelectionKind:
        """The kind of rows of `shape` (sets, width). `sources`: see `Layer.source_layer`."""
        (num_sets, width), heads = shape, self.heads or 1
        layer_ids = self.layer_ids
        if num_sets % heads or (layer_ids is not None and len(layer_ids) * heads != num_sets):
            said = f"{len(layer_ids)} layers" if layer_ids is not None else "layers"
            raise UserError(
                f"--layers, --heads: its rows hold {num_sets} sets, not {said} of {heads}; correct them"
            )
        layer_ids = list(range(num_sets // heads)) if layer_ids is None else layer_ids
        unit = self.unit or unit
        if unit != "expert" and self.experts is not None:
            raise UserError(f"--experts {self.experts}: its ids are of unit {unit}; leave it out")
        if unit == "expert" and self.experts is None:
            raise UserError("--experts is missing: say from how many experts each layer chooses")
        layers = [Layer(0, heads=0)] * (layer_ids[-1] + 1)
        for i, layer in enumerate(layer_ids):
            source = (sources or {}).get(i)
            layers[layer] = Layer(width, heads, None if source is None else layer_ids[source])
        try:
            return SelectionKind(
                layers=tuple(layers),
                unit=unit,
                unit_tokens=self.unit_tokens or 1,
                id_kind=id_kind,
                num_ids=self.experts if unit == "expert" else None,
                door="import",
                missing=("scores", "timing", "tiers", "prefix"),
            )
        except ValueError as error:
            raise UserError(f"{error}; correct --experts, --top-k or --unit-tokens") from error

    def of_request(self, name: str, field: Literal["prompt_tokens", "start"]) -> int | None:
        value = self.requests.get(name, {}).get(field)
        return value if value is not None else getattr(self, field)


FLAGS = flags_of(Description)


def layers_text(layer_ids: Sequence[object]) -> str:
    """As the flag has it."""
    return ",".join(f"{layer}-{layer}" for layer in layer_ids)


def _layer_ids(text: str) -> list[int]:
    """`61`: layers 0 to 60; `0,1,2,6-60`: those."""
    remedy = "use a count such as 61, or layers such as 0,1,2,6-60, ascending"
    parts = text.split(",")
    try:
        if len(parts) == 1 and "-" not in text:
            found = list(range(_number(text)))
        else:
            found = []
            for part in parts:
                first, _, last = part.partition("-")
                found += range(_number(first), _number(last or first) + 1)
    except ValueError:
        raise UserError(f"--layers {text[:80]}: {remedy}") from None
    if not found or found != sorted(set(found)):
        raise UserError(f"--layers {text[:80]}: {remedy}")
    return found


def _number(text: str) -> int:
    number = int(text)
    if not 0 <= number <= _MOST:
        raise ValueError(text)
    return number


def _read(path: Path) -> dict[str, Any]:
    record = read_json(path, f"--describe {path}")
    if not isinstance(record, dict):
        raise UserError(f"--describe {path}: not a JSON object")
    layers = record.get("layers")
    if type(layers) is int:
        record["layers"] = str(layers)
    elif isinstance(layers, list):
        record["layers"] = layers_text(layers)
    for key, value in record.items():
        _check_key(path, key, value)
    return record


def _check_key(path: Path, key: str, value: Any) -> None:
    texts = ("layers", "unit", "ids", "model")
    if key == "requests":
        sound = isinstance(value, dict) and all(
            isinstance(one, dict)
            and one.keys() <= {"prompt_tokens", "start"}
            and all(type(number) is int and number >= 0 for number in one.values())
            for one in value.values()
        )
        if not sound:
            raise UserError(
                f'--describe {path}: requests: use {{"NAME": {{"prompt_tokens": N, "start": N}}}}'
            )
    elif key not in FLAGS:
        raise UserError(f"--describe {path}: {key!r} is no key of it; use {', '.join((*FLAGS, 'requests'))}")
    elif not (isinstance(value, str) if key in texts else type(value) is int):
        raise UserError(f"--describe {path}: {key}: {value!r} is no {'text' if key in texts else 'number'}")
