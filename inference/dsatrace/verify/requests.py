"""The lines of requests.jsonl: what each must be like, what it says of records, what all add up to.

The totals (scores, how requests were served, what a prefix cache saved) are the second
implementation: standard library only, and nothing shared with the fast path but `schema.py`. They
keep a few fields of every line and sort them in the end.

    totals = PlainRequests(manifest.get("serving"))
    requests = read_requests(run, totals, rules, Scores())      # request id -> RequestLine; raises Mismatch
    totals.to_json()                                  # {"scores": ..., "serving": ...}
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from dsatrace.schema import REQUEST_FIELDS, REQUESTS_FILE, problems, quantile_sorted
from dsatrace.verify.files import PlainRun
from dsatrace.verify.mismatch import located, require, require_range
from dsatrace.verify.rules import Rules, require_schema
from dsatrace.verify.workload import Scores

Line = Mapping[str, Any]
_KEPT = ("num_output_tokens", "arrival_s", "admitted_s", "first_token_s", "finish_s")
_COUNTED = ("num_preemptions", "num_recomputes")
_MAX_BUCKETS = 64
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")
_STATES = ("stop", "length", "rejected", "aborted", "unfinished", "failed")
_TIMES = ("arrival_s", "admitted_s", "first_token_s", "finish_s")
_OF_PREFIX_CACHE = ("prefix_hit_tokens", "num_prefill_tokens", "prefill_s")
"""Of a request, where the run has a prefix cache."""


class RequestLine(NamedTuple):
    """What a line of requests.jsonl says of the request's records."""

    line: int
    num_prompt_tokens: int
    num_output_tokens: int
    state: str
    needle_positions: tuple[int, ...] = ()
    prefix_hit_tokens: int | None = None  # None: there is no cache, or its prefill never began
    arrival_s: float = 0.0
    first_token_s: float | None = None
    finish_s: float | None = None
    answer_tokens: int | None = None  # None: it did not go on past its answer, or nobody knows

    @property
    def has_ended(self) -> bool:
        return self.state in ("stop", "length", "rejected")

    @property
    def decode_s(self) -> float | None:
        """From its first token to its end; None where that is not known."""
        if self.first_token_s is None or self.finish_s is None:
            return None
        return self.finish_s - self.first_token_s

    @property
    def last_step(self) -> int | None:
        """The highest step there can be; None when it is not known.

        The first token comes from prefill and the last is never fed back. The forward during which a
        request was aborted, or failed, may be recorded, though its token is not kept.
        """
        if self.state == "unfinished":
            return None
        if self.state == "rejected":
            return -2  # no prefill either
        return max(self.num_output_tokens - 2 + (self.state in ("aborted", "failed")), -1)


def read_requests(
    run: PlainRun, totals: PlainRequests, rules: Rules, scores: Scores
) -> dict[str, RequestLine]:
    """What requests.jsonl says of each request; checks its lines and adds them to `totals`."""
    found: dict[str, RequestLine] = {}
    for line, record in run.lines(REQUESTS_FILE):
        with located(REQUESTS_FILE, line, {"request_id": record.get("request_id")}):
            _check_request(record)
            scores.check(record["score"])
            _check_prefix_cache(record, rules)
            _check_tier_losses(record, rules)
            _check_answer_tokens(record, rules)
            _check_token_ids(record)
            require(record["request_id"] not in found, "request_id", record["request_id"], "stands twice")
        found[record["request_id"]] = RequestLine(
            line,
            record["num_prompt_tokens"],
            record["num_output_tokens"],
            record["state"],
            tuple(record.get("needle_positions", ())),
            record.get("prefix_hit_tokens"),
            record["arrival_s"],
            record["first_token_s"],
            record["finish_s"],
            record.get("answer_tokens"),
        )
        totals.add(record)
    return found


def answers(requests: Mapping[str, RequestLine]) -> dict[str, int]:
    """The tokens of the answers of requests that may have gone on past them."""
    told = {name: known.answer_tokens for name, known in requests.items()}
    return {name: tokens for name, tokens in told.items() if tokens is not None}


