"""Proves a run's records from the records themselves, with the plain implementation.

Every derived field of every record (`check_record.py`), the order and completeness of
the records (`order.py`), and the totals of summary.json (`plain_summary.py`), in
one pass and bounded memory. Standard library only; shares `schema.py` with the writer
and nothing else. What comes from the model or a clock (scores, times, the prefix hashes)
is held against what it must be like; only its neighbours can say more.

    print(verify(Path("outputs/mine")).text())       # raises Mismatch naming the first bad record
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsatrace.schema import (
    MANIFEST_FILE,
    REQUEST_FIELDS,
    REQUESTS_FILE,
    RUN_STATES,
    STEPS_FILE,
    STEPS_PARQUET_FILE,
    SUMMARY_FIELDS,
    SUMMARY_FILE,
    problems,
)
from dsatrace.verify.check_record import check_record
from dsatrace.verify.check_tiers import BatchTimes, TierTotals, check_tier_totals
from dsatrace.verify.files import PlainRun
from dsatrace.verify.mismatch import Mismatch, compare, differs, require, require_range
from dsatrace.verify.order import RequestLine, RunOrder, Sharing
from dsatrace.verify.plain_summary import PlainSummary, described
from dsatrace.verify.requests import PlainRequests
from dsatrace.verify.rules import Rules, require_schema

_REQUEST_STATES = ("stop", "length", "rejected", "aborted", "unfinished", "failed")
_TIMES = ("arrival_s", "admitted_s", "first_token_s", "finish_s")
_ADDED_LATER = ("needle_recall", "scores", "serving", "prefix_cache", "tiers", "workload")
"""Of the summary; absent in those written before."""
_OF_PREFIX_CACHE = ("prefix_hit_tokens", "num_prefill_tokens", "prefill_s")
"""Of a request, where the run has a prefix cache."""
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


def verify(
    folder: Path, on_bytes: Callable[[int], object] | None = None, jobs: int = 1, plain: bool = False
) -> Verification:
    """Checks the run, or an incomplete run's readable prefix; `on_bytes` hears of progress.

    `jobs` processes share the work. `plain`: with the standard library alone, every record by the plain
    implementation; so it is done, too, where numpy is not installed.

    Raises `Mismatch` naming the first bad record, and `UserError` for a folder that is no run.
    """
    run = PlainRun(folder)
    try:
        return _verify(run, on_bytes, jobs, plain)
    except Mismatch as mismatch:
        if run.parquet_steps is not None:
            mismatch.where = mismatch.where.replace(f"{STEPS_FILE} line", f"{STEPS_PARQUET_FILE} record")
        raise


def _verify(run: PlainRun, on_bytes: Callable[[int], object] | None, jobs: int, plain: bool) -> Verification:
    rules = _named(MANIFEST_FILE, lambda: Rules.of(run.manifest))
    state = run.state
    lines = PlainRequests(run.manifest.get("serving"))
    requests = _requests(run, lines, rules)
    summary = _named(SUMMARY_FILE, lambda: _summary(run, state))
    dropped_steps = summary["dropped_steps"] if summary else 0
    # A run that goes on or was killed may have lost more steps than its last summary says.
    order = RunOrder(rules, requests, None if rules.may_lose and state != "complete" else dropped_steps)
    sizes = [row["block_size_tokens"] for row in summary["blocks_touched"]] if summary else _BLOCK_SIZES
    said = summary.get("tiers") if summary else None
    since_forward = said["since_forward"] if said else 0
    steps = _Steps(run, rules, requests, order, sizes, since_forward)
    if plain or not has_numpy():
        steps.check_plainly(on_bytes)
    else:
        steps.check_in_chunks(jobs, on_bytes)
    totals, moved = steps.totals, steps.moved
    order.close(whole=state == "complete")
    notes = _named(SUMMARY_FILE, lambda: _check_totals(run, summary, totals, lines, order))
    if summary is not None:
        whole = state == "complete" and not dropped_steps
        note = _named(SUMMARY_FILE, lambda: check_tier_totals(said, rules, moved, lines, whole))
        notes += [note] if note else []
    if rules.tiers is not None and totals.num_records:
        notes.append("which tier held a token: the engine's word, of which the accounts must add up")
    return Verification(state, rules.level, totals.num_records, len(requests), tuple(notes))


def has_numpy() -> bool:
    """Whether the fast derivation can run."""
    return all(importlib.util.find_spec(name) for name in ("numpy", "orjson"))


class _Steps:
    """The records of a run: each by itself, their order, and what they add up to."""

    def __init__(
        self,
        run: PlainRun,
        rules: Rules,
        requests: Mapping[str, RequestLine],
        order: RunOrder,
        block_sizes: Sequence[int],
        since_forward: int,
    ) -> None:
        self._run, self._rules, self._requests, self._order = run, rules, requests, order
        self._needles = {name: known.needle_positions for name, known in requests.items()}
        self._block_sizes, self._since_forward = block_sizes, since_forward
        self._times, self._sharing = BatchTimes(), Sharing(rules)
        self.moved = TierTotals(rules, since_forward)
        self.totals = PlainSummary(
            top_k=rules.top_k, block_sizes=block_sizes, level=rules.level, offloaded=rules.tiers is not None
        )

    def check_plainly(
        self,
        on_bytes: Callable[[int], object] | None,
        part: tuple[int, int | None] = (0, None),
        first_line: int = 1,
    ) -> int:
        """Record by record; returns the number of the line that follows."""
        line = first_line - 1
        for line, record in self._run.steps(on_bytes, part, first_line):
            try:
                check_record(record, self._rules, self._needles)
                self._times.add(line, record)
            except Mismatch as mismatch:
                self._order.check_row()  # an earlier record of the same step may be the first bad one
                raise mismatch.at(STEPS_FILE, line, record) from None
            try:
                ended = self._order.add(line, record)  # names the place itself, which may be an earlier line
                self._sharing.add(record)
            except Mismatch as mismatch:
                raise mismatch.at(STEPS_FILE, line, record) from None
            self.totals.add(record)
            self.moved.add(record)
            if ended is not None:
                self.totals.end_request(ended)
        return line + 1

    def check_in_chunks(self, jobs: int, on_bytes: Callable[[int], object] | None) -> None:
        """Chunk by chunk, and plainly where one is not found right."""
        from dsatrace.verify.fast import ChunkChecks, FastSummary, JsonSteps, checked_chunks

        if self._run.parquet_steps is None and not self._run.size(STEPS_FILE):
            self.check_plainly(on_bytes)
            return
        steps = self._run.parquet_steps or JsonSteps(self._run.folder / STEPS_FILE)
        self.totals = FastSummary(self._rules, self._block_sizes)
        checks = ChunkChecks(steps, self._rules, self._requests, self._block_sizes, self._since_forward)
        last_rows: dict[str, tuple[int, int]] = {}  # of live requests: line and byte
        line = 1
        for chunk, found in checked_chunks(checks, jobs):
            if found is None or self._order.is_within_row:
                line = self.check_plainly(on_bytes, chunk, line)
                continue
            self.totals.merge(found.totals)
            self.moved.merge(found.moved)
            for number, place, row in found.rows:
                last_rows[row.request_id] = (line + number, place)
                ended = self._order.add_row(line + number, row)
                if ended is not None:
                    self.totals.end_request(ended)
                    del last_rows[ended]
            line += found.num_lines
            if on_bytes:
                on_bytes(steps.bytes_of(chunk))
        # The last records of the others are known only now.
        for number, place in last_rows.values():
            from_there = self._run.steps(part=(place, None), first_line=number)
            for at, record in itertools.islice(from_there, self._rules.num_layers):
                try:
                    check_record(record, self._rules, self._needles)
                except Mismatch as mismatch:
                    raise mismatch.at(STEPS_FILE, at, record) from None


def _requests(run: PlainRun, totals: PlainRequests, rules: Rules) -> dict[str, RequestLine]:
    """What requests.jsonl says, by request; its lines are checked and added up on the way."""
    found: dict[str, RequestLine] = {}
    for line, record in run.lines(REQUESTS_FILE):
        try:
            _check_request(record)
            _check_prefix_cache(record, rules)
            _check_tier_losses(record, rules)
            require(record["request_id"] not in found, "request_id", record["request_id"], "stands twice")
        except Mismatch as mismatch:
            raise mismatch.at(REQUESTS_FILE, line, {"request_id": record.get("request_id")}) from None
        found[record["request_id"]] = RequestLine(
            line,
            record["num_prompt_tokens"],
            record["num_output_tokens"],
            record["state"],
            tuple(record.get("needle_positions", ())),
            record.get("prefix_hit_tokens"),
        )
        totals.add(record)
    return found


def _check_request(record: dict[str, Any]) -> None:
    """A line of requests.jsonl by itself."""
    require_schema(problems(record, "full", REQUEST_FIELDS))
    state, num_prompt, num_output = (
        record[name] for name in ("state", "num_prompt_tokens", "num_output_tokens")
    )
    require(state in _REQUEST_STATES, "state", state, f"not one of {', '.join(_REQUEST_STATES)}")
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
    """What a request found cached, and what was left of its prompt."""
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
    require_range("prefix_hit_tokens", hit, 0, num_prompt - 1)  # the last token is computed always
    least = num_prompt - hit if answered else 0
    rule = f"{num_prompt} prompt tokens, {hit} of them cached"
    if record.get("num_preemptions", 0) == 0 and record.get("num_recomputes", 0) == 0:
        require(least <= computed <= num_prompt - hit, "num_prefill_tokens", computed, rule)


def _check_tier_losses(record: dict[str, Any], rules: Rules) -> None:
    """What a request lost with a tier; only a run with tiers has any to lose."""
    offloaded, name = rules.tiers is not None, "num_recomputes"
    rule = "the manifest has tiers" if offloaded else "the manifest has no tiers"
    require((name in record) == offloaded, name, record.get(name), rule)
    require(record.get(name, 0) >= 0, name, record.get(name), "below 0")
    if record["state"] == "failed":
        require(offloaded, "state", "failed", rule)
        require(bool(record.get("error")), "error", record.get("error"), "a request that failed says why")


def _summary(run: PlainRun, state: str) -> dict[str, Any] | None:
    """summary.json, whole and in the run's state; None when an incomplete run has none."""
    summary = run.summary()
    if summary is None:
        require(state != "complete", "file", None, "missing, and the manifest says complete")
        return None
    require_schema(problems(summary, "full", SUMMARY_FIELDS))
    _check_shapes(summary)
    # A killed run's last summary still says running, unless the manifest was all that was left to write.
    allowed: tuple[str, ...] = ("complete",) if state == "complete" else ("running", "incomplete")
    if run.manifest["state"] == "running":
        allowed = RUN_STATES
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


