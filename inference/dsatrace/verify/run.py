"""Checks a run's records against themselves, with the plain implementation.

Re-derives every derived field of every record (`check_record.py`), the order and completeness of
the records (`order.py`) and the totals of summary.json (`plain_summary.py`), in one pass and bounded
memory. Standard library only; shares nothing with the writer but `schema.py`. What comes from the
model or a clock (scores, times, prefix hashes) is checked for what it must be like, and all of it
against the digests that the manifest of a run that ended holds (`digests.py`).

    print(verify(Path("outputs/mine")).text())       # raises Mismatch naming the first bad record
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.schema import (
    MANIFEST_FILE,
    RUN_STATES,
    STEPS_FILE,
    STEPS_PARQUET_FILE,
    SUMMARY_FIELDS,
    SUMMARY_FILE,
    problems,
)
from dsatrace.verify.check_tiers import check_tier_totals
from dsatrace.verify.digests import Digests
from dsatrace.verify.facts import check_facts
from dsatrace.verify.files import PlainRun
from dsatrace.verify.mismatch import Mismatch, compare, located, require
from dsatrace.verify.order import RunOrder
from dsatrace.verify.plain_summary import PlainSummary, described
from dsatrace.verify.replay_layout import check_layout
from dsatrace.verify.requests import PlainRequests, read_requests
from dsatrace.verify.rules import Rules, require_schema
from dsatrace.verify.selections import Selections
from dsatrace.verify.steps import StepChecks
from dsatrace.verify.workload import Scores, check_workload

_ADDED_LATER = ("needle_recall", "scores", "serving", "prefix_cache", "tiers", "workload")
"""Fields of the summary that older runs lack."""
_BLOCK_SIZES = (16, 32, 64)
"""Block sizes compared where there is no summary.json to name them."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was checked; `notes` say what could not be, `faults` what is wrong with the run, not its files."""

    state: str
    level: str
    num_records: int
    num_requests: int
    is_sealed: bool  # the manifest has the digests of the files, and they are right
    notes: tuple[str, ...]
    faults: tuple[str, ...] = ()
    is_for_replay: bool = False  # only the layout and the digests were checked

    def text(self) -> str:
        """One line, and one per note."""
        if self.is_for_replay:
            line = (
                f"verified: {self.num_records} records, {self.num_requests} requests, laid out for replay: "
                "whole requests per file, by layer, then step; files unchanged since"
            )
            return "\n".join((line, *(f"not checked: {note}" for note in self.notes)))
        what = {
            "full": "every derived field re-derived from the positions",
            "blocks": "fields re-derived from the block ids, the others held within what is possible",
            "stats": "sums re-derived, the other fields held within what is possible",
        }[self.level]
        line = (
            f"verified: {self.num_records} records, {self.num_requests} requests ({self.state}, level "
            f"{self.level}): {what}; order and completeness; totals of {SUMMARY_FILE}"
        )
        if self.is_sealed:
            line += "; files unchanged since the run ended"
        return "\n".join((line, *(f"not checked: {note}" for note in self.notes)))


def verify(
    folder: Path, on_bytes: Callable[[int], object] | None = None, jobs: int = 1, plain: bool = False
) -> Verification:
    """Checks a run, or the readable part of an incomplete one; `on_bytes` gets the bytes read.

    `jobs` processes share the work. `plain` checks every record with the plain implementation, as is done
    too where numpy is not installed. Raises `Mismatch` naming the first bad record, and `UserError` for a
    folder that is no run.
    """
    run = PlainRun(folder)
    try:
        return _verify(run, on_bytes, jobs, plain)
    except Mismatch as mismatch:
        if run.parquet_steps is not None:
            mismatch.where = mismatch.where.replace(f"{STEPS_FILE} line", f"{STEPS_PARQUET_FILE} record")
        raise
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot read it: {error.strerror or error}") from error


