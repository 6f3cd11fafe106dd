"""Resumes a run that was killed, interrupted or out of disk: what of it stays, what is cut.

A request is *done* when requests.jsonl says how it ended and all its records are there. Everything
else in the files belongs to requests that are served again: it is cut first, so that no (request,
step, layer) occurs twice. Knows no engine; `Tracer` cuts, once nothing can refuse the resume any more.

    resumed = prepare_resume(folder)                   # locks the run, changes nothing
    with Tracer(config, run, resumed=resumed) as tracer:       # checks, cuts, goes on
        for request in requests:                       # all of them, in the order of the first start
            (tracer.skip_request if request.request_id in resumed.done else serve)(request)

A resume that is killed can be resumed: the manifest names the seam before anything is cut, each
file is replaced whole, and a cut does not change which requests are done. Below level full the
records hold no positions; their distributions go on from the last summary.json. A request is done
there only if that counts it, and the share of all others is taken off (`unfinished.py`), so that no
step counts twice; only the summary of a version that did not keep those shares apart counts them so.

A resumed run's prefix cache is empty: nothing of the KV outlives the process, and computing the done
prompts again would cost what they cost at first. The summary says how often (`prefix_cache_cold_starts`).

Scores of a request that is served again may differ in their last digits, for it shares its forwards
with other requests than before. A matrix product sums a row in another order when there are other
rows, or none, beside it (torch on a CPU, fp32: 2e-6 between a row alone and the same row among two),
and the indexer rounds what comes of it to fp8, where a neighbouring value is up to an eighth away.
Measured on the tiny model in fp32: all 28 `scores_stats` of a request differed between alone and beside
another, by at most 8e-4 of their value, and no selection did; none differed in the same company, nor in
fp64 in any. `tests/test_resume_scores.py` holds this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from dsatrace.errors import UserError
from dsatrace.files import LineFile
from dsatrace.schema import REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE, locked_file
from dsatrace.trace.config import TraceConfig, is_sampled
from dsatrace.trace.reader import REQUEST_ID, RunReader
from dsatrace.trace.summarize import is_offloaded, summarize_run
from dsatrace.trace.summary import Summary
from dsatrace.trace.unfinished import ENDED, Shares, without_unfinished

if TYPE_CHECKING:
    from dsatrace.trace.parquet.parts import StepParts

_TIMES = ("admitted_s", "first_token_s", "finish_s")
_CHUNK_BYTES = 1 << 20
_MAY_DIFFER = (
    *("tool_version", "state", "error", "started_utc", "argv", "resumed_at_forward", "files"),
    *("trace.queue_steps", "selection.sparse_active"),
)
_REMEDIES = {
    "model_config": "give the same --config",
    "cache_layout": "give the same --config",
    "tokenizer": "give the same --tokenizer",
    "chat": "give the same --chat-template",
    "data_source": "give the same data",
    "device": "resume it on the same kind of device",
    "world_size": "start as many ranks as then",
    "seed": "give the same --seed",
    "prefix_source": "leave --prefix-caching as it was",
    "tiers": "give the same tiers",
    "answer_end": "give the same --min-new-tokens and --ignore-eos",
    "trace.format": "give the same --trace-format",
    "trace.level": "give the same --trace-level",
    "trace.block_size_tokens": "give the same --kv-block-size",
    "trace.prefix_key_id": "set DSATRACE_PREFIX_KEY as it was then, or resume as the same user",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Resumed:
    """An incomplete run, locked until this is closed or the process ends.

    `next_forward_idx` is for the next forward, `elapsed_s` the latest known time of the run's clock,
    from which arrivals and latencies go on. `summary` counts the records that stay; the cost of
    tracing is counted anew.
    """

    folder: Path
    manifest: Mapping[str, Any]
    prompt_tokens: Mapping[str, int]  # of each request that is done
    next_forward_idx: int
    elapsed_s: float
    summary: Summary
    steps: LineFile | StepParts
    requests: LineFile

    @functools.cached_property
    def done(self) -> frozenset[str]:
        """The requests that are not served again."""
        return frozenset(self.prompt_tokens)

    def continued(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The new manifest with this run's start, and with one more seam."""
        seams = [*self.manifest.get("resumed_at_forward", ()), self.next_forward_idx]
        return {**manifest, "started_utc": self.manifest["started_utc"], "resumed_at_forward": seams}

    def cut(self) -> None:
        """Drops the lines of requests that are not done; a file without any is not touched."""
        if isinstance(self.steps, LineFile):
            _cut(self.steps, self.done)
        else:
            self.steps.cut(self.done)
        _cut(self.requests, self.done)

    def close(self) -> None:
        """Releases the run's files and its lock."""
        self.requests.close()
        self.steps.close()


