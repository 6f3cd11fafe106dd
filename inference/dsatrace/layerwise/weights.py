"""The tensors that a sweep reads of a Hugging Face folder, in the order in which it needs them.

Knows names and places; computes nothing. A unit is what is read, used and dropped as one: a layer without
its routed experts, or one expert.

    work = layers_to_compute(args, range(0, 4))           # layers 0 to 2 whole, of layer 3 what selects
    units = units_of(args, work, read_part(folder, args, names_of(args, work)))
    for unit, tensors in read_ahead(units): ...
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch

from dsatrace.model.config import ModelArgs
from dsatrace.model.names import Target, checkpoint_tensors, scale_of
from dsatrace.model.shards import StoredTensor, read_tensor

EMBEDDING = "model.embed_tokens.weight"
UNITS_AHEAD = 2
"""Read while one is in use."""

Part = Literal["select", "route", "all"]
_SELECTS = ("attn_norm.", "attn.wq_a.", "attn.q_norm.", "attn.indexer.")
_FEEDS_FORWARD = ("ffn.experts.", "ffn.shared_experts.", "ffn.w1.", "ffn.w2.", "ffn.w3.")


class LayerWork(NamedTuple):
    """What is computed of a layer: all of it, what leads to its choice of experts, or its selection."""

    layer: int
    part: Part

    def needs(self, name: str) -> bool:
        """Whether it needs the tensor, named as within the layer."""
        if self.part == "select":
            return name.startswith(_SELECTS)
        return self.part == "all" or not name.startswith(_FEEDS_FORWARD)


class Unit(NamedTuple):
    """Tensors by their names within the layer."""

    layer: int
    expert: int | None
    tensors: dict[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.tensors.values())


def layers_to_compute(args: ModelArgs, layers: range, experts: bool = False) -> list[LayerWork]:
    """What the selections of `layers` need, with `experts` their choice of experts too."""
    last = layers[-1]
    if experts and last >= args.n_dense_layers:
        return [*(LayerWork(layer, "all") for layer in range(last)), LayerWork(last, "route")]
    last = args.source_layers[last]  # a layer that shares a selection adds nothing to it
    return [*(LayerWork(layer, "all") for layer in range(last)), LayerWork(last, "select")]


def needed(args: ModelArgs, work: Sequence[LayerWork]) -> Iterator[tuple[LayerWork, str, str, Target]]:
    """(layer, its name in the layer, its Hugging Face name, what it is) of every tensor, without scales."""
    of_layer = {one.layer: one for one in work}
    for hf_name, target in checkpoint_tensors(args).items():
        if target.name.startswith("layers."):
            _, layer, name = target.name.split(".", 2)
            one = of_layer.get(int(layer))
            if one is not None and one.needs(name):
                yield one, name, hf_name, target


def names_of(args: ModelArgs, work: Sequence[LayerWork], embedding: bool = True) -> list[str]:
    """Hugging Face's names of all that is needed, without scales; the `embedding` if nothing is done yet."""
    first = [EMBEDDING] if embedding else []
    return [*first, *(hf_name for _, _, hf_name, _ in needed(args, work))]


def units_of(
    args: ModelArgs, work: Sequence[LayerWork], stored: Mapping[str, StoredTensor]
) -> dict[int, list[Unit]]:
    """Each layer's units: the layer first, then its experts."""
    units: dict[int, dict[int | None, Unit]] = {one.layer: {} for one in work}
    for one, name, hf_name, target in needed(args, work):
        unit = units[one.layer].setdefault(target.expert, Unit(one.layer, target.expert, {}))
        unit.tensors[name] = stored[hf_name]
        scale_name, _ = scale_of(hf_name, target)
        if scale_name in stored:
            unit.tensors[f"{name.removesuffix('weight')}scale"] = stored[scale_name]
    return {layer: list(of_layer.values()) for layer, of_layer in units.items()}


def read_ahead(units: Sequence[Unit]) -> Generator[tuple[Unit, dict[str, torch.Tensor]]]:
    """The units and their tensors; a thread reads the next ones meanwhile. Raises `CheckpointError`."""
    rest = iter(units)
    with ThreadPoolExecutor(1, "layerwise-reader") as pool:
        waiting = deque((unit, pool.submit(_read, unit)) for unit in itertools.islice(rest, UNITS_AHEAD))
        while waiting:
            unit, reading = waiting.popleft()
            tensors = reading.result()
            waiting.extend((unit, pool.submit(_read, unit)) for unit in itertools.islice(rest, 1))
            yield unit, tensors
            del tensors


def _read(unit: Unit) -> dict[str, torch.Tensor]:
    return {name: read_tensor(stored) for name, stored in unit.tensors.items()}
