"""The second implementation of what requests.jsonl adds up to: scores, how requests were served, what a
prefix cache saved.

Standard library only, and shares nothing with the fast path but `schema.py`. Keeps the
few fields it needs of every line and sorts them in the end.

    requests = PlainRequests(manifest.get("serving"))
    for line in lines: requests.add(line)
    requests.to_json()           # {"scores": ..., "serving": ...}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from dsatrace.schema import quantile_sorted

Line = Mapping[str, Any]
_KEPT = ("num_output_tokens", "arrival_s", "admitted_s", "first_token_s", "finish_s")
_COUNTED = ("num_preemptions", "num_recomputes")
_MAX_BUCKETS = 64


class PlainRequests:
    """Takes the lines of requests.jsonl in any order; `serving` is the manifest's."""

    def __init__(self, serving: Mapping[str, Any] | None = None) -> None:
        self.num_requests = 0
        self.num_failed = 0  # with a tier
        self.num_recomputes = 0
        self._serving = serving
        self._scores: list[float] = []
        self._groups: dict[str, dict[str, list[float]]] = {}  # label -> value -> scores
        self._of_state: dict[str, list[Line]] = {}
        self._with_prefix_cache: list[Line] = []

    def add(self, line: Line) -> None:
        self.num_requests += 1
        self.num_failed += line.get("state") == "failed"
        self.num_recomputes += line.get("num_recomputes") or 0
        if line["score"] is not None:
            self._scores.append(line["score"])
            for label, value in line.get("labels", {}).items():
                self._groups.setdefault(label, {}).setdefault(value, []).append(line["score"])
        if self._serving is not None:
            kept = {name: line.get(name) for name in _KEPT + _COUNTED}
            self._of_state.setdefault(line["state"], []).append(kept)
        if "prefix_hit_tokens" in line:
            names = ("num_prompt_tokens", "prefix_hit_tokens", "num_prefill_tokens", "prefill_s")
            self._with_prefix_cache.append({name: line[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        """The summary's `scores`, `serving` and `prefix_cache`."""
        scores = None
        if self._scores:
            by = {
                label: {value: _score(groups[value]) for value in sorted(groups)}
                for label, groups in sorted(self._groups.items())
            }
            scores = {**_score(self._scores), "by": by}
        return {
            "scores": scores,
            "serving": self._serving and self._served_json(self._serving),
            "prefix_cache": _saved(self._with_prefix_cache),
        }

    def histograms(self) -> dict[str, Any]:
        """By name, the microseconds that the latencies are taken from."""
        return {
            f"{name}_us": {
                "values": sorted(counts := Counter(durations)),
                "counts": [counts[us] for us in sorted(counts)],
            }
            for name, durations in self._durations().items()
        }

    def _served(self) -> list[Line]:
        return self._of_state.get("stop", []) + self._of_state.get("length", [])

    def _durations(self) -> dict[str, list[int]]:
        """Whole microseconds of the served requests, by name; none where no requests arrived over time."""
        if self._serving is None:
            return {}
        several = [line for line in self._served() if line["num_output_tokens"] > 1]
        return {
            "latency": _us(self._served(), "arrival_s", "finish_s"),
            "time_to_first_token": _us(self._served(), "arrival_s", "first_token_s"),
            "time_per_output_token": _us(
                several, "first_token_s", "finish_s", lambda line: line["num_output_tokens"] - 1
            ),
            "queue": _us(self._served(), "arrival_s", "admitted_s"),
        }

    def _served_json(self, serving: Mapping[str, Any]) -> dict[str, Any]:
        finished = [line for line in self._served() if line["finish_s"] is not None]
        span = None
        if finished:
            span = max(line["finish_s"] for line in finished) - min(line["arrival_s"] for line in finished)
        lines = [line for lines in self._of_state.values() for line in lines]
        others = ("rejected", "aborted", "unfinished")
        preemptions, recomputes = (sum(line[name] or 0 for line in lines) for name in _COUNTED)
        counts = {
            "served": len(self._served()),
            **{state: len(self._of_state.get(state, [])) for state in others},
            "preemptions": preemptions,
        }
        if "failed" in self._of_state:
            counts["failed"] = len(self._of_state["failed"])
        if recomputes:
            counts["recomputes"] = recomputes
        return {
            "mode": serving["mode"],
            "clock": serving["clock"],
            "counts": counts,
            **{f"{name}_ms": _latency(durations) for name, durations in self._durations().items()},
            "span_s": span,
            "requests_per_s": len(finished) / span if span else None,
            "output_tokens_per_s": sum(line["num_output_tokens"] for line in finished) / span
            if span
            else None,
            "requests_over_time": _over_time(
                [math.floor(line["arrival_s"]) for line in lines],
                [math.floor(line["finish_s"]) for line in finished],
            ),
        }


def _saved(lines: Sequence[Line]) -> dict[str, Any] | None:
    """What a prefix cache saved these requests; None where there are none."""
    if not lines:
        return None
    begun = [line for line in lines if line["prefix_hit_tokens"] is not None]
    prompt_tokens = sum(line["num_prompt_tokens"] for line in begun)
    hit_tokens = sum(line["prefix_hit_tokens"] for line in begun)
    computed_tokens = sum(line["num_prefill_tokens"] for line in lines)
    prefill_us = sum(round(line["prefill_s"] * 1e6) for line in lines)
    return {
        "prompt_tokens": prompt_tokens,
        "hit_tokens": hit_tokens,
        "hit_rate": hit_tokens / prompt_tokens if prompt_tokens else None,
        "computed_tokens": computed_tokens,
        "prefill_s": prefill_us / 1e6,
        "saved_s": hit_tokens * prefill_us / computed_tokens / 1e6 if computed_tokens else None,
        "saved_kind": "modelled",
    }


def _score(scores: Sequence[float]) -> dict[str, Any]:
    """An exact mean, rounded once: the order of the lines cannot show."""
    mean = math.fsum(score * count for score, count in Counter(scores).items()) / len(scores)
    return {"mean": mean, "num_scored": len(scores)}


def _us(
    lines: Sequence[Line], start: str, end: str, parts: Callable[[Line], int] = lambda line: 1
) -> list[int]:
    """Microseconds from `start` to `end` of the lines that have both."""
    both = (line for line in lines if line[start] is not None and line[end] is not None)
    return [round((line[end] - line[start]) * 1e6 / parts(line)) for line in both]


def _latency(durations: Sequence[int]) -> dict[str, float | None]:
    if not durations:
        return dict.fromkeys(("p50", "p95", "p99", "max", "mean"))
    ascending = sorted(durations)
    named = {f"p{percent}": quantile_sorted(ascending, percent) / 1000 for percent in (50, 95, 99)}
    mean = float(Fraction(sum(ascending), len(ascending)))
    return {**named, "max": ascending[-1] / 1000, "mean": mean / 1000}


def _over_time(arrived: Sequence[int], finished: Sequence[int]) -> list[dict[str, int]]:
    """Seconds in the fewest buckets of 2^n that `_MAX_BUCKETS` or fewer hold."""
    last = max((*arrived, *finished), default=-1)
    width = next(2**n for n in range(64) if last // 2**n < _MAX_BUCKETS)
    return [
        {
            "start_s": start,
            "arrived": sum(start <= second < start + width for second in arrived),
            "finished": sum(start <= second < start + width for second in finished),
        }
        for start in range(0, last + 1, width)
    ]