def _verify(run: PlainRun, on_bytes: Callable[[int], object] | None, jobs: int, plain: bool) -> Verification:
    with located(MANIFEST_FILE):
        rules = Rules.of(run.manifest)
        check_facts(run.manifest)
        digests = Digests(run)
    state = run.state
    if run.manifest.get("layout") == "replay":
        with located(MANIFEST_FILE):
            num_records, num_requests = check_layout(run)
        digests.check()
        notes = ["what the records say: verify the run that they were made from"]
        return Verification(
            state, rules.level, num_records, num_requests, True, tuple(notes), is_for_replay=True
        )
    with located(SUMMARY_FILE):
        summary = _summary(run, state)
        scores = Scores.of(summary)
    lines = PlainRequests(run.manifest.get("serving"))
    requests = read_requests(run, lines, rules, scores)
    dropped_steps = summary["dropped_steps"] if summary else 0
    # A run that is not complete may have lost more steps than its last summary says.
    order = RunOrder(rules, requests, None if rules.may_lose and state != "complete" else dropped_steps)
    sizes = [row["block_size_tokens"] for row in summary["blocks_touched"]] if summary else _BLOCK_SIZES
    said = summary.get("tiers") if summary else None
    steps = StepChecks(run, rules, requests, order, sizes, said["since_forward"] if said else 0)
    if plain or not rules.selections.is_plain or not _has_numpy():
        steps.check_plainly(on_bytes)
    else:
        steps.check_in_chunks(jobs, on_bytes)
    totals = steps.totals
    order.close(whole=state == "complete")
    with located(SUMMARY_FILE):
        notes = _check_totals(run, summary, totals, lines, order)
        if summary is not None and state == "complete":
            check_workload(summary.get("workload"), lines.num_by_task, lines.num_requests)
        if summary is not None:
            whole = state == "complete" and not dropped_steps
            note = check_tier_totals(said, rules, steps.moved, lines, whole)
            notes += [note] if note else []
    if rules.tiers is not None and totals.num_records:
        notes.append("which tier held a token: the engine's word, of which the accounts must add up")
    with located(MANIFEST_FILE):
        _check_evidence(rules.selections, totals.sparse_active, state)
    faults = _faults(run.manifest, state, rules, totals.num_records, lines, dropped_steps)
    digests.check()  # last: what was derived names the record and the field
    if digests.note:
        notes.append(digests.note)
    return Verification(
        state=state,
        level=rules.level,
        num_records=totals.num_records,
        num_requests=len(requests),
        is_sealed=digests.note is None,
        notes=tuple(notes),
        faults=tuple(faults),
    )


def _check_evidence(selections: Selections, sparse_active: int, state: str) -> None:
    """The manifest's count of what shows that sparse attention was active; a run under way has none."""
    stored = selections.sparse_active
    if stored is None or state != "complete":
        return
    require(selections.is_located, "selection.sparse_active", stored, "and ids do not tell")
    compare(stored, sparse_active, "selection.sparse_active")


def _faults(
    manifest: dict[str, Any],
    state: str,
    rules: Rules,
    num_records: int,
    requests: PlainRequests,
    dropped_steps: int,
) -> list[str]:
    """Why a run whose files are sound is not: an error ended it, or it has none of its records."""
    if state == "complete" and "failed_requests" in manifest:
        with located(MANIFEST_FILE):
            compare(manifest["failed_requests"], requests.num_failed, "failed_requests")
    faults = [f"an error ended the run: {manifest['error']}"] if manifest["error"] else []
    # A complete run lacks no record of a request that was served: each of them may have had no such step.
    is_whole = state == "complete" and requests.num_requests and not (requests.num_failed or dropped_steps)
    records_steps = rules.has_model and (rules.sample_rate > 0 or rules.prefill)
    if records_steps and not num_records and not is_whole and state != "running":
        faults.append(f"it should have records and has none ({requests.num_requests} requests, {state})")
    return faults


def _has_numpy() -> bool:
    return all(importlib.util.find_spec(name) for name in ("numpy", "orjson"))


def _summary(run: PlainRun, state: str) -> dict[str, Any] | None:
    """summary.json, valid and in the run's state; None if an incomplete run has none."""
    summary = run.summary()
    if summary is None:
        require(state != "complete", "file", None, "missing, and the manifest says complete")
        return None
    require_schema(problems(summary, "full", SUMMARY_FIELDS))
    _check_shapes(summary)
    # A killed run's last summary says running, unless only the manifest was left to write.
    allowed: tuple[str, ...] = ("complete",) if state == "complete" else ("running", "incomplete")
    if run.manifest["state"] == "running":
        allowed = RUN_STATES
    require(summary["state"] in allowed, "state", summary["state"], f"the manifest says {state}")
    compare(summary["selections"], run.manifest["selections"], "selections")
    serves = run.manifest.get("serving") is not None
    served = summary.get("serving") is not None
    require(serves == served, "serving", summary.get("serving"), "the manifest says otherwise")
    dropped_steps = summary["dropped_steps"]
    require(dropped_steps >= 0, "dropped_steps", dropped_steps, "below 0")
    lossless = state == "complete" and not Rules.of(run.manifest).may_lose
    require(not (lossless and dropped_steps), "dropped_steps", dropped_steps, "but the queue drops none")
    return summary


