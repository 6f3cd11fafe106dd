"""Proves a run's records from the records themselves, with the plain implementation.

Every derived field of every record (`record.py`), the order and completeness of
the records (`order.py`), and the totals of summary.json (`plain/summary.py`), in
one pass and bounded memory. Standard library only; shares `schema.py` with the writer
and nothing else. What comes from the model or a clock (scores, times, the prefix hashes)
is held against what it must be like; only its neighbours can say more.

    print(verify(Path("outputs/mine")).text())       # raises Mismatch naming the first bad record
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.schema import (
    MANIFEST_FILE,
    REQUEST_FIELDS,
    REQUESTS_FILE,
    STEPS_FILE,
    STEPS_PARQUET_FILE,
    SUMMARY_FIELDS,
    SUMMARY_FILE,
    problems,
)
from dsatrace.trace.plain.files import PlainRun
from dsatrace.trace.plain.summary import PlainSummary, described
from dsatrace.trace.verify.mismatch import Mismatch, compare, differs, require
from dsatrace.trace.verify.order import RequestLine, RunOrder
from dsatrace.trace.verify.record import check_record
from dsatrace.trace.verify.rules import Rules, require_schema

_REQUEST_STATES = ("stop", "length", "aborted", "unfinished")
_COST_FIELDS = next(field for field in SUMMARY_FIELDS if field.name == "tracing_cost").children
_BLOCK_SIZES = (16, 32, 64)
"""Compared where no summary.json says which sizes the run compared."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found right, and in `notes` what could not be looked at."""

    state: str
    level: str
    num_records: int
    num_requests: int
    notes: tuple[str, ...]

    def text(self) -> str:
        """One line, and one more for each note."""
        what = {
            "full": "every derived field re-derived from the positions",
            "blocks": "fields re-derived from the block ids, the others held within what is possible",
            "stats": "sums re-derived, the other fields held within what is possible",
        }[self.level]
        line = (
            f"verified: {self.num_records} records, {self.num_requests} requests ({self.state}, level "
            f"{self.level}): {what}; order and completeness; totals of {SUMMARY_FILE}"
        )
        return "\n".join((line, *(f"not checked: {note}" for note in self.notes)))


def verify(folder: Path, on_bytes: Callable[[int], object] | None = None) -> Verification:
    """Checks the run, or an incomplete run's readable prefix; `on_bytes` hears of progress.

    Raises `Mismatch` naming the first bad record, and `UserError` for a folder that is no run.
    """
    run = PlainRun(folder)
    if run.size(STEPS_PARQUET_FILE) and not run.size(STEPS_FILE):
        raise UserError(f"{folder}: holds Parquet; verify what `dsatrace export --to jsonl` makes of it")
    rules = _named(MANIFEST_FILE, lambda: Rules.of(run.manifest))
    state = run.state
    requests = _requests(run)
    summary = _named(SUMMARY_FILE, lambda: _summary(run, state))
    dropped_steps = summary["dropped_steps"] if summary else 0
    # A run that goes on or was killed may have lost more steps than its last summary says.
    order = RunOrder(rules, requests, None if rules.may_lose and state != "complete" else dropped_steps)
    sizes = [row["block_size_tokens"] for row in summary["blocks_touched"]] if summary else _BLOCK_SIZES
    totals = PlainSummary(top_k=rules.top_k, block_sizes=sizes, level=rules.level)
    for line, record in run.lines(STEPS_FILE, on_bytes):
        try:
            check_record(record, rules)
        except Mismatch as mismatch:
            order.check_row()  # an earlier record of the same step may be the first bad one
            raise mismatch.at(STEPS_FILE, line, record) from None
        ended = order.add(line, record)
        totals.add(record)
        if ended is not None:
            totals.end_request(ended)
    order.close(whole=state == "complete")
    notes = _named(SUMMARY_FILE, lambda: _check_totals(run, summary, totals, len(requests)))
    return Verification(state, rules.level, totals.num_records, len(requests), tuple(notes))


def _requests(run: PlainRun) -> dict[str, RequestLine]:
    """What requests.jsonl says, by request; its lines are checked on the way."""
    found: dict[str, RequestLine] = {}
    for line, record in run.lines(REQUESTS_FILE):
        try:
            require_schema(problems(record, "full", REQUEST_FIELDS))
            request_id, state = record["request_id"], record["state"]
            require(request_id not in found, "request_id", request_id, "stands twice")
            require(state in _REQUEST_STATES, "state", state, f"not one of {', '.join(_REQUEST_STATES)}")
            require(record["num_prompt_tokens"] >= 1, "num_prompt_tokens", 0, "an empty prompt")
            at_least = int(state in ("stop", "length"))
            num_output = record["num_output_tokens"]
            require(num_output >= at_least, "num_output_tokens", num_output, f"state {state}")
            times = [record[name] for name in ("arrival_s", "first_token_s", "finish_s")]
            known = [time for time in times if time is not None]
            require(known == sorted(known), "finish_s", times, "arrival, first token and finish out of order")
        except Mismatch as mismatch:
            raise mismatch.at(REQUESTS_FILE, line, {"request_id": record.get("request_id")}) from None
        found[request_id] = RequestLine(line, record["num_prompt_tokens"], num_output, state)
    return found


def _summary(run: PlainRun, state: str) -> dict[str, Any] | None:
    """summary.json, whole and in the run's state; None when an incomplete run has none."""
    summary = run.summary()
    if summary is None:
        require(state != "complete", "file", None, "missing, and the manifest says complete")
        return None
    require_schema(problems(summary, "full", SUMMARY_FIELDS))
    _check_shapes(summary)
    # A killed run's last summary still says running.
    allowed = ("complete",) if state == "complete" else ("running", "incomplete")
    require(summary["state"] in allowed, "state", summary["state"], f"the manifest says {state}")
    compare(summary["selections"], run.manifest["selections"], "selections")
    dropped_steps = summary["dropped_steps"]
    require(dropped_steps >= 0, "dropped_steps", dropped_steps, "below 0")
    lossless = state == "complete" and not Rules.of(run.manifest).may_lose
    require(not (lossless and dropped_steps), "dropped_steps", dropped_steps, "but the queue drops none")
    return summary


