"""Recomputes summary.json from runs' files, and merges runs: histograms by addition.

At level full everything comes from the records and requests. Below it the records tell
the counts, blocks, bytes and times; what they dropped is added from the run's last
summary.json. Streams: keeps histograms and live requests. Writes nothing.

    record = summarize_runs([Path("outputs/a"), Path("outputs/b")])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.processes import call_in_processes, in_order
from dsatrace.schema import SUMMARY_FILE
from dsatrace.trace.config import TraceConfig, is_sampled
from dsatrace.trace.kind import SelectionKind, inactive
from dsatrace.trace.manifest import prefix_cache_cold_starts, selection_kind, shared_layers
from dsatrace.trace.reader import RunReader
from dsatrace.trace.record_summary import (
    BLOCK_FIELDS,
    FULL_FIELDS,
    NUMBER_FIELDS,
    TIER_FIELDS,
    RecordSummary,
    RunShape,
    columns_of,
)
from dsatrace.trace.summed_runs import SummedRuns, require_alike

CHUNK_RECORDS = 4096
Record = Mapping[str, Any]
OnRecords = Callable[[int], object]
OnNote = Callable[[str], object]


def summarize_runs(
    folders: Sequence[Path],
    on_records: OnRecords = lambda count: None,
    on_note: OnNote = lambda note: None,
    jobs: int = 1,
) -> dict[str, Any]:
    """The record of summary.json of all the runs together, without a cost of tracing.

    `on_records` gets the number of records read since its last call, `on_note` what a reader of the
    numbers should know. Each of `jobs` processes takes a run at a time. Runs that cannot be added up
    raise `UserError`.
    """
    return sum_runs(folders, distinct_names(folders), on_records, on_note, jobs).to_json()


def sum_runs(
    folders: Sequence[Path],
    names: Sequence[str],  # what requests of each run are called by, where that tells runs apart
    on_records: OnRecords = lambda count: None,
    on_note: OnNote = lambda note: None,
    jobs: int = 1,
) -> SummedRuns:
    """The same before it is told; so that sums of other runs can be added."""
    runs = [RunReader(folder) for folder in folders]
    kinds = [_kind(run) for run in runs]
    for run, kind in zip(runs, kinds, strict=True):
        require_alike(str(run.folder), kind, str(runs[0].folder), kinds[0])
    merged: RecordSummary | None = None
    for name, summary in zip(names, _summaries(runs, on_records, on_note, jobs), strict=True):
        if name:
            summary.name_requests(name)
        if merged is None:
            merged = summary
        else:
            merged.merge(summary)
    assert merged is not None
    return SummedRuns(merged, all(run.state == "complete" for run in runs), kinds[0])


def _summaries(
    runs: Sequence[RunReader], on_records: OnRecords, on_note: OnNote, jobs: int
) -> Iterator[RecordSummary]:
    if min(jobs, len(runs)) == 1:
        for run in runs:
            yield summarize_run(run, on_records, on_note)
        return
    folders = [run.folder for run in runs]
    for summary, notes in in_order(call_in_processes(_summarize_there, folders, jobs)):
        on_records(summary.counts["records"])
        for note in notes:
            on_note(note)
        yield summary


def _summarize_there(folder: Path) -> tuple[RecordSummary, list[str]]:
    """In another process: the summary, and the notes of making it."""
    notes: list[str] = []
    return summarize_run(RunReader(folder), on_note=notes.append), notes


def summarize_run(
    run: RunReader, on_records: OnRecords = lambda count: None, on_note: OnNote = lambda note: None
) -> RecordSummary:
    """One run's summary, from its files."""
    run.require_order_of_steps("summarize")
    level = run.manifest["trace"]["level"]
    stored = run.summary() if (run.folder / SUMMARY_FILE).exists() else None
    if stored is None and level != "full":
        raise UserError(
            f"{run.folder}: records of level {level} hold no positions, and there is no {SUMMARY_FILE} "
            "to take the rest from; only runs of level full can do without"
        )
    sizes = TraceConfig.compared_block_sizes
    if stored is not None:
        sizes = tuple(row["block_size_tokens"] for row in stored["blocks_touched"])
    summary = RecordSummary(sizes, run.manifest["selections"], _shape(run), run.manifest.get("serving"))
    summary.dropped_steps = stored["dropped_steps"] if stored else 0
    summary.prefix_cache_cold_starts = prefix_cache_cold_starts(run.manifest)
    for section in summary.sections:
        summary.sections[section] = stored.get(section) if stored else None
    if level == "full":
        _add_forwards(run, summary, on_records)
    else:
        assert stored is not None
        _add_thin_records(run, summary, level, on_records)
        summary.take_stored(stored, level)
        if stored["counts"]["records"] != summary.counts["records"]:
            on_note(
                f"{run.folder}: offsets, tokens per block and overlaps are those of its last {SUMMARY_FILE}, "
                f"{stored['counts']['records']} of {summary.counts['records']} records"
            )
    for name, torn in run.torn_lines.items():
        on_note(f"{run.folder / name}: {torn}")
    if warning := inactive(summary.counts["sparse_records"], summary.known_sparse_active):
        on_note(f"{run.folder}: {warning}")
    return summary