def _check_request(record: dict[str, Any]) -> None:
    """A line of requests.jsonl, without regard to the manifest."""
    require_schema(problems(record, "full", REQUEST_FIELDS))
    name = record["request_id"]
    require(name != "" and not _CONTROLS.search(name), "request_id", name, "empty, or has control characters")
    state, num_prompt, num_output = (
        record[name] for name in ("state", "num_prompt_tokens", "num_output_tokens")
    )
    require(state in _STATES, "state", state, f"not one of {', '.join(_STATES)}")
    require(num_prompt >= 1, "num_prompt_tokens", num_prompt, "an empty prompt")
    at_least = int(state in ("stop", "length"))
    require(num_output >= at_least, "num_output_tokens", num_output, f"state {state}")
    require(state != "rejected" or num_output == 0, "num_output_tokens", num_output, f"state {state}")
    times = [record.get(name) for name in _TIMES]
    known = [time for time in times if time is not None]
    require(known == sorted(known), "finish_s", times, "arrival, admission, first token, finish out of order")
    require(known[0] >= 0, "arrival_s", known[0], "before the run's start")
    preemptions = record.get("num_preemptions", 0)
    require(preemptions >= 0, "num_preemptions", preemptions, "below 0")
    for label, value in record.get("labels", {}).items():
        require(isinstance(value, str), f"labels.{label}", value, "not string")
    needles = record.get("needle_positions", [])
    require(needles == sorted(set(needles)), "needle_positions", needles, "not ascending, each of them once")
    inside = not needles or (needles[0] >= 0 and needles[-1] < num_prompt)
    require(inside, "needle_positions", needles, f"outside the prompt's {num_prompt} tokens")


def _check_prefix_cache(record: dict[str, Any], rules: Rules) -> None:
    """What a request found in the prefix cache, and what was computed of its prompt."""
    for name in _OF_PREFIX_CACHE:
        rule = "the manifest's prefix_source is cache" if rules.prefix_cache else "without a prefix cache"
        require((name in record) == rules.prefix_cache, name, record.get(name), rule)
    if not rules.prefix_cache:
        return
    hit, computed, num_prompt = (
        record[name] for name in ("prefix_hit_tokens", "num_prefill_tokens", "num_prompt_tokens")
    )
    require(record["prefill_s"] >= 0, "prefill_s", record["prefill_s"], "below 0")
    require(computed >= 0 and (hit is not None or computed == 0), "num_prefill_tokens", computed, "no count")
    answered = record["state"] in ("stop", "length")
    if hit is None:
        require(not answered, "prefix_hit_tokens", hit, f"state {record['state']}")
        return
    require_range("prefix_hit_tokens", hit, 0, num_prompt - 1)  # the last token is always computed
    least = num_prompt - hit if answered else 0
    rule = f"{num_prompt} prompt tokens, {hit} of them cached"
    if record.get("num_preemptions", 0) == 0 and record.get("num_recomputes", 0) == 0:
        require(least <= computed <= num_prompt - hit, "num_prefill_tokens", computed, rule)


def _check_tier_losses(record: dict[str, Any], rules: Rules) -> None:
    """Requests that lost KV with a tier; only a run with tiers has any."""
    offloaded, name = rules.tiers is not None, "num_recomputes"
    rule = "the manifest has tiers" if offloaded else "the manifest has no tiers"
    require((name in record) == offloaded, name, record.get(name), rule)
    require(record.get(name, 0) >= 0, name, record.get(name), "below 0")
    if record["state"] == "failed":
        require(offloaded, "state", "failed", rule)
        require(bool(record.get("error")), "error", record.get("error"), "a request that failed says why")


def _check_token_ids(record: dict[str, Any]) -> None:
    """As many ids as tokens, of both or of neither."""
    counts = {"prompt_token_ids": "num_prompt_tokens", "output_token_ids": "num_output_tokens"}
    for name, count in counts.items():
        has_all = counts.keys() <= record.keys()
        require(has_all or not counts.keys() & record.keys(), name, record.get(name), "one without the other")
        if has_all:
            require(len(record[name]) == record[count], name, len(record[name]), f"{record[count]} tokens")


