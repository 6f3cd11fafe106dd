"""SGLang's responses with `meta_info["indexer_topk"]`: base64 of raw int32, (rows, layers, k).

The response tells neither layers nor k, and what an id is depends on the server; see docs/import.md.

    capture = open_responses(Path("responses.jsonl"), Description(layers="61", top_k=2048), taken=set())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.captures.description import Description
from dsatrace.captures.json_responses import base64_source, read_responses
from dsatrace.captures.npy import array_request
from dsatrace.captures.rows import Advance, ArrayCapture, ArrayRows, CapturedRequest, check_row, unwatched
from dsatrace.errors import UserError

_NAME = "indexer_topk"
STATES = {"stop": "stop", "length": "length", "abort": "aborted"}


def open_responses(
    path: Path, described: Description, taken: set[str], advance: Advance = unwatched
) -> ArrayCapture:
    def missing(place: str) -> str:
        return (
            f"{place}: no meta_info.{_NAME}; start the server with --enable-return-indexer-topk, and send "
            "return_indexer_topk: true to its native /generate; the OpenAI routes lack the field"
        )

    return meta_capture(path, described, taken, _NAME, missing, advance)


def meta_capture(
    path: Path,
    described: Description,
    taken: set[str],
    name: str,
    missing: Callable[[str], str],
    advance: Advance,
    start: str = "",
) -> ArrayCapture:
    """Plain int32 that stands in field `name` of each response's `meta_info`, from the position on that
    its field `start` names."""
    layers = described.layer_ids
    if layers is None or described.top_k is None:
        flag = "--layers" if layers is None else "--top-k"
        raise UserError(f"{flag} is missing: SGLang's response does not say it; see the model's config")
    shape = len(layers) * (described.heads or 1), described.top_k
    requests, arrays, from_cache = list[CapturedRequest](), list[ArrayRows](), 0
    for record, place in read_responses(path, advance):
        meta = record.get("meta_info")
        if not isinstance(meta, Mapping) or meta.get(name) is None:
            raise UserError(missing(place))
        rows = raw_rows(base64_source(path, meta[name], place, f"meta_info.{name}"), shape, place)
        skipped, own = count(meta, start, place) or 0, str(meta.get("id") or f"{path.stem}-{len(requests)}")
        is_told = described.of_request(own, "start") is not None
        first, prompt_tokens = _lengths(meta, rows.num_rows, skipped, is_told, place)
        request = array_request(
            own,
            place,
            rows.num_rows,
            described,
            taken,
            first=first,
            prompt_tokens=prompt_tokens,
            state=_state_of(meta.get("finish_reason")),
        )
        requests.append(request)
        arrays.append(rows)
        from_cache += bool(meta.get("cached_tokens"))
    notes = []
    if from_cache:
        notes.append(
            f"{path}: {from_cache} of {len(requests)} requests found part of their prompt in the prefix "
            "cache, so those rows are of other requests"
        )
    return ArrayCapture(requests, arrays, notes)


def raw_rows(source: Any, shape: tuple[int, int], place: str) -> ArrayRows:
    """Rows of plain int32; raises `UserError` where they are not whole."""
    check_row(shape, place)
    row_bytes = 4 * shape[0] * shape[1]
    if source.num_bytes % row_bytes:
        raise UserError(
            f"{place}: {source.num_bytes:,} bytes are no whole rows of {shape[0]} layers of {shape[1]} ids; "
            "correct --layers or --top-k"
        )
    return ArrayRows(source, np.dtype("<i4"), (source.num_bytes // row_bytes, *shape))


def _lengths(
    meta: Mapping[str, Any], num_rows: int, skipped: int, is_told: bool, place: str
) -> tuple[int | None, int | None]:
    """The first row's position, which the user `is_told` tells, and the prompt's length, as far as the
    response tells them."""
    prompt, answer = (count(meta, name, place) for name in ("prompt_tokens", "completion_tokens"))
    if prompt is None or answer is None or is_told:
        return None, prompt
    whole = prompt + max(answer, 1) - 1  # the last token is never fed back
    if num_rows == whole - skipped:
        return skipped, prompt
    if num_rows == answer - 1:  # a decode instance has no rows of the prompt
        return prompt, prompt
    raise UserError(
        f"{place}: {num_rows:,} rows; {prompt:,} prompt and {answer:,} answer tokens have {whole:,}, or "
        f"{max(answer - 1, 0):,} without the prompt's; correct --layers and --top-k, or say --start"
    )


def count(meta: Mapping[str, Any], name: str, place: str) -> int | None:
    """A number of tokens; None where the field is absent."""
    value = meta.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 2**31):
        raise UserError(f"{place}: {name} is no count; correct it")
    return value


def _state_of(reason: object) -> str:
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    return STATES.get(str(kind), "length")