def _add_forwards(run: RunReader, summary: RecordSummary, on_records: OnRecords) -> None:
    finished = _FinishedRequests(run)
    num_sets = summary.num_sets
    records = _steps(run, FULL_FIELDS)
    for _, group in itertools.groupby(records, key=lambda record: record["forward_idx"]):
        forward = list(group)
        on_records(len(forward))
        if run.state != "complete":  # a killed run's last step may lack layers
            del forward[len(forward) - len(forward) % num_sets :]
        if forward:
            _require_sets(run, forward, summary.sets)
            summary.add_forward(forward)
            for request in finished.after(forward):
                summary.finish_request(request)
    for request in finished.rest():
        summary.finish_request(request)


def _require_sets(
    run: RunReader, forward: Sequence[Mapping[str, Any]], sets: list[tuple[int, int | None]]
) -> None:
    """Raises `UserError` unless each request of the forward has a record of every set, in order."""
    found = [(record["layer_id"], record.get("kv_head")) for record in forward]
    if found != sets * (len(found) // len(sets)):
        raise UserError(
            f"{run.step_paths[0]}: forward {forward[0]['forward_idx']}: its records are not whole; "
            f"see `dsatrace verify {run.folder}`"
        )


def _add_thin_records(run: RunReader, summary: RecordSummary, level: str, on_records: OnRecords) -> None:
    for columns in _columns(run, level):
        summary.add_columns(columns)
        on_records(len(columns["forward_idx"]))
    for request in run.requests():
        summary.finish_request(request)


def _columns(run: RunReader, level: str) -> Iterator[Mapping[str, Any]]:
    """The records below level full, chunk by chunk, as columns."""
    of_tiers = TIER_FIELDS if is_offloaded(run) else ()
    goes_on = "answer_end" in run.manifest  # whose record it is tells whether it lies past the answer
    fields = (*(BLOCK_FIELDS if level == "blocks" else NUMBER_FIELDS), *of_tiers)
    if level == "stats" and not goes_on and (numbers := run.numbers(fields)) is not None:
        yield from numbers
        return
    if level == "stats" and goes_on:
        fields += ("request_id",)
    records = _steps(run, fields)
    while chunk := list(itertools.islice(records, CHUNK_RECORDS)):
        yield columns_of(chunk, fields)


class _FinishedRequests:
    """Says which requests have no more records to come, in the order of requests.jsonl.

    A request ends as soon as its last step has been seen, so that nothing is kept of it until the
    end of the run.
    """

    def __init__(self, run: RunReader) -> None:
        trace = run.manifest["trace"]
        self._rate, self._seed = trace["sample_rate"], run.manifest["seed"]
        self._requests = run.requests()
        self._head = next(self._requests, None)
        self._last_step: dict[str, int] = {}
        self._decoding: set[str] = set()

    def after(self, forward: Sequence[Record]) -> Iterator[Record]:
        """Requests that end with this forward or before it."""
        self._last_step.update((record["request_id"], record["step_idx"]) for record in forward)
        if forward[0]["phase"] != "prefill":
            self._decoding = {record["request_id"] for record in forward}
        while self._head is not None and self._has_ended(self._head):
            yield self._pop()

    def rest(self) -> Iterator[Record]:
        """The other requests, after the last forward."""
        while self._head is not None:
            yield self._pop()

    def _pop(self) -> Record:
        request = self._head
        assert request is not None
        self._last_step.pop(request["request_id"], None)
        self._head = next(self._requests, None)
        return request

    def _has_ended(self, request: Record) -> bool:
        request_id = request["request_id"]
        if request["state"] == "rejected":
            return True
        seen = self._last_step.get(request_id)
        if seen is None or request["state"] == "unfinished":
            return False
        # The first token comes from prefill, the last one is never fed back.
        last = request["num_output_tokens"] - 2
        while last > seen and not is_sampled(last, self._rate, self._seed):
            last -= 1
        # The step during which a request was aborted or failed may be recorded too, if there was one.
        at_work = request["state"] in ("aborted", "failed") and request_id in self._decoding
        return seen > last or (seen == last and not at_work)


def _steps(run: RunReader, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Only these columns of a Parquet run; a JSON line is parsed whole in any case."""
    return run.steps(fields if run.is_parquet else None)


def _shape(run: RunReader) -> RunShape:
    manifest = run.manifest
    block_size = manifest["trace"]["block_size_tokens"]
    is_other = is_offloaded(run), "answer_end" in manifest
    if manifest["selections"] == "none":  # no model, no selection, no record
        return RunShape(block_size, SelectionKind(()), 0, *is_other)
    layout = next(x for x in manifest["cache_layouts"] if x["name"] == manifest["cache_layout"])
    kind = selection_kind(manifest)
    if kind is None:
        raise UserError(f"{run.folder}: the manifest's model_config has no index_topk, the k of its top-k")
    index_bytes = layout["index_bytes_per_token"]
    return RunShape(block_size, kind, index_bytes, *is_other)


def is_offloaded(run: RunReader) -> bool:
    """Whether the run's latents lay in tiers."""
    return run.manifest.get("tiers") is not None


def _tiers(run: RunReader) -> str:
    tiers = run.manifest.get("tiers")
    if tiers is None:
        return "none"
    pools = [f"{name} {tiers[name]['store']}" for name in ("local_pool", "remote_pool") if tiers[name]]
    hbm = f"{tiers['hbm']['blocks']} blocks in HBM ({tiers['policy']}, prefetch {tiers['prefetch']})"
    return ", ".join([f"{tiers['granularity']}s of {tiers['unit_tokens']} tokens", hbm, *pools])


def _kind(run: RunReader) -> dict[str, Any]:
    """What runs that add up must share."""
    shape, serving = _shape(run), run.manifest.get("serving")
    kind = shape.kind
    return {
        "blocks": shape.block_size,
        "top-k": shape.top_k,
        "shared layers": shared_layers([layer.source_layer for layer in kind.layers]),
        "layers": ", ".join(f"{layer.heads} x {layer.top_k}" for layer in kind.layers),
        "unit": f"{kind.unit} of {kind.unit_tokens} tokens",
        "ids": f"{kind.id_kind}, of {kind.num_ids or 'all'}",
        "door": " without ".join([kind.door, *sorted(kind.missing)]),
        "selections": run.manifest["selections"],
        "serving": f"{serving['mode']}, {serving['clock']} clock" if serving else "none",
        "prefix source": run.manifest.get("prefix_source", "analysis"),
        "tiers": _tiers(run),
    }


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their whole paths where two are called the same; of a run alone an empty one."""
    if len(folders) == 1:
        return [""]
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