def _check_shapes(summary: dict[str, Any]) -> None:
    """What the schema's table leaves open and the checks below rely on."""
    for i, row in enumerate(summary["blocks_touched"]):
        size = row.get("block_size_tokens")
        require(type(size) is int and size >= 1, f"blocks_touched[{i}].block_size_tokens", size, "no size")
    for name, stored in summary["histograms"].items():
        require(_is_histogram(stored), f"histograms.{name}", stored, "not values with a count each")
    if summary["tracing_cost"] is not None:
        require_schema(problems(summary["tracing_cost"], "full", _COST_FIELDS, "tracing_cost."))


def _is_histogram(stored: object) -> bool:
    if not isinstance(stored, dict):
        return False
    values, counts = stored.get("values"), stored.get("counts")
    if not isinstance(values, list) or not isinstance(counts, list) or len(values) != len(counts):
        return False
    return {int, float}.issuperset(map(type, values)) and all(type(n) is int and n >= 1 for n in counts)


def _check_totals(
    run: PlainRun, summary: dict[str, Any] | None, totals: PlainSummary, num_requests: int
) -> list[str]:
    """Compares the summary with what the records add up to; returns what could not be compared."""
    notes = [f"{name} {torn}" for name, torn in run.torn_lines.items()]
    if run.torn_lines and run.state == "complete":
        name, torn = next(iter(run.torn_lines.items()))
        raise Mismatch("JSON", torn).at(name)
    if summary is None:
        return [*notes, f"totals: there is no {SUMMARY_FILE} yet"]
    counts = summary["counts"]
    if run.state != "complete" and (
        counts["records"] != totals.num_records or counts["requests"] != num_requests
    ):
        return [*notes, f"totals: {SUMMARY_FILE} counts {counts['records']} of {totals.num_records} records"]
    derived = totals.to_json(
        num_requests=num_requests,
        state=summary["state"],
        selections=summary["selections"],
        dropped_steps=summary["dropped_steps"],
    )
    if run.state != "complete":
        del derived["dropped_steps"]
    del derived["tracing_cost"]  # a measurement
    _check_cost(summary, derived)
    stored_only = _check_own_histograms(summary, derived, totals)
    compare(summary, derived, summed=True)
    if stored_only:
        notes.append(f"at level {totals.level} the records do not hold: {', '.join(stored_only)}")
    return notes


def _check_cost(summary: dict[str, Any], derived: dict[str, Any]) -> None:
    """What tracing took is measured; that it adds up is not."""
    cost = summary["tracing_cost"]
    if cost is None:
        return
    without, sync, both = (cost[f"{name}_us_mean"] for name in ("without_sync", "sync", "with_sync"))
    parts = [cost["handover_us_mean"], cost["blocked_us_mean"]]
    if cost["traced_steps"]:
        compare({"mean": without}, {"mean": sum(parts)}, "tracing_cost.without_sync_us", summed=True)
        compare({"mean": both}, {"mean": without + sync}, "tracing_cost.with_sync_us", summed=True)
    num_forwards = derived["counts"]["steps"] + derived["counts"]["prefills"]
    if cost["traced_steps"] < num_forwards:
        raise differs("tracing_cost.traced_steps", cost["traced_steps"], num_forwards)


def _check_own_histograms(
    summary: dict[str, Any], derived: dict[str, Any], totals: PlainSummary
) -> list[str]:
    """Below level full, what the records do not hold must at least agree with its own histogram.

    Returns the names of those distributions.
    """
    histograms, known = summary["histograms"], derived["histograms"]
    if extra := histograms.keys() - _histogram_names(summary):
        raise Mismatch(f"histograms.{min(extra)}", "belongs to no distribution")
    missing = [name for name in _histogram_names(summary) if name not in known]
    for name in missing:
        if name not in histograms:
            raise Mismatch(f"histograms.{name}", "missing")
        counts: Counter[int] = Counter(
            dict(zip(histograms[name]["values"], histograms[name]["counts"], strict=True))
        )
        if name.startswith("unique_blocks_at_"):
            size = int(name.rpartition("_")[2])
            row = next(row for row in summary["blocks_touched"] if row["block_size_tokens"] == size)
            expected = {key: described(counts)[key] for key in ("mean", "p50", "p95")}
            compare(row, expected, f"blocks_touched.{size}")
            total = derived["counts"]["sparse_records"]
        else:
            compare(summary[name], described(counts), name)
            total = totals.num_tokens if name == "offsets" else derived["kv_fetch"]["hbm"]["hit_blocks"]
        if counts.total() != total:
            raise differs(f"histograms.{name}.counts", counts.total(), total)
    return [*missing, *(("overlap shares",) if totals.level != "full" else ())]


def _histogram_names(summary: dict[str, Any]) -> list[str]:
    sizes = [row["block_size_tokens"] for row in summary["blocks_touched"]]
    named = ("unique_blocks", "tokens_per_touched_block", "offsets", "prefix_intersection_ratio", "step_us")
    return [*named, *(f"unique_blocks_at_{size}" for size in sizes)]


def _named(file_name: str, check: Callable[[], Any]) -> Any:
    """What `check` returns; a `Mismatch` that names no place yet gets this file."""
    try:
        return check()
    except Mismatch as mismatch:
        raise mismatch.at(file_name) from None