def _is_histogram(stored: object) -> bool:
    if not isinstance(stored, dict):
        return False
    values, counts = stored.get("values"), stored.get("counts")
    if not isinstance(values, list) or not isinstance(counts, list) or len(values) != len(counts):
        return False
    return {int, float}.issuperset(map(type, values)) and all(type(n) is int and n >= 1 for n in counts)


def _check_totals(
    run: PlainRun,
    summary: dict[str, Any] | None,
    totals: PlainSummary,
    requests: PlainRequests,
    order: RunOrder,
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
        counts["records"] != totals.num_records or counts["requests"] != requests.num_requests
    ):
        return [*notes, f"totals: {SUMMARY_FILE} counts {counts['records']} of {totals.num_records} records"]
    derived = totals.to_json(
        requests,
        state=summary["state"],
        selections=summary["selections"],
        dropped_steps=summary["dropped_steps"],
    )
    if run.state != "complete":
        del derived["dropped_steps"]
    for name in ("tracing_cost", "workload", "tiers"):  # measured; said by the run itself
        del derived[name]
    for name in _ADDED_LATER:
        if name not in summary and derived.get(name) is None:
            derived.pop(name, None)
    _check_cost(summary, order.num_forwards_in_last_part)
    was_resumed = bool(run.manifest.get("resumed_at_forward"))
    stored_only = _check_own_histograms(summary, derived, totals, was_resumed)
    if stored_only and was_resumed:
        del derived["step_overlap"], derived["layer_overlap"]
    compare(summary, derived, summed=True)
    for name in ("scores", "serving", "prefix_cache"):  # nothing more may stand there either
        require(summary.get(name) == derived.get(name), name, summary.get(name), "not what the requests say")
    if stored_only:
        notes.append(f"at level {totals.level} the records do not hold: {', '.join(stored_only)}")
    if stored_only and was_resumed:
        notes.append("those count steps twice that were served again after a resume")
    return notes


