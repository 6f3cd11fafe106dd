"""The tracer as the engine sees it: it says which steps to record, and owns the run's folder.

Writes the folder from the manifest to the last line. Knows requests and captures; no tensor and no
scheduler.

    with Tracer(config, RunInfo(model_config=..., layouts=(layout,), device="cpu")) as tracer:
        prefix = tracer.add_request(request)
        if tracer.wants(step_number):
            tracer.put(capture, sync_us=35.0)
        tracer.finish_request(request, RequestFacts(num_output_tokens=64, state="stop", finish_s=1.9))

Another door than the engine says in `RunInfo.kind` what its ids are, and puts captures that fit it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from dsatrace.errors import UserError
from dsatrace.files import HeldFolder, write_json
from dsatrace.kv.prefix import PrefixCacheAnalyzer, RequestPrefix, key_id, load_prefix_secret
from dsatrace.kv.tiers.account import OffloadedTiers, Tiers, default_tiers
from dsatrace.schema import MANIFEST_FILE, SUMMARY_FIELDS, problems
from dsatrace.text import plain
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig, check_run_folder, is_sampled
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.manifest import RunInfo, manifest, prefix_cache_cold_starts
from dsatrace.trace.records import RecordDeriver
from dsatrace.trace.request_facts import RequestFacts, TracedRequest, request_line
from dsatrace.trace.resume import Resumed, check_resumable
from dsatrace.trace.summary import Summary, TracingCost
from dsatrace.trace.unfinished import Shares
from dsatrace.trace.writer import Sink, TraceWriter, cannot_write, open_sinks

_TIERS_FIELD = tuple(field for field in SUMMARY_FIELDS if field.name == "tiers")


class Tracer:
    """Records a run into `config.out`, which must be new or empty.

    As a context manager it ends the run `complete`, or `incomplete` when an exception leaves the
    block. `sinks` default to the files of the run's folder, `secret` to the user's own. Where `run`
    has tiers, every capture must hold `fetches`. A `resumed` run goes on in its own folder, without
    what must be served again; `UserError` if this run is not the same one.
    """

    def __init__(
        self,
        config: TraceConfig,
        run: RunInfo,
        *,
        sinks: Sequence[Sink] | None = None,
        secret: bytes | None = None,
        resumed: Resumed | None = None,
    ) -> None:
        if run.selections == "none":  # no model, so there is nothing to record of a step
            config = dataclasses.replace(config, sample_rate=0.0, prefill="off")
        if run.kind is not None:
            _check_config(config, run.kind)
        elif config.prefill == "all":
            raise UserError("--trace-prefill all: the engine records a prompt's last position; use last")
        self.config = config
        self._run = run
        self._resumed = resumed
        self._started = time.time()
        self._unfinished: dict[str, TracedRequest] = {}
        self._prefixes: dict[str, RequestPrefix] = {}
        self._needles: dict[str, tuple[int, ...]] = {}  # of the unfinished requests that have any
        self._ids: set[str] = set(resumed.done) if resumed else set()
        # Only step records tell what is shared; with a prefix cache they tell what was found there.
        self._knows_prefixes = run.kind is None or run.kind.holds("prefix")
        self._compares_prompts = (
            config.records_steps and run.prefix_source == "analysis" and self._knows_prefixes
        )
        self._num_failed = 0
        self._closed = False
        self.tell_tiers: Callable[[], Mapping[str, Any]] | None = None
        """Asked at the run's end for the record of `describe_tiers`; the owner of the tiers sets it."""
        secret = secret or load_prefix_secret()
        self._key_id = key_id(secret)
        self._analyzer = PrefixCacheAnalyzer(config.block_size, config.prefix_key_tokens, secret=secret)
        # Compiles the kernels, if this machine has not yet: before the run, not in its first step.
        deriver = RecordDeriver(config, run.layouts[0], tiers_of(run), True, run.shared_layers, run.kind)
        sizes, has_tiers = config.compared_block_sizes, run.tiers is not None
        summary = Summary(
            sizes,
            run.selections,
            run.serving,
            offloaded=has_tiers,
            kind=run.kind,
            goes_on=run.answer_end is not None,
        )
        if config.level != "full":
            summary.shares = Shares(sizes)
        if resumed is not None:
            summary = resumed.summary
            summary.prefix_cache_cold_starts = prefix_cache_cold_starts(self._manifest("running"))
        summary.cost = cost = TracingCost()
        self._summary = summary
        sinks = self._open_folder(summary, sinks)
        policies = config.queue_policy, config.on_error
        self._writer = TraceWriter(deriver, sinks, config.queue_steps, cost, *policies, summary.sections)

    def wants(self, step_number: int) -> bool:
        """Whether decode step `step_number` (0-based, counted per request) is recorded."""
        return is_sampled(step_number, self.config.sample_rate, self.config.seed)

    @property
    def accepts(self) -> bool:
        """See `TraceWriter.accepts`."""
        return self._writer.accepts

    @property
    def has_failed(self) -> bool:
        """Whether the writer failed, so that the trace lacks what came after."""
        return self._writer.error is not None

    def drop_step(self) -> None:
        """Counts a step that should have been recorded and was not."""
        self._writer.drop()

    def add_request(self, request: TracedRequest) -> RequestPrefix:
        """Announces a request and returns how much of its prompt begins like an earlier one.

        Compares nothing, and returns 0 blocks, where no step is recorded or where a prefix cache
        decides what is shared (see `prefixes`).
        """
        request_id = request.request_id
        if request_id in self._ids:
            raise ValueError(f"request {request_id} was added already; ids are unique in a run")
        self._ids.add(request_id)
        self._unfinished[request_id] = request
        if request.needle_positions:
            self._needles[request_id] = tuple(sorted(set(request.needle_positions)))
        if not self._compares_prompts:
            return RequestPrefix(0, "")
        self._prefixes[request_id] = prefix = self._analyzer.add(request.prompt_token_ids)
        return prefix

    def skip_request(self, request: TracedRequest) -> None:
        """Announces, in its place among the others, a request that a resumed run is done with.

        Later requests share its prompt as in the first start. Writes nothing.
        """
        request_id, num_tokens = request.request_id, len(request.prompt_token_ids)
        known = self._resumed.prompt_tokens.get(request_id) if self._resumed else None
        if known is None:
            raise ValueError(f"request {request_id}: no earlier part of this run served it; add it")
        if num_tokens != known:
            raise UserError(
                f"request {request_id}: its prompt has {num_tokens} tokens, {known} when {self.config.out} "
                "began; resume with the data and the flags of the first start"
            )
        if self._compares_prompts:
            self._analyzer.add(request.prompt_token_ids)

    def prefixes(
        self, request_ids: Sequence[str], hit_tokens: Sequence[int] = ()
    ) -> tuple[RequestPrefix, ...]:
        """The shared prefixes of running requests, for a capture of them.

        Those that `add_request` found; or, where the run has a prefix cache, the blocks (of the trace's
        block size) that lie whole in the request's `hit_tokens` when it is first captured; () where the
        run's door knows of none.
        """
        if not self._knows_prefixes:
            return ()
        if self._run.prefix_source == "cache":
            for request_id, num_tokens in zip(request_ids, hit_tokens, strict=True):
                if request_id not in self._prefixes:
                    key = self._analyzer.key(self._unfinished[request_id].prompt_token_ids)
                    num_blocks = num_tokens // self.config.block_size
                    self._prefixes[request_id] = RequestPrefix(num_blocks, key)
        return tuple(self._prefixes[request_id] for request_id in request_ids)

    def needles(self, request_ids: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The positions of running requests' answers, for a capture of them; () where none is known."""
        if not self._needles:
            return ()
        return tuple(self._needles.get(request_id, ()) for request_id in request_ids)

    def put(self, capture: StepCapture, handover_us: float = 0.0, sync_us: float = 0.0) -> None:
        """Hands one traced step to the writer.

        `handover_us`: what the caller spent on copies, `sync_us`: on waiting for the device. Raises
        the writer's error since the last call, or drops the step (see `TraceWriter`).
        """
        self._writer.put(capture, handover_us, sync_us)

    def finish_request(self, request: TracedRequest, facts: RequestFacts) -> None:
        """Writes the request's line, as the facts are now; raises as `put` does."""
        request_id = request.request_id
        self._num_failed += facts.state == "failed"
        self._write_line(self._unfinished.pop(request_id), facts)
        self._prefixes.pop(request_id, None)
        self._needles.pop(request_id, None)
        self._writer.check()

    def describe_workload(self, record: Mapping[str, Any]) -> None:
        """Sets the summary's `workload`: its name, its counts, the rows it left out.

        JSON-ready and without prompt text; may be called at any time before the run ends.
        """
        self._writer.describe("workload", record)

    def describe_tiers(self, record: Mapping[str, Any]) -> None:
        """Sets the summary's `tiers`: a record of `schema.SUMMARY_FIELDS`, JSON-ready.

        It counts what was put before this call; the last call before the run ends stands.
        """
        if self._run.tiers is None:
            raise ValueError("the run has no tiers to describe: RunInfo.tiers")
        if found := problems({"tiers": record}, fields=_TIERS_FIELD):
            raise ValueError(f"what is said of the tiers is not of the schema: {found[0]}")
        self._writer.describe("tiers", record)

    def close(self, state: str = "complete") -> None:
        """Ends the run; requests that did not finish get a line that says so. Reports what failed."""
        if self._closed:
            return
        failure = self._end(state)
        self._writer.close()
        if failure is not None and self.config.on_error == "stop":
            raise failure
        _warn(failure)

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._closed:
            # The user sees the error under way; the writer's own, if any, goes to the manifest.
            is_interrupt = isinstance(error, KeyboardInterrupt)
            refused = self._end("incomplete", None if is_interrupt else f"ended by {type(error).__name__}")
            if self._writer.error is None or error is not self._writer.failure:
                _warn(refused)  # else the error under way says that the disk is full, and once is enough

    def _end(self, state: str, reason: str | None = None) -> UserError | None:
        """Writes what waits and gives the manifest its last state; returns why the manifest could not be
        written."""
        self._closed = True
        for request in self._unfinished.values():
            self._write_line(request, RequestFacts())
        if self.tell_tiers is not None:
            self.describe_tiers(self.tell_tiers())
        self._writer.stop(state)
        error = self._writer.error
        if error is not None:
            state, reason = "incomplete", f"the trace writer: {type(error).__name__}: {error}"
        try:
            self._folder.check()
            # After a failure nobody knows what the disk kept.
            self._write_manifest(state, reason, None if error is not None else self._writer.files)
        except OSError as refused:  # readers see an incomplete run: its lock is gone
            return cannot_write(refused)
        except UserError as moved:
            return None if error is not None else moved
        finally:
            self._folder.close()
        return None

    def _write_line(self, request: TracedRequest, facts: RequestFacts) -> None:
        has_prefix_cache, has_tiers = self._run.prefix_source == "cache", self._run.tiers is not None
        line = request_line(request, facts, has_prefix_cache=has_prefix_cache, has_tiers=has_tiers)
        self._writer.finish_request(line)

    def _open_folder(self, summary: Summary, sinks: Sequence[Sink] | None) -> Sequence[Sink]:
        """Makes the run's folder and files, or goes on with them; the manifest first."""
        folder, resumed = self.config.out, self._resumed
        if resumed is None:
            check_run_folder(folder)
        elif folder.resolve() != resumed.folder.resolve():
            raise ValueError(f"{folder}: a resumed run goes on in its own folder, {resumed.folder}")
        else:
            check_resumable(resumed.manifest, self._manifest("running"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = HeldFolder(folder)
            self._write_manifest("running")
            if resumed is not None:
                resumed.cut()
            return open_sinks(folder, self.config, summary, resumed) if sinks is None else sinks
        except OSError as error:
            remedy = "name another --trace-out"
            if resumed is not None:
                remedy = "nothing is lost, make room and resume it again"
            raise UserError(f"{folder}: cannot write the trace there: {error.strerror}; {remedy}") from error

    def _write_manifest(
        self, state: str, error: str | None = None, files: Mapping[str, Any] | None = None
    ) -> None:
        write_json(self.config.out / MANIFEST_FILE, self._manifest(state, error, files))

    def _manifest(
        self, state: str, error: str | None = None, files: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        # Of a run whose summary nobody kept there is no count.
        has_ended = state != "running" and self._summary.counts["records"] > 0
        record = manifest(
            self._run,
            self.config,
            state,
            key_id=self._key_id,
            started=self._started,
            error=error,
            failed_requests=self._num_failed,
            files=files or None,
            sparse_active=self._summary.known_sparse_active if has_ended else None,
        )
        return self._resumed.continued(record) if self._resumed else record


def _warn(failure: UserError | None) -> None:
    if failure is not None:
        print(f"warning: {plain(failure)}", file=sys.stderr)


def _check_config(config: TraceConfig, kind: SelectionKind) -> None:
    if config.level != "full":
        raise UserError(
            f"--trace-level {config.level}: selections of door {kind.door} are recorded whole; use full"
        )
    if config.needs_scores and "scores" not in kind.tells:
        flag = "--trace-store-scores" if config.store_scores else "--trace-keep-order"
        raise UserError(f"{flag}: the door {kind.door} knows no scores here; leave it out")


def tiers_of(run: RunInfo) -> Tiers:
    """How the run's records account for what they read."""
    if run.tiers is None:
        return default_tiers(run.layouts[0])
    kinds = {name: pool.latency_kind for name, pool in run.tiers.pools.items()}
    return OffloadedTiers(run.layouts[0].latent_bytes_per_token, run.tiers.granularity, kinds)
