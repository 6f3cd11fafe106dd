"""Whose tokens a request begins with, as far as a run's records prove it.

A record says how many leading blocks of its prompt an earlier one begins with too, and hashes the prompt's
first tokens under a key; it does not say whose they are. Equal hashes are of equal tokens. Beyond those, a
beginning is an earlier request's only where every request that it could be has the same tokens there; what
is left is counted as the request's own, and as `untold`. So nothing counts as shared that is not.

    prefixes = find_prefixes(beginnings_of(run, "outputs/mine"), key_tokens=256, block=16)
    prefixes["r7"].spans        # ((320, "r0"), (512, "r2")): tokens 0 to 319 are r0's, 320 to 511 r2's
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsatrace.errors import UserError
from dsatrace.schema import value_at
from dsatrace.trace.reader import RunReader

Spans = tuple[tuple[int, str], ...]
"""Where each stretch of tokens ends, and the request that had it first."""

_ANY_LENGTH = 1 << 40
_SHARED, _KEY = "prefix.prefix_cached_blocks", "prefix.prefix_key"
_FIELDS = ("request_id", "step_idx", "seq_len_current", "forward_idx", _SHARED, _KEY)


class Beginning(NamedTuple):
    """What a request's first record tells."""

    request_id: str
    key: str | None  # None: it has no record, and may begin with anything
    shared_tokens: int
    prompt_tokens: int
    kept_tokens: int  # that later ones can begin with: the prompt's or, in a prefix cache, the answer's too


class Prefix(NamedTuple):
    """What a request shares."""

    group: str  # the first of the requests that begin alike
    spans: Spans  # the rest is its own
    untold: int  # tokens that some earlier prompt has too, and nobody can tell which

    @property
    def shared_tokens(self) -> int:
        return self.spans[-1][0] if self.spans else 0


def beginnings_of(run: RunReader, name: str) -> list[Beginning]:
    """Of all requests, in the order in which they came; those without a record come first.

    Raises `UserError`, which begins with `name`, for a run whose records say nothing of prefixes.
    """
    block = run.manifest["trace"]["block_size_tokens"]
    is_cached = run.manifest.get("prefix_source") == "cache"
    lines = {line["request_id"]: line for line in run.requests()}

    def answer_of(line: Mapping[str, Any] | None) -> int:
        if not is_cached:
            return 0
        return _ANY_LENGTH if line is None else int(line["num_output_tokens"])

    first: dict[str, tuple[int, Beginning]] = {}
    for record in run.steps(_FIELDS):
        request_id, forward = record["request_id"], record["forward_idx"]
        if request_id in first and first[request_id][0] <= forward:
            continue
        shared, key = value_at(record, _SHARED), value_at(record, _KEY)
        if shared is None or key is None:
            raise UserError(
                f"{name}: --share prefix: its records say nothing of prefixes; leave it out, or record with "
                "`dsatrace run` or `generate`"
            )
        prompt = record["seq_len_current"] - record["step_idx"] - 1
        kept = prompt + answer_of(lines.get(request_id))
        first[request_id] = (forward, Beginning(request_id, key, shared * block, prompt, kept))
    silent = [
        Beginning(request_id, None, 0, line["num_prompt_tokens"], line["num_prompt_tokens"] + answer_of(line))
        for request_id, line in lines.items()
        if request_id not in first
    ]
    return silent + [one for _, one in sorted(first.values(), key=lambda found: found[0])]


def find_prefixes(beginnings: Sequence[Beginning], key_tokens: int, block: int) -> dict[str, Prefix]:
    """`beginnings` in the order in which the requests came; `key_tokens`: that a key is of."""
    found: dict[str, Prefix] = {}
    of_key: dict[str, str] = {}
    for place, one in enumerate(beginnings):
        if one.key is None:
            continue
        spans: Spans = ()
        if one.key in of_key:
            spans = _beginning(of_key[one.key], min(one.prompt_tokens, key_tokens) // block * block, found)
        of_key.setdefault(one.key, one.request_id)
        if one.shared_tokens > (spans[-1][0] if spans else 0):
            holders = [other for other in beginnings[:place] if _may_hold(other, one, key_tokens)]
            begins = (_beginning(holder.request_id, one.shared_tokens, found) for holder in holders)
            common = functools.reduce(_common, begins) if holders else ()
            spans = max(spans, common, key=lambda told: told[-1][0] if told else 0)
        told = spans[-1][0] if spans else 0
        group = spans[0][1] if spans else one.request_id
        found[one.request_id] = Prefix(group, spans, max(0, one.shared_tokens - told))
    return found


def _may_hold(earlier: Beginning, one: Beginning, key_tokens: int) -> bool:
    """Whether `one` may share its tokens with the earlier request: a hash of all of them would show it."""
    if earlier.kept_tokens < one.shared_tokens:
        return False
    is_in_key = min(one.shared_tokens, earlier.prompt_tokens) >= key_tokens
    return earlier.key is None or earlier.key == one.key or not is_in_key


def _beginning(request_id: str, num_tokens: int, found: Mapping[str, Prefix]) -> Spans:
    """The first tokens of a request, by who had them first."""
    prefix = found.get(request_id)
    spans = [] if prefix is None else [span for span in prefix.spans if span[0] < num_tokens]
    rest = [] if prefix is None else [span for span in prefix.spans if span[0] >= num_tokens]
    if num_tokens:
        spans.append((num_tokens, rest[0][1] if rest else request_id))
    return tuple(spans)


def _common(one: Spans, other: Spans) -> Spans:
    """What both begin with."""
    common = []
    for (end, owner), (other_end, other_owner) in zip(one, other, strict=False):
        if owner != other_owner:
            break
        common.append((min(end, other_end), owner))
        if end != other_end:
            break
    return tuple(common)


def span_of_blocks(spans: Spans, num_blocks: int, block: int) -> np.ndarray:
    """(B,) int64, for each block of so many tokens the span that it ends in; the number of spans: in none."""
    ends = np.array([end for end, _ in spans], np.int64)
    return np.searchsorted(ends, (np.arange(num_blocks) + 1) * block)
