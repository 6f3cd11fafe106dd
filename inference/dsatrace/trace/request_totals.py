"""What the lines of requests.jsonl add up to: scores, how requests were served, what a prefix cache saved.

Counts are exact (whole microseconds, whole seconds, distinct scores), so parts merge by addition; merged
runs lie over each other on one time axis. Knows no tensor, no step and no file.

    totals = RequestTotals(serving={"mode": "continuous", "clock": "virtual"})
    totals.add(line)
    fields, histograms = totals.to_json()     # fields["scores"], fields["serving"]
"""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsatrace.schema import nearest_rank
from dsatrace.trace.histogram import ValueCounts

Request = Mapping[str, Any]

MAX_BUCKETS = 64
SERVED = ("stop", "length")
_QUANTILES = (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100))


def _time_per_output_token(request: Request) -> int | None:
    gaps = request["num_output_tokens"] - 1
    return _us(request["first_token_s"], request["finish_s"], gaps) if gaps > 0 else None


def _us(start_s: float | None, end_s: float | None, parts: int = 1) -> int | None:
    """Whole microseconds from start to end, per part; None where a time is missing."""
    return None if start_s is None or end_s is None else round((end_s - start_s) * 1e6 / parts)


DURATIONS: dict[str, Callable[[Request], int | None]] = {
    "latency": lambda request: _us(request["arrival_s"], request["finish_s"]),
    "time_to_first_token": lambda request: _us(request["arrival_s"], request["first_token_s"]),
    "time_per_output_token": _time_per_output_token,
    "queue": lambda request: _us(request["arrival_s"], request.get("admitted_s")),
}
"""Durations of a served request: the summary's `<name>_ms`, from the histogram `<name>_us`."""