def prepare_resume(folder: Path) -> Resumed:
    """Locks an incomplete run and reads what stays of it; raises `UserError` for any other folder.

    Reads the steps twice, in bounded memory except for request ids.
    """
    run = RunReader(folder)
    _require_resumable(run)
    with _naming_the_file(), contextlib.ExitStack() as on_failure:  # what fails to close is named, too
        locked = LineFile.reopen(folder / locked_file(run.manifest))
        on_failure.callback(locked.close)
        try:
            locked.lock()
        except BlockingIOError as error:
            raise _is_running(folder) from error
        run = RunReader(folder)  # the run may have ended between the two looks
        _require_resumable(run, locked=True)
        steps: LineFile | StepParts
        if run.is_parquet:
            from dsatrace.trace.parquet.parts import StepParts

            requests, steps = locked, StepParts(folder, run.manifest["trace"]["keep_order"])
            on_failure.callback(steps.close)
        else:
            steps, requests = locked, LineFile.reopen(folder / REQUESTS_FILE)
            on_failure.callback(requests.close)
        found = _Found(run)
        resumed = Resumed(
            folder=folder,
            manifest=run.manifest,
            prompt_tokens={name: ended.num_prompt_tokens for name, ended in found.done.items()},
            next_forward_idx=found.next_forward_idx,
            elapsed_s=found.elapsed_s,
            summary=_summary(folder, found),
            steps=steps,
            requests=requests,
        )
        on_failure.pop_all()
        return resumed


def _require_resumable(run: RunReader, locked: bool = False) -> None:
    """`locked`: by this process, so a manifest in state running is that of a killed run."""
    was_recorded_so = run.is_parquet == (_format(run.manifest) == "parquet")
    if not was_recorded_so or (run.is_parquet and "source_files" in run.manifest):
        what = "Parquet" if run.is_parquet else "JSON lines"
        raise UserError(f"{run.folder}: an export to {what}; resume the run that it was made from")
    door = (run.manifest.get("selection") or {}).get("door", "serve")
    if door != "serve":
        raise UserError(f"{run.folder}: a run of door {door}; only the engine's are resumed, start it anew")
    state = run.manifest["state"] if locked else run.state
    if state == "complete":
        raise UserError(f"{run.folder}: the run is complete, there is nothing to resume")
    if state == "running" and not locked:
        raise _is_running(run.folder)


def _format(manifest: Mapping[str, Any]) -> str:
    name: str = manifest.get("trace", {}).get("format", "jsonl")
    return name


def _is_running(folder: Path) -> UserError:
    return UserError(f"{folder}: is still being written; wait for that process to end, or stop it")


class _Ended(NamedTuple):
    """What is kept of a line of requests.jsonl."""

    num_prompt_tokens: int
    num_output_tokens: int