def _check_cost(summary: dict[str, Any], num_forwards: int) -> None:
    """What tracing took is measured; that it adds up is not. It is that of the run since its last resume."""
    cost = summary["tracing_cost"]
    if cost is None:
        return
    without, sync, both = (cost[f"{name}_us_mean"] for name in ("without_sync", "sync", "with_sync"))
    parts = [cost["handover_us_mean"], cost["blocked_us_mean"]]
    if cost["traced_steps"]:
        compare({"mean": without}, {"mean": sum(parts)}, "tracing_cost.without_sync_us", summed=True)
        compare({"mean": both}, {"mean": without + sync}, "tracing_cost.with_sync_us", summed=True)
    if cost["traced_steps"] < num_forwards:
        raise differs("tracing_cost.traced_steps", cost["traced_steps"], num_forwards)


def _check_own_histograms(
    summary: dict[str, Any], derived: dict[str, Any], totals: PlainSummary, was_resumed: bool
) -> list[str]:
    """Below level full, what the records do not hold must at least agree with its own histogram.

    Its size is known too, but for a resumed run's: that counts records which were cut.
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
            num_blocks = sum(fetched["hit_blocks"] for fetched in derived["kv_fetch"].values())
            total = totals.num_tokens if name == "offsets" else num_blocks
        if counts.total() != total and not was_resumed:
            raise differs(f"histograms.{name}.counts", counts.total(), total)
    return [*missing, *(("overlap shares",) if totals.level != "full" else ())]


def _histogram_names(summary: dict[str, Any]) -> list[str]:
    sizes = [row["block_size_tokens"] for row in summary["blocks_touched"]]
    named = ("unique_blocks", "tokens_per_touched_block", "offsets", "prefix_intersection_ratio", "step_us")
    durations = [f"{name[:-3]}_us" for name in summary.get("serving") or {} if name.endswith("_ms")]
    return [*named, *(f"unique_blocks_at_{size}" for size in sizes), *durations]


def _named(file_name: str, check: Callable[[], Any]) -> Any:
    """What `check` returns; a `Mismatch` that names no place yet gets this file."""
    try:
        return check()
    except Mismatch as mismatch:
        raise mismatch.at(file_name) from None