def _check_answer_tokens(record: dict[str, Any], rules: Rules) -> None:
    """Where the answer ended, in a run that let answers go on past their end."""
    name, end, state = "answer_tokens", rules.answer_end, record["state"]
    if end is None or state == "unfinished":  # of one that was lost nobody knows the answer
        rule = "the manifest has no answer_end" if end is None else f"state {state}"
        require(name not in record, name, record.get(name), rule)
        return
    require(name in record, name, None, "missing, and the manifest has answer_end")
    answer, num_output = record[name], record["num_output_tokens"]
    require_range(name, answer, 0, num_output)
    if state == "stop":  # with an end of sequence, which is its last token
        require(not end.ignore_eos, "state", state, "but the end of sequence was ignored")
        least = end.min_new_tokens
        require(num_output > least, "num_output_tokens", num_output, f"ended before {least} new tokens")
        require(answer < num_output, name, answer, f"state {state} with {num_output} tokens")


class PlainRequests:
    """Takes the lines of requests.jsonl in any order; `serving` is the manifest's."""

    def __init__(self, serving: Mapping[str, Any] | None = None) -> None:
        self.num_requests = 0
        self.num_failed = 0  # with a tier
        self.num_recomputes = 0
        self._serving = serving
        self._scores: list[float] = []
        self._groups: dict[str, dict[str, list[float]]] = {}  # label -> value -> scores
        self.num_by_task = Counter[str]()  # where they have that label
        self._of_state: dict[str, list[Line]] = {}
        self._with_prefix_cache: list[Line] = []
        self._lengths: list[tuple[int, int]] = []  # (generated, answer's) tokens, where the latter is told

    def add(self, line: Line) -> None:
        self.num_requests += 1
        self.num_failed += line.get("state") == "failed"
        if "task" in line.get("labels", {}):
            self.num_by_task[line["labels"]["task"]] += 1
        self.num_recomputes += line.get("num_recomputes") or 0
        if line["score"] is not None:
            self._scores.append(line["score"])
            for label, value in line.get("labels", {}).items():
                self._groups.setdefault(label, {}).setdefault(value, []).append(line["score"])
        if self._serving is not None:
            kept = {name: line.get(name) for name in _KEPT + _COUNTED}
            self._of_state.setdefault(line["state"], []).append(kept)
        if "prefix_hit_tokens" in line:
            names = ("num_prompt_tokens", *_OF_PREFIX_CACHE)
            self._with_prefix_cache.append({name: line[name] for name in names})
        if "answer_tokens" in line:
            self._lengths.append((line["num_output_tokens"], line["answer_tokens"]))

    def to_json(self) -> dict[str, Any]:
        """The summary's `scores`, `serving`, `prefix_cache` and `past_answer`."""
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
            **({"past_answer": _past_answer(self._lengths)} if self._lengths else {}),
        }

    def histograms(self) -> dict[str, Any]:
        """The latencies' histograms in microseconds, by name."""
        return {f"{name}_us": histogram(Counter(us)) for name, us in self._durations().items()}

    def _served(self) -> list[Line]:
        return self._of_state.get("stop", []) + self._of_state.get("length", [])

    def _durations(self) -> dict[str, list[int]]:
        """Whole microseconds of the served requests, by name; {} where no requests arrived over time."""
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


def histogram(counts: Counter[Any]) -> dict[str, list[Any]]:
    values = sorted(counts)
    return {"values": values, "counts": [counts[value] for value in values]}


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


def _past_answer(lengths: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Decode step i feeds generated token i; the last token is never fed."""
    steps = [range(num_output - 1) for num_output, _ in lengths]
    past = [range(answer, num_output - 1) for num_output, answer in lengths]
    return {
        "requests": sum(map(bool, past)),
        "decode_steps": sum(map(len, steps)),
        "past_steps": sum(map(len, past)),
    }


def _score(scores: Sequence[float]) -> dict[str, Any]:
    """An exact mean, rounded once, so that the order of the lines does not matter."""
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
    """Counts per bucket of 2^n seconds, the smallest n that needs `_MAX_BUCKETS` or fewer."""
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
