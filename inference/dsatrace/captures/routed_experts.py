"""Experts that SGLang or vLLM routed each token to: the same plumbing as for selections.

SGLang: `meta_info["routed_experts"]`, base64 of int32 (rows, layers, k), from position
`routed_experts_start_len` on. vLLM: base64 of a `.npy` file in each choice, of small unsigned numbers.

    capture = open_responses(Path("responses.jsonl"), Description(experts=256), taken=set())
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dsatrace.captures.description import Description
from dsatrace.captures.json_responses import read_responses
from dsatrace.captures.rows import Advance, Capture, unwatched
from dsatrace.captures.sglang import meta_capture
from dsatrace.captures.vllm import choices_capture
from dsatrace.errors import UserError

_NAME = "routed_experts"


def open_responses(
    path: Path, described: Description, taken: set[str], advance: Advance = unwatched
) -> Capture:
    first = next(iter(read_responses(path)), None)
    if first is not None and isinstance(first.record.get("meta_info"), Mapping):
        start = "routed_experts_start_len"
        return meta_capture(path, described, taken, _NAME, _missing, advance, start)
    if first is not None and "choices" not in first.record:
        raise UserError(_missing(first.place))
    return choices_capture(path, described, taken, _NAME, _missing, advance)


def _missing(place: str) -> str:
    return (
        f"{place}: no {_NAME}; start SGLang or vLLM with --enable-return-routed-experts, and of SGLang ask "
        "with return_routed_experts: true"
    )
