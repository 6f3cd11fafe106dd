"""What became of a request, from the scheduler to its line in requests.jsonl.

Standard library only: the sanity run writes its lines with it too.

    facts = RequestFacts(num_output_tokens=64, state="stop", finish_s=1.9)
    line = request_line(request, facts, has_prefix_cache=False, has_tiers=False)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class TracedRequest(Protocol):
    """What the trace reads of a request; token ids are hashed and counted, never written."""

    @property
    def request_id(self) -> str: ...
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def source_row(self) -> int | None: ...
    @property
    def arrival_s(self) -> float: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def needle_positions(self) -> Sequence[int]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedRequest:
    """A request that no engine of ours serves."""

    request_id: str
    prompt_token_ids: Sequence[int]
    source_row: int | None = None
    arrival_s: float = 0.0
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needle_positions: Sequence[int] = ()


@dataclasses.dataclass(eq=False, kw_only=True)
class RequestFacts:
    """What became of a request. Times are seconds from the run's start; None until the event happens."""

    num_output_tokens: int = 0
    first_token_s: float | None = None
    finish_s: float | None = None
    state: str = "unfinished"  # how it ended
    score: float | None = None  # the task's, where it has one
    admitted_s: float | None = None  # for the first time
    num_preemptions: int = 0
    prefix_hit_tokens: int | None = None  # found in the prefix cache when its prefill first began
    num_prefill_tokens: int = 0  # computed in chunks; counts what is computed again
    prefill_s: float = 0.0  # what those chunks took
    num_recomputes: int = 0  # times it was computed again because a tier lost its KV
    error: str | None = None  # one line without prompt text: why it was rejected or failed
    answer_tokens: int | None = None  # generated before its first end of sequence; None: nobody asked
    text: str | None = None  # the answer, with `--save-text`
    text_past_answer: str | None = None  # what came after it
    prompt_token_ids: Sequence[int] | None = None  # with `--save-tokens`
    output_token_ids: Sequence[int] | None = None  # the same


def request_line(
    request: TracedRequest, facts: RequestFacts, *, has_prefix_cache: bool, has_tiers: bool
) -> dict[str, Any]:
    """The fields of `schema.REQUEST_FIELDS`, in their order; the last ones only where there is one."""
    line = {
        "request_id": request.request_id,
        "source_row": request.source_row,
        "num_prompt_tokens": len(request.prompt_token_ids),
        "num_output_tokens": facts.num_output_tokens,
        "arrival_s": request.arrival_s,
        "first_token_s": facts.first_token_s,
        "finish_s": facts.finish_s,
        "state": facts.state,
        "score": facts.score,
        "admitted_s": facts.admitted_s,
        "num_preemptions": facts.num_preemptions,
        "labels": dict(request.labels),
        "needle_positions": sorted(set(request.needle_positions)),
    }
    if has_prefix_cache:
        line["prefix_hit_tokens"] = facts.prefix_hit_tokens
        line["num_prefill_tokens"] = facts.num_prefill_tokens
        line["prefill_s"] = facts.prefill_s
    if has_tiers:
        line["num_recomputes"] = facts.num_recomputes
    for name in (
        *("answer_tokens", "error", "text", "text_past_answer"),
        *("prompt_token_ids", "output_token_ids"),
    ):
        if (fact := getattr(facts, name)) is not None:
            line[name] = fact
    return line
