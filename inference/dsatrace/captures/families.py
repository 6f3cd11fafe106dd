"""What a transformers model with an indexer selects: told by its config and by which layers have an indexer.

Knows no tensor. Four forms of output, one table: token positions, compressed entries, blocks per KV head,
and groups of tokens that come out as the tokens they hold, as ids or as a boolean mask.

    selects = selects_of(model.config.get_text_config(), indexed={0, 2, 4})
    selects.kind.unit, selects.kind.layers[0].top_k      # ("token", 2048)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Set
from typing import Any

from dsatrace.errors import UserError
from dsatrace.trace.kind import Always, Layer, SelectionKind, Unit

FAMILIES = (
    *("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "hy_v4_vl", "dots3_note", "mistral_large4"),
    *("deepseek_v4", "glm5_next", "minimax_m3_vl", "qwen4_exp"),
)
"""The `model_type`s of transformers 5.24 that have an indexer."""


@dataclasses.dataclass(frozen=True)
class Selects:
    """What a model selects, and how its indexers say it."""

    kind: SelectionKind
    comes_as_tokens: bool  # an id stands for several tokens, and the indexer gives those
    padding: tuple[str, ...]  # on which side of a prompt it may stand, and not move what a group holds
    index_head_dim: int  # numbers that the indexer reads per id


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a family's config says what is selected. A config has the form if it has all of `needs`."""

    needs: tuple[str, ...]
    unit: Unit
    unit_tokens: Callable[[Any], int]
    top_k: Callable[[Any], int]
    heads: Callable[[Any], int] = lambda config: 1
    always: Callable[[Any], Always | None] = lambda config: None
    index_head_dim: str = "index_head_dim"
    comes_as_tokens: bool = False
    padding: tuple[str, ...] = ("left", "right")


def _v4_tokens(config: Any) -> int:
    return int(config.compress_rates["compressed_sparse_attention"])


def _tail(config: Any) -> Always | None:
    has_tail = config.index_kpool_always_select_tail
    return Always(tail=config.index_kpool - 1) if has_tail and config.index_kpool > 1 else None


_FORMS = (
    _Form(  # deepseek_v4: ids of compressed entries
        needs=("index_topk", "compress_rates"),
        unit="entry",
        unit_tokens=_v4_tokens,
        top_k=lambda config: config.index_topk,
        always=lambda config: Always(window=config.sliding_window) if config.sliding_window else None,
        padding=(),
    ),
    _Form(  # minimax_m3_vl: ids of blocks per KV head; the newest are among them
        needs=("index_topk_blocks", "index_block_size"),
        unit="block",
        unit_tokens=lambda config: config.index_block_size,
        top_k=lambda config: config.index_topk_blocks,
        heads=lambda config: config.index_n_heads,
        padding=(),
    ),
    _Form(  # glm5_next: pools of keys, given as their tokens; an unfinished pool is always read
        needs=("index_topk", "index_kpool"),
        unit="entry",
        unit_tokens=lambda config: config.index_kpool,
        top_k=lambda config: config.index_topk // config.index_kpool,
        always=_tail,
        comes_as_tokens=True,
        padding=("left",),  # its pools begin at the first token, and go on over any gap
    ),
    _Form(  # qwen4_exp: the same as a mask of tokens
        needs=("indexer_budget", "indexer_compress_ratio"),
        unit="entry",
        unit_tokens=lambda config: config.indexer_compress_ratio,
        top_k=lambda config: config.indexer_budget // config.indexer_compress_ratio,
        always=lambda config: (
            Always(tail=config.indexer_compress_ratio - 1) if config.indexer_compress_ratio > 1 else None
        ),
        index_head_dim="indexer_head_dim",
        comes_as_tokens=True,
    ),
    _Form(  # deepseek_v32 and its kin: token positions
        needs=("index_topk",),
        unit="token",
        unit_tokens=lambda config: 1,
        top_k=lambda config: config.index_topk,
    ),
)
"""The first that fits is the model's."""


def selects_of(config: Any, indexed: Set[int]) -> Selects:
    """Of a text config whose layers `indexed` have an indexer; `UserError` where it says nothing known."""
    if not indexed:
        raise UserError(
            f"model_type {config.model_type}: no layer has an indexer, so nothing is selected. Attach to one "
            f"of {', '.join(FAMILIES)}, or hand over your own ids with trace.selection (docs/attach.md)"
        )
    form = next((form for form in _FORMS if all(_is_set(config, name) for name in form.needs)), None)
    if form is None:
        raise UserError(
            f"model_type {config.model_type}: its config does not say what its indexer selects; known are "
            f"{', '.join(FAMILIES)}. Hand over its ids with trace.selection (docs/attach.md)"
        )
    own = Layer(form.top_k(config), form.heads(config), always_selected=form.always(config))
    kind = SelectionKind(
        layers=tuple(_layers(config, indexed, own)),
        unit=form.unit,
        unit_tokens=form.unit_tokens(config),
        door="attach",
        missing=("scores", "tiers"),
    )
    return Selects(kind, form.comes_as_tokens, form.padding, getattr(config, form.index_head_dim))


def _layers(config: Any, indexed: Set[int], own: Layer) -> list[Layer]:
    layers: list[Layer] = []
    source = None
    for i in range(config.num_hidden_layers):
        if i in indexed:
            source = i
            layers.append(own)
        elif _shares(config, i) and source is not None:
            layers.append(dataclasses.replace(own, source_layer=source))
        else:
            layers.append(Layer(0, heads=0))
    return layers


def _shares(config: Any, layer: int) -> bool:
    """Whether a layer without an indexer uses the selection of the last one that has one."""
    modes, types = (getattr(config, name, None) or () for name in ("indexer_types", "layer_types"))
    reads = not types or types[layer] == "indexed_attention"
    return bool(modes) and modes[layer] == "shared" and reads


def _is_set(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None


def json_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as the manifest keeps it: what JSON can say, without the path it was read from."""
    return {name: value for name, value in config.items() if name != "_name_or_path" and _is_json(value)}


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)