def _check_shapes(summary: dict[str, Any]) -> None:
    """Shapes that the schema leaves open and the checks below rely on."""
    for i, row in enumerate(summary["blocks_touched"]):
        size = row.get("block_size_tokens")
        is_new = size not in [other.get("block_size_tokens") for other in summary["blocks_touched"][:i]]
        is_size = type(size) is int and size >= 1 and is_new
        require(is_size, f"blocks_touched[{i}].block_size_tokens", size, "no size, or one that stands above")
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
    """Compares the summary with the sum of the records; returns what could not be compared."""
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
    if "past_answer" in summary and "needle_recall_past" not in summary:
        totals.pool_recalls()
    derived = totals.to_json(
        requests,
        state=summary["state"],
        selections=summary["selections"],
        dropped_steps=summary["dropped_steps"],
    )
    if run.state != "complete":
        del derived["dropped_steps"]
    for name in ("tracing_cost", "workload", "tiers"):  # measured, or supplied by the run
        del derived[name]
    for name in _ADDED_LATER:
        if name not in summary and derived.get(name) is None:
            derived.pop(name, None)
    _check_cost(summary, order.num_forwards_in_last_part)
    # What unfinished requests added is taken off at a resume where it was kept apart.
    was_resumed = bool(run.manifest.get("resumed_at_forward")) and "unfinished" not in summary
    stored_only = _check_own_histograms(summary, derived, totals, was_resumed)
    if stored_only and was_resumed:
        del derived["step_overlap"], derived["layer_overlap"]
    compare(summary, derived, summed=True)
    says = "needle_recall_past" in summary
    require(says <= ("past_answer" in summary), "needle_recall_past", says, "without past_answer")
    for name in ("scores", "serving", "prefix_cache", "past_answer"):  # no further key may be there either
        require(summary.get(name) == derived.get(name), name, summary.get(name), "not what the requests say")
    if stored_only:
        notes.append(f"at level {totals.level} the records do not hold: {', '.join(stored_only)}")
    if stored_only and was_resumed:
        notes.append("those count steps twice that were served again after a resume")
    return notes


def _check_cost(summary: dict[str, Any], num_forwards: int) -> None:
    """The cost of tracing since the last resume is measured, but its parts must add up."""
    cost = summary["tracing_cost"]
    if cost is None:
        return
    without, sync, both = (cost[f"{name}_us_mean"] for name in ("without_sync", "sync", "with_sync"))
    parts = [cost["handover_us_mean"], cost["blocked_us_mean"]]
    if cost["traced_steps"]:
        compare({"mean": without}, {"mean": sum(parts)}, "tracing_cost.without_sync_us", summed=True)
        compare({"mean": both}, {"mean": without + sync}, "tracing_cost.with_sync_us", summed=True)
    if cost["traced_steps"] < num_forwards:
        compare(cost["traced_steps"], num_forwards, "tracing_cost.traced_steps")


def _check_own_histograms(
    summary: dict[str, Any], derived: dict[str, Any], totals: PlainSummary, was_resumed: bool
) -> list[str]:
    """Below level full a distribution that the records do not hold must agree with its own histogram.

    The histogram's size is known too, except for a resumed run, whose histograms count records that
    were cut. Returns the names of those distributions.
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
        if not was_resumed:
            compare(counts.total(), total, f"histograms.{name}.counts")
    return [*missing, *(("overlap shares",) if totals.level != "full" else ())]


def _histogram_names(summary: dict[str, Any]) -> list[str]:
    sizes = [row["block_size_tokens"] for row in summary["blocks_touched"]]
    named = ("unique_blocks", "tokens_per_touched_block", "offsets", "prefix_intersection_ratio", "step_us")
    durations = [f"{name[:-3]}_us" for name in summary.get("serving") or {} if name.endswith("_ms")]
    return [*named, *(f"unique_blocks_at_{size}" for size in sizes), *durations]
