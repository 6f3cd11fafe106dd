"""Serving engines: the settings that give a buffer of a size, to paste, and the counters that they keep.

The flags are those of the engines' documentation: SGLang 0.5.11's HiSparse guide, vLLM's HiSparse with
pull request 57041, TensorRT-LLM 1.4's SparseKvCacheOffloadConfig. No engine was run here.

    for setting in engine_settings(size=4096, top_k=2048, union=1): print(setting.flags)
    read_counters(Path("metrics.txt"))      # Prometheus text of vLLM, or JSON with the same three numbers
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from dsatrace.errors import UserError

INT16_SLOTS = 32768
"""vLLM numbers a buffer's slots with 16 bits."""


class EngineSetting(NamedTuple):
    engine: str
    flags: str
    note: str


def engine_settings(size: int, top_k: int, union: int) -> list[EngineSetting]:
    """Of a buffer per request and layer; `union`: rows per step. Empty below top-k: no engine has one."""
    if size < top_k:
        return []
    sglang = json.dumps({"top_k": top_k, "device_buffer_size": size, "host_to_device_ratio": 8})
    vllm = json.dumps({"hisparse_config": {"device_buffer_size": size}})
    least = (union + 1) * top_k
    notes = []
    if size < least:
        notes.append(f"vLLM wants {least}, top-k for each of {union} rows and one more")
    if size > INT16_SLOTS:
        notes.append(f"above {INT16_SLOTS} slots, which 16 bits can number")
    return [
        EngineSetting(
            "SGLang",
            f"--enable-hisparse --hisparse-config '{sglang}'",
            "host_to_device_ratio 8 is the documented example: size it by your host's memory"
            + ("; above the 32768 slots of 16 bits" if size > INT16_SLOTS else ""),
        ),
        EngineSetting(
            "vLLM",
            f"--attention-config '{vllm}' --kv-transfer-config with HiSparseConnector",
            "; ".join(notes) or f"at least {least} rows, top-k for each of {union} rows and one more",
        ),
        EngineSetting(
            "TensorRT-LLM",
            f"SparseKvCacheOffloadConfig(gpu_cache_factor={math.ceil(100 * size / top_k) / 100:g})",
            "in units of one step's selection, rounded up to whole pages",
        ),
    ]


class Counters(NamedTuple):
    """What an engine counted over its life."""

    hits: int
    misses: int
    bytes_fetched: int | None

    @property
    def miss_rate(self) -> float:
        return self.misses / (self.hits + self.misses)


_METRIC = re.compile(
    r"^vllm:hisparse_(cache_hits|cache_misses|host_to_device_bytes)(?:_total)?(?:\{[^}]*\})?\s+(\S+)"
)


def read_counters(path: Path) -> Counters:
    """From Prometheus text, whose labels are added up, or JSON: `hits`, `misses`, perhaps `bytes_fetched`.

    Raises `UserError`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--measured {path}: cannot read it: {reason}") from error
    found: dict[str, Any] = {}
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--measured {path}: not JSON: {error}") from error
    else:
        names = {"cache_hits": "hits", "cache_misses": "misses", "host_to_device_bytes": "bytes_fetched"}
        for match in filter(None, map(_METRIC.match, text.splitlines())):
            value = float(match[2])
            if not 0 <= value < 2**63:
                raise UserError(f"--measured {path}: {match[0]!r} is no count")
            found[names[match[1]]] = found.get(names[match[1]], 0) + int(value)
    return _checked(found, path)


def _checked(found: dict[str, Any], path: Path) -> Counters:
    for name in Counters._fields:
        value = found.get(name, None if name == "bytes_fetched" else "nothing")
        if value is not None and (type(value) is not int or value < 0):
            raise UserError(
                f"--measured {path}: {name} is {value!r}; give counts of hits and misses: JSON, or "
                "Prometheus text with vllm:hisparse_cache_hits and vllm:hisparse_cache_misses"
            )
    counters = Counters(found["hits"], found["misses"], found.get("bytes_fetched"))
    if not counters.hits + counters.misses:
        raise UserError(f"--measured {path}: the engine counted no hit and no miss; read it after a load")
    return counters
