"""What the requests' prefixes and their keys prove of each other.

Equal keys are of equal beginnings, of `trace.prefix_key_tokens` tokens or the whole prompt, so those
requests share blocks; a shared beginning that long has an equal key. And the first request shares
nothing with anyone. Standard library only; keeps a little per key.

    prefixes = Prefixes(rules, requests)
    prefixes.add(line, row, prompt_tokens)        # a request's first row; raises Mismatch
    prefixes.close()                              # of a complete run of which nothing was lost
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dsatrace.schema import STEPS_FILE
from dsatrace.verify.mismatch import Mismatch, located, require
from dsatrace.verify.requests import RequestLine
from dsatrace.verify.row import Row
from dsatrace.verify.rules import Rules

_KEY = re.compile("[0-9a-f]{16}")
_CACHED = "prefix.prefix_cached_blocks"


@dataclasses.dataclass
class _Beginning:
    """The requests with one key."""

    num_tokens: int  # that the key is of
    least: Row  # which has the fewest cached blocks
    least_line: int


class Prefixes:
    """Fed with the first row of every request, in the order of the file."""

    def __init__(self, rules: Rules, requests: Mapping[str, RequestLine]) -> None:
        self._rules, self._requests = rules, requests
        self._of_key: dict[str, _Beginning] = {}
        self._num_requests = 0
        self._first_arrived = _first_arrived(requests)
        self._first: tuple[int, Row] | None = None  # of `_first_arrived`
        # One that never ran was announced, and may be what the first to run has a beginning in common with.
        self._some_never_ran = any(known.state == "rejected" for known in requests.values())

    def add(self, line: int, row: Row, prompt_tokens: int) -> None:
        key, size = row.prefix_key, self._rules.block_size
        require(_KEY.fullmatch(key) is not None, "prefix.prefix_key", key, "not 16 hex digits")
        self._num_requests += 1
        is_first = row.forward_idx == 0 and row.batch_size == 1
        if is_first and (self._rules.prefix_cache or not self._some_never_ran):
            _require_nothing_cached(row)
        if row.request_id == self._first_arrived:
            self._first = line, row
        num_tokens = min(prompt_tokens, self._rules.key_tokens)
        found = self._of_key.get(key)
        if found is None:
            self._of_key[key] = _Beginning(num_tokens, row, line)
            return
        other = found.least.request_id
        rule = f"request {other!r} has it too, of its first {found.num_tokens} tokens and not {num_tokens}"
        require(num_tokens == found.num_tokens, "prefix.prefix_key", key, rule)
        # Later prompts are compared with all earlier ones; a cache may have given the blocks up.
        both = num_tokens // size
        if not self._rules.prefix_cache and max(row.cached_blocks, found.least.cached_blocks) < both:
            rule = f"and request {other!r} begins with the same {num_tokens} tokens: one shares {both} blocks"
            raise Mismatch(_CACHED, f"stored {row.cached_blocks}, {rule}")
        if row.cached_blocks < found.least.cached_blocks:
            found.least, found.least_line = row, line

    def close(self) -> None:
        resumed, cached = bool(self._rules.resumed_at_forward), self._rules.prefix_cache
        if self._first is not None and not resumed:
            line, row = self._first
            with located(STEPS_FILE, line, _place(row)):
                _require_nothing_cached(row)
        if self._num_requests < len(self._requests) or (cached and resumed):
            return  # what a request shares may be with one that has no record
        least = min((found.least.cached_blocks for found in self._of_key.values()), default=0)
        rule = "or more in every request, and the first of them cannot share any"
        with located(STEPS_FILE):
            require(least == 0, _CACHED, least, rule)
        for found in self._of_key.values():
            # A cache holds answers too: a beginning may be of a shorter prompt and its answer.
            is_of_prompts = not cached or self._all_prompts_are_long
            if found.num_tokens == self._rules.key_tokens and is_of_prompts:
                row, num_tokens = found.least, found.least.cached_blocks * self._rules.block_size
                rule = f"so an earlier request begins with {num_tokens} equal tokens, and none with this key"
                with located(STEPS_FILE, found.least_line, _place(row)):
                    require(num_tokens < found.num_tokens, _CACHED, row.cached_blocks, rule)

    @property
    def _all_prompts_are_long(self) -> bool:
        return all(known.num_prompt_tokens >= self._rules.key_tokens for known in self._requests.values())


def _place(row: Row) -> dict[str, Any]:
    return row._asdict() | {"layer_id": 0}


def _require_nothing_cached(row: Row) -> None:
    rule = "and nothing was there before the run's first request"
    require(row.cached_blocks == 0, _CACHED, row.cached_blocks, rule)


def _first_arrived(requests: Mapping[str, RequestLine]) -> str | None:
    """The one request that came before all others; None where several came together."""
    earliest = min((known.arrival_s for known in requests.values()), default=None)
    names = [name for name, known in requests.items() if known.arrival_s == earliest]
    return names[0] if len(names) == 1 else None