class RequestTotals:
    """Totals of a run, or of a part of one."""

    def __init__(self, serving: Mapping[str, Any] | None = None) -> None:
        """`serving` is the manifest's; None where no requests arrived over time."""
        self._serving = serving
        self._scores: dict[tuple[str, str] | None, ValueCounts] = {}  # (label, value); None: all
        self._counts = Counter[str]()  # by state; preemptions, recomputes; output tokens of finished requests
        self._durations = {name: ValueCounts() for name in DURATIONS}
        self._spans: list[float] = []  # earliest arrival, latest finish
        self._arrived = Counter[int]()  # by second
        self._finished = Counter[int]()
        self._past_answer = Counter[str]()  # empty where no request may go on past its answer
        self._prefix_cache = Counter[str]()  # tokens and microseconds; empty where no request met a cache

    def add(self, request: Request) -> None:
        score = request["score"]
        if score is not None:
            for group in (None, *request.get("labels", {}).items()):
                self._scores.setdefault(group, ValueCounts()).add([score])
        if self._serving is not None:
            self._add_served(request)
        if "prefix_hit_tokens" in request:
            self._add_prefix_hit(request)
        if "answer_tokens" in request:
            num_steps = max(request["num_output_tokens"] - 1, 0)  # the first token comes with the prompt
            num_past = max(num_steps - request["answer_tokens"], 0)
            self._past_answer.update(requests=int(num_past > 0), decode_steps=num_steps, past_steps=num_past)

    def merge(self, other: RequestTotals) -> None:
        for group, counts in other._scores.items():
            self._scores.setdefault(group, ValueCounts()).merge(counts)
        self._counts.update(other._counts)
        for name, durations in self._durations.items():
            durations.merge(other._durations[name])
        self._widen(other._spans)
        self._arrived.update(other._arrived)
        self._finished.update(other._finished)
        self._past_answer.update(other._past_answer)
        self._prefix_cache.update(other._prefix_cache)

    def to_json(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The summary's `scores`, `serving`, `prefix_cache` and, where there is one, `past_answer`; and the
        latencies' histograms, by name."""
        histograms: dict[str, Any] = {}
        if self._serving is not None:
            histograms = {f"{name}_us": counted.to_json() for name, counted in self._durations.items()}
        fields = {
            "scores": self._scores_json(),
            "serving": self._serving_json(histograms),
            "prefix_cache": self._prefix_cache_json(),
            **({"past_answer": dict(self._past_answer)} if self._past_answer else {}),
        }
        return fields, histograms

    def _scores_json(self) -> dict[str, Any] | None:
        """`{mean, num_scored, by}`, labels and values in order; None where no request has a score."""
        if None not in self._scores:
            return None
        by: dict[str, dict[str, Any]] = {}
        groups = [group for group in self._scores if group is not None]
        for label, value in sorted(groups, key=lambda group: (group[0], str(group[1]))):
            by.setdefault(label, {})[str(value)] = _mean_score(self._scores[label, value])
        return {**_mean_score(self._scores[None]), "by": by}

    def _serving_json(self, histograms: Mapping[str, Any]) -> dict[str, Any] | None:
        """None where no requests arrived over time."""
        if self._serving is None:
            return None
        span = self._spans[1] - self._spans[0] if self._spans else None
        counts = self._counts
        return {
            "mode": self._serving["mode"],
            "clock": self._serving["clock"],
            "counts": {
                "served": sum(counts[state] for state in SERVED),
                **{name: counts[name] for name in ("rejected", "aborted", "unfinished", "preemptions")},
                **{name: counts[name] for name in ("failed", "recomputes") if counts[name]},
            },
            **{f"{name}_ms": _latency(**histograms[f"{name}_us"]) for name in self._durations},
            "span_s": span,
            "requests_per_s": self._finished.total() / span if span else None,
            "output_tokens_per_s": counts["output_tokens"] / span if span else None,
            "requests_over_time": self._over_time(),
        }

    def _add_served(self, request: Request) -> None:
        self._counts[request["state"]] += 1
        for name in ("preemptions", "recomputes"):
            self._counts[name] += request.get(f"num_{name}", 0)
        self._arrived[math.floor(request["arrival_s"])] += 1
        if request["state"] not in SERVED:
            return
        for name, duration in DURATIONS.items():
            if (us := duration(request)) is not None:
                self._durations[name].add([us])
        if request["finish_s"] is not None:
            self._finished[math.floor(request["finish_s"])] += 1
            self._counts["output_tokens"] += request["num_output_tokens"]
            self._widen([request["arrival_s"], request["finish_s"]])

    def _add_prefix_hit(self, request: Request) -> None:
        hit_tokens = request["prefix_hit_tokens"]
        self._prefix_cache.update(
            prompt_tokens=0 if hit_tokens is None else request["num_prompt_tokens"],
            hit_tokens=hit_tokens or 0,
            computed_tokens=request["num_prefill_tokens"],
            prefill_us=round(request["prefill_s"] * 1e6),
        )

    def _prefix_cache_json(self) -> dict[str, Any] | None:
        """None where no request met a prefix cache."""
        if not self._prefix_cache:
            return None
        prompt_tokens, hit_tokens, computed_tokens, prefill_us = (
            self._prefix_cache[name]
            for name in ("prompt_tokens", "hit_tokens", "computed_tokens", "prefill_us")
        )
        return {
            "prompt_tokens": prompt_tokens,
            "hit_tokens": hit_tokens,
            "hit_rate": hit_tokens / prompt_tokens if prompt_tokens else None,
            "computed_tokens": computed_tokens,
            "prefill_s": prefill_us / 1e6,
            "saved_s": hit_tokens * prefill_us / computed_tokens / 1e6 if computed_tokens else None,
            "saved_kind": "modelled",
        }

    def _widen(self, spans: list[float]) -> None:
        if spans:
            mine = self._spans or spans
            self._spans = [min(mine[0], spans[0]), max(mine[1], spans[1])]

    def _over_time(self) -> list[dict[str, int]]:
        seconds = self._arrived.keys() | self._finished.keys()
        num_seconds = max(seconds) + 1 if seconds else 0
        width = 1
        while width * MAX_BUCKETS < num_seconds:
            width *= 2
        buckets = [{"start_s": start, "arrived": 0, "finished": 0} for start in range(0, num_seconds, width)]
        for name, counts in (("arrived", self._arrived), ("finished", self._finished)):
            for second, count in counts.items():
                buckets[second // width][name] += count
        return buckets


def _mean_score(counts: ValueCounts) -> dict[str, Any]:
    return {"mean": counts.distribution()["mean"], "num_scored": counts.total}


def _latency(values: Sequence[int], counts: Sequence[int]) -> dict[str, float | None]:
    """`values` are ascending microseconds; a run has about as many distinct ones as requests."""
    if not counts:
        return dict.fromkeys([*(name for name, _ in _QUANTILES), "mean"])
    seen = list(itertools.accumulate(counts))
    us: dict[str, float] = {
        name: values[bisect.bisect_right(seen, nearest_rank(seen[-1], percent))]
        for name, percent in _QUANTILES
    }
    us["mean"] = sum(map(operator.mul, values, counts)) / seen[-1]
    return {name: value / 1000 for name, value in us.items()}
