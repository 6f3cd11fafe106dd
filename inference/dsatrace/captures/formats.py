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

    def open(self, path: Path, described: Description, taken: set[str], advance: Advance) -> Capture:
        """What the file holds. Raises `UserError` naming what is wrong with it."""
        module, _, function = self.opener.partition(":")
        open_file = getattr(importlib.import_module(f"dsatrace.captures.{module}"), function)
        opened: Capture = open_file(path, described, taken, *((advance,) if self.is_text else ()))
        return opened


FORMATS = {
    "npy": Format("npy:open_arrays", "arrays (rows, layers, k) in .npy, .npz or .safetensors", is_text=False),
    "sglang": Format("sglang:open_responses", "SGLang's responses, one per line, with indexer_topk"),
    "sgltopk1": Format("sgltopk1:open_log", "the SGLTOPK1 log of a fork of SGLang", is_text=False),
    "vllm": Format("vllm:open_responses", "vLLM's responses, as proposed, with indexer_topk"),
    "routed-experts": Format(
        "routed_experts:open_responses", "responses of SGLang or vLLM with routed_experts", "expert"
    ),
    "route-trace": Format("route_trace:open_trace", "colibri's ROUTE_TRACE text", "expert"),
}
