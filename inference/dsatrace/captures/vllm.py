"""vLLM's proposal for `indexer_topk`: base64 of a `.npy` file, (rows, layers, k), in each choice.

The request's `indexer_topk_prompt_start` leaves out that many of the prompt's first rows; how many, the
lengths in `usage` tell.

    capture = open_responses(Path("responses.jsonl"), Description(), taken=set())
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsatrace.captures.description import Description
from dsatrace.captures.json_responses import base64_source, read_responses
from dsatrace.captures.npy import array_request, npy_rows
from dsatrace.captures.rows import Advance, ArrayCapture, ArrayRows, CapturedRequest, unwatched
from dsatrace.captures.sglang import STATES, count
from dsatrace.errors import UserError

_NAME = "indexer_topk"


class Choice(NamedTuple):
    """One answer of a response."""

    record: Mapping[str, Any]
    name: str
    place: str
    prompt_tokens: int | None
    answer_tokens: int | None  # None where several answers share one count
    start: int | None  # position of the first row, where the response says it


def open_responses(
    path: Path, described: Description, taken: set[str], advance: Advance = unwatched
) -> ArrayCapture:
    def missing(place: str) -> str:
        return (
            f"{place}: no choice with {_NAME}; no release of vLLM returns it, only its pull request 49555, "
            "started with --enable-return-indexer-topk"
        )

    return choices_capture(path, described, taken, _NAME, missing, advance)


def choices_capture(
    path: Path,
    described: Description,
    taken: set[str],
    name: str,
    missing: Callable[[str], str],
    advance: Advance,
) -> ArrayCapture:
    """Arrays in numpy's format that stand in field `name` of each choice."""
    requests, arrays = list[CapturedRequest](), list[ArrayRows]()
    for response, place in read_responses(path, advance):
        for choice in choices(response, place, f"{path.stem}-{len(requests)}"):
            if choice.record.get(name) is None:
                raise UserError(missing(choice.place))
            rows = npy_rows(base64_source(path, choice.record[name], choice.place, name))
            request = array_request(
                choice.name,
                choice.place,
                rows.num_rows,
                described,
                taken,
                first=first_position(choice, rows.num_rows, described),
                prompt_tokens=choice.prompt_tokens,
                state=STATES.get(str(choice.record.get("finish_reason")), "length"),
            )
            requests.append(request)
            arrays.append(rows)
    return ArrayCapture(requests, arrays)


def choices(response: Mapping[str, Any], place: str, name: str) -> Iterator[Choice]:
    found = response.get("choices")
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise UserError(f"{place}: no response with choices; name another --format")
    usage = response.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    prompt, answer = (count(usage, field, place) for field in ("prompt_tokens", "completion_tokens"))
    name = str(response.get("id") or name)
    for i, one in enumerate(found):
        many = len(found) > 1
        start = count(one, f"{_NAME}_prompt_start", place)
        own = f"{name}-{i}" if many else name
        yield Choice(
            one, own, f"{place}, choice {i}" if many else place, prompt, None if many else answer, start
        )


def first_position(choice: Choice, num_rows: int, described: Description) -> int | None:
    """Of the first row; the last row is of the last token but one."""
    if described.of_request(choice.name, "start") is not None or choice.start is not None:
        return choice.start
    if choice.prompt_tokens is None or choice.answer_tokens is None:
        return None
    whole = choice.prompt_tokens + max(choice.answer_tokens, 1) - 1
    if not 0 <= whole - num_rows <= choice.prompt_tokens:
        raise UserError(
            f"{choice.place}: {num_rows:,} rows, and its {choice.prompt_tokens:,} prompt and "
            f"{choice.answer_tokens:,} answer tokens have {whole:,}; say --start"
        )
    return whole - num_rows