class _Found:
    """What the files of a run hold: which requests are done, and how far the run's counters had come."""

    def __init__(self, run: RunReader) -> None:
        trace = run.manifest["trace"]
        self.may_lose = trace["queue_policy"] == "drop" or trace["on_error"] == "continue"
        self.done: dict[str, _Ended] = {}  # by request id
        self.elapsed_s = 0.0
        self.next_forward_idx = max(run.manifest.get("resumed_at_forward", ()), default=0)
        self.counts_once = True  # steps that are served again, in distributions that records do not hold
        self._num_records = Counter[str]()
        self._read_requests(run)
        ended = list(self.done)
        self._read_steps(run)
        missing = {name: self._num_missing(run, name) for name in self.done}
        if not self.may_lose:
            # A power cut may have lost records of a request whose line it left.
            self.done = {name: ended for name, ended in self.done.items() if not missing[name]}
        if run.manifest["trace"]["level"] != "full":
            self._keep_counted(ended, _num_counted(run))
        self.most_missing = max((missing[name] for name in self.done), default=0)

    def _keep_counted(self, ended: Sequence[str], num_counted: int | None) -> None:
        """Leaves the first requests that ended, which the last summary counts. All are left where it does
        not say how many, or where a power cut took some of them."""
        counted = ended[:num_counted]
        self.counts_once = num_counted == len(counted) and all(name in self.done for name in counted)
        if self.counts_once:
            self.done = {name: self.done[name] for name in counted}

    def _read_requests(self, run: RunReader) -> None:
        for raw, line in run.lines(REQUESTS_FILE):
            self.elapsed_s = max(self.elapsed_s, *(line.get(name) or 0.0 for name in _TIMES))
            if line["state"] in ENDED and raw.endswith(b"\n"):
                self.done[line["request_id"]] = _Ended(line["num_prompt_tokens"], line["num_output_tokens"])

    def _read_steps(self, run: RunReader) -> None:
        forward_idx, busy_us = None, 0.0
        for is_whole, record in _step_records(run):
            self._num_records[record["request_id"]] += is_whole
            if record["forward_idx"] != forward_idx:
                forward_idx = record["forward_idx"]
                busy_us += record["step_wall_us"]
                self.next_forward_idx = max(self.next_forward_idx, forward_idx + 1)
        # Forwards run one after the other, so the clock shows at least the sum of their times.
        self.elapsed_s = max(self.elapsed_s, busy_us / 1e6)

    def _num_missing(self, run: RunReader, request_id: str) -> int:
        """Sampled steps of an ended request that lack a record."""
        trace, num_output_tokens = run.manifest["trace"], self.done[request_id].num_output_tokens
        num_sampled = _num_sampled(num_output_tokens - 1, trace["sample_rate"], run.manifest["seed"])
        num_steps = num_sampled + (trace["prefill"] == "last" and num_output_tokens > 0)
        num_layers: int = run.manifest["model_config"].get("n_layers", 1)
        return num_steps - self._num_records[request_id] // num_layers


def _step_records(run: RunReader) -> Iterator[tuple[bool, Mapping[str, Any]]]:
    """Whether it is whole, and what `_Found` asks of it."""
    if run.is_parquet:
        return ((True, record) for record in run.steps(("request_id", "forward_idx", "step_wall_us")))
    return ((line.endswith(b"\n"), record) for line, record in run.lines(STEPS_FILE))


def _num_counted(run: RunReader) -> int | None:
    """Requests that ended and that the last summary counts; None where it does not keep the shares of
    the others apart, or does not exist."""
    if not (run.folder / SUMMARY_FILE).exists():
        return None
    unfinished = run.summary().get("unfinished")
    return None if unfinished is None else int(unfinished["ended_requests"])


@functools.lru_cache(1 << 16)
def _num_sampled(num_steps: int, rate: float, seed: int) -> int:
    if rate <= 0 or rate >= 1:
        return max(num_steps, 0) if rate >= 1 else 0
    return sum(is_sampled(i, rate, seed) for i in range(num_steps))


