"""What a manifest says beside what the records depend on, held against what is possible: when, on how
many ranks, and how many bytes a model of these dimensions needs per token.

Standard library only; knows no record.

    check_facts(manifest)        # of a manifest that follows the schema; raises Mismatch
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from dsatrace.verify.mismatch import Mismatch, compare, require

_DATE = "%Y-%m-%dT%H:%M:%SZ"
_CLOCKS_DIFFER = datetime.timedelta(days=1)
_COUNTS = ("n_layers", "n_heads", "index_n_heads", "index_head_dim", "kv_lora_rank", "qk_rope_head_dim")
_OF_A_LATENT = ("kv_lora_rank", "qk_rope_head_dim", "index_head_dim")
_SCALE_GROUP, _SCALE_BYTES = 128, 4


def check_facts(manifest: Mapping[str, Any]) -> None:
    _check_date(manifest["started_utc"])
    model, ranks = manifest["model_config"], manifest["world_size"]
    is_engines = (manifest.get("selection") or {"door": "serve"})["door"] == "serve"
    for name in _COUNTS if is_engines else ():  # other models mean other things by these names
        count = model.get(name, 1)
        require(type(count) is int and count >= 1, f"model_config.{name}", count, "not a count")
    require(ranks >= 1, "world_size", ranks, "not a count")
    heads = model.get("n_heads", ranks) if is_engines else ranks
    require(heads % ranks == 0, "world_size", ranks, f"{heads} heads cannot be shared out to so many ranks")
    if is_engines and all(name in model for name in _OF_A_LATENT):
        for i, layout in enumerate(manifest["cache_layouts"]):
            _check_layout(layout, model, f"cache_layouts[{i}]")


def _check_date(text: str) -> None:
    try:
        started = datetime.datetime.strptime(text, _DATE).replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        raise Mismatch("started_utc", f"stored {text!r}, no date like 2026-01-31T12:00:00Z") from None
    now = datetime.datetime.now(datetime.timezone.utc)
    require(started <= now + _CLOCKS_DIFFER, "started_utc", text, "lies in the future")


def _check_layout(layout: Mapping[str, Any], model: Mapping[str, Any], path: str) -> None:
    """Of a layout whose rows are known; another one may have any."""
    rank, rope, index = (model[name] for name in _OF_A_LATENT)
    latent_bytes, index_bytes = layout["latent_bytes_per_token"], layout["index_bytes_per_token"]
    if layout["name"] == "this_run":
        size = latent_bytes // (rank + rope)  # of the dtype that the model computes in
        is_row = size in (2, 4, 8) and latent_bytes == size * (rank + rope)
        rule = f"{rank + rope} channels of 2, 4 or 8 bytes"
        require(is_row, f"{path}.latent_bytes_per_token", latent_bytes, rule)
        # An fp8 key takes a byte per channel only on a device with fp8 arithmetic; its scale is precise.
        in_fp8 = {width * index + scale for width in (1, size) for scale in (4, 8)}
        possible = in_fp8 if model.get("index_fp8", True) else {size * index}
        rule = f"derived one of {', '.join(map(str, sorted(possible)))}"
        require(index_bytes in possible, f"{path}.index_bytes_per_token", index_bytes, rule)
    elif layout["name"] in ("demo", "serving_fp8", "plain_fp8", "hf_bf16"):
        latent = {"serving_fp8": _in_fp8(rank) + 2 * rope, "plain_fp8": rank + rope}
        compare(
            layout,
            {
                "latent_bytes_per_token": latent.get(layout["name"], 2 * (rank + rope)),
                "index_bytes_per_token": 2 * index if layout["name"] == "hf_bf16" else _in_fp8(index),
            },
            path,
        )


def _in_fp8(channels: int) -> int:
    """A byte per channel, and a scale per group of them."""
    return channels + -(-channels // _SCALE_GROUP) * _SCALE_BYTES
