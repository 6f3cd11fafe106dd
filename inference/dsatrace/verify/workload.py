"""What summary.json says of the workload, as far as the requests can contradict it.

Standard library only; shares no table with the workloads but reads what they say of themselves.

    scores = Scores.of(summary)                  # of the metric: "string match, 0 to 100"
    scores.check(line["score"])                  # raises Mismatch
    check_workload(summary["workload"], {"niah_single_1": 20}, num_requests=20)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dsatrace.verify.mismatch import Mismatch, compare, require

_RANGE = re.compile(r"\b(\d+) (to|or) (\d+)\b")
_REQUESTS = {"ruler": "examples", "burstgpt": "requests", "longbenchv2": "rows"}
"""The count of a workload that makes one request of each."""
_OF_REQUESTS = ("unanswered", "only_thoughts", "truncated", "question_cut", "answers_capped")
"""Counts of requests that something happened to."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a request's score may be."""

    metric: str | None = None  # None: answers are not judged
    is_known: bool = False  # else any score may stand

    @classmethod
    def of(cls, summary: Mapping[str, Any] | None) -> Scores:
        """Of a summary that follows the schema, or none."""
        workload = (summary or {}).get("workload") or {}
        if "metric" not in workload:
            return cls()
        metric = workload["metric"]
        is_text = metric is None or isinstance(metric, str)
        require(is_text, "workload.metric", metric, "neither text nor null")
        return cls(metric, True)

    def check(self, score: float | None) -> None:
        if not self.is_known or score is None:
            return
        require(self.metric is not None, "score", score, "but the workload has no metric")
        limits = _RANGE.search(self.metric or "")
        if limits is None:
            return
        low, high = float(limits[1]), float(limits[3])
        fits = low <= score <= high if limits[2] == "to" else score in (low, high)
        require(fits, "score", score, f"not {limits[0]}, as the metric is")


def check_workload(workload: Mapping[str, Any] | None, labels: Mapping[str, int], num_requests: int) -> None:
    """`workload` of a complete run; `labels`: requests per task, where they have one."""
    if not workload:
        return
    counts = workload.get("counts", {})
    if not isinstance(counts, Mapping):
        raise Mismatch("workload.counts", f"stored {counts!r}, not object")
    for name, count in counts.items():
        require(type(count) is int and count >= 0, f"workload.counts.{name}", count, "not a count")
    for name in _OF_REQUESTS:
        count = counts.get(name, 0)
        require(count <= num_requests, f"workload.counts.{name}", count, f"of {num_requests} requests")
    name = workload.get("name")
    require(isinstance(name, str) and name != "", "workload.name", name, "no name")
    of_requests = _REQUESTS.get(str(name))
    if of_requests is not None and of_requests in counts:
        compare(counts[of_requests], num_requests, f"workload.counts.{of_requests}")
    if name == "ruler":
        by_task = {task: count for task, count in counts.items() if task not in ("examples", *_OF_REQUESTS)}
        compare(by_task, dict(labels), "workload.counts")
        compare(dict(labels), by_task, "workload.counts")