class _Kept(RunReader):
    """The run as it will be after the cut."""

    def __init__(self, folder: Path, found: _Found) -> None:
        super().__init__(folder)
        self._done = found.done
        self._counts_once = found.counts_once

    def lines(self, name: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
        return (pair for pair in super().lines(name) if pair[1]["request_id"] in self._done)

    def steps(self, fields: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        wanted = None if fields is None else {*fields, "request_id"}
        return (record for record in super().steps(wanted) if record["request_id"] in self._done)

    def numbers(self, fields: Sequence[str]) -> None:
        return None

    def summary(self) -> dict[str, Any]:
        stored = super().summary()
        hot = stored["prefix_hot_blocks"]
        if "unfinished" in stored and self._counts_once:
            stored = without_unfinished(stored, self.manifest["model_config"]["index_topk"])
        else:
            stored.pop("unfinished", None)
        return stored | {"prefix_hot_blocks": {name: hot[name] for name in hot if name in self._done}}


def _summary(folder: Path, found: _Found) -> Summary:
    """Summary of what stays, with the dropped steps that may be missing there."""
    run = _Kept(folder, found)
    if not (folder / SUMMARY_FILE).exists() and next(run.steps(), None) is None:
        # Killed before the first step: there is nothing that only a summary could tell.
        selections, serving = run.manifest["selections"], run.manifest.get("serving")
        sizes = TraceConfig.compared_block_sizes
        goes_on = "answer_end" in run.manifest
        summary = Summary(sizes, selections, serving, offloaded=is_offloaded(run), goes_on=goes_on)
        if run.manifest["trace"]["level"] != "full":
            summary.shares = Shares(sizes)
        for line in run.requests():
            summary.finish_request(line)
        return summary
    summary = summarize_run(run)
    summary.dropped_steps = max(summary.dropped_steps, found.most_missing) if found.may_lose else 0
    summary.sections["tiers"] = None  # it counted records that are cut; the next part counts its own
    return summary


def _cut(lines: LineFile, done: Collection[str]) -> None:
    """Drops torn lines and those of requests that are not done; writes nothing if there are none."""
    first_cut, last_kept = None, 0  # bytes before the first line that goes, and up to the last that stays
    end = 0
    with lines.path.open("rb") as file:
        for line in file:
            end += len(line)
            if _stays(line, done):
                last_kept = end
            elif first_cut is None:
                first_cut = end - len(line)
    if first_cut is None:
        return
    if last_kept <= first_cut:
        lines.truncate(first_cut)
    else:
        lines.replace(_kept_bytes(lines.path, done, first_cut))


def _kept_bytes(path: Path, done: Collection[str], first_cut: int) -> Iterator[bytes]:
    """What stays of the file, about a MiB at a time; all of it stays before `first_cut`."""
    with path.open("rb") as file:
        while rest := first_cut - file.tell():
            yield file.read(min(rest, _CHUNK_BYTES))
        kept = (line for line in file if _stays(line, done))
        while chunk := b"".join(_take(kept, _CHUNK_BYTES)):
            yield chunk


def _take(lines: Iterator[bytes], num_bytes: int) -> Iterator[bytes]:
    """The next lines, until they reach `num_bytes`."""
    taken = 0
    while taken < num_bytes and (line := next(lines, None)) is not None:
        taken += len(line)
        yield line


def _stays(line: bytes, done: Collection[str]) -> bool:
    found = REQUEST_ID.search(line)
    return found is not None and line.endswith(b"\n") and orjson.loads(found[1]) in done


@contextlib.contextmanager
def _naming_the_file() -> Iterator[None]:
    """Turns the `OSError` of a file that cannot be opened or locked into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: cannot resume: {error.strerror}") from error


def check_resumable(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises `UserError` naming the first field that says that the manifests are of two runs.

    What shapes a record must be the same, and so must what a step's time depends on (device, ranks,
    tiers), since the summary pools times. A field that only one of the manifests has is not compared,
    unless its absence says something.
    """
    none = {"tiers": None, "answer_end": None}
    formats = [("trace.format", _format(old), _format(new))] if _format(old) != _format(new) else []
    for path, was, now in (*_differences({**none, **old}, {**none, **new}), *formats):
        remedy = next((said for name, said in _REMEDIES.items() if path.startswith(name)), "give what it was")
        raise UserError(f"cannot resume: {path} was {was!r} and is {now!r} now; {remedy}, or start a new run")


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of fields that both have and that must not differ."""
    for name in [name for name in old if name in new]:
        path, was, now = prefix + name, old[name], new[name]
        if path in _MAY_DIFFER:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, f"{path}.")
        elif was != now:
            yield path, was, now
