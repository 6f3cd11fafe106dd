"""What captures are written as: each format once, with the unit of its ids and who reads it."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

from dsatrace.captures.description import Description
from dsatrace.captures.rows import Advance, Capture
from dsatrace.trace.kind import Unit


@dataclasses.dataclass(frozen=True)
class Format:
    """One format of captures."""

    opener: str  # module and function of this package: (path, described, taken names) -> Capture
    meaning: str
    unit: Unit = "token"
    is_text: bool = True  # it is read as a whole to find its requests: the opener takes an `Advance` too
    when_positions: str = "you know that they are positions"
    remedy: str = (
        "see docs/import.md for how to capture with this engine"  # where a row cannot be the request's
    )

    def open(self, path: Path, described: Description, taken: set[str], advance: Advance) -> Capture:
        """What the file holds. Raises `UserError` naming what is wrong with it."""
        module, _, function = self.opener.partition(":")
        open_file = getattr(importlib.import_module(f"dsatrace.captures.{module}"), function)
        opened: Capture = open_file(path, described, taken, *((advance,) if self.is_text else ()))
        return opened


_SGLANG_POSITIONS = "the server emits positions (SGLANG_DSA_FUSE_TOPK=0, HiSparse)"
_SGLANG_REMEDY = (
    "start SGLang with SGLANG_DSA_FUSE_TOPK=0 and --disable-radix-cache, so that ids are positions and no "
    "row is another request's"
)

FORMATS = {
    "npy": Format(
        "npy:open_arrays",
        "arrays (rows, layers, k) in .npy, .npz or .safetensors",
        is_text=False,
        remedy="row t must hold what query t of that request selected, as token positions",
    ),
    "sglang": Format(
        "sglang:open_responses",
        "SGLang's responses, one per line, with indexer_topk",
        when_positions=_SGLANG_POSITIONS,
        remedy=_SGLANG_REMEDY,
    ),
    "sgltopk1": Format(
        "sgltopk1:open_log",
        "the SGLTOPK1 log of a fork of SGLang",
        is_text=False,
        when_positions=_SGLANG_POSITIONS,
        remedy=_SGLANG_REMEDY,
    ),
    "vllm": Format("vllm:open_responses", "vLLM's responses, as proposed, with indexer_topk"),
    "routed-experts": Format(
        "routed_experts:open_responses", "responses of SGLang or vLLM with routed_experts", "expert"
    ),
    "route-trace": Format("route_trace:open_trace", "colibri's ROUTE_TRACE text", "expert"),
}
