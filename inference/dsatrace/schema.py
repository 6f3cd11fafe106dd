"""Every record a run writes, told once as tables: fields, order, types, units, meaning.

Standard library only, so that the fast path, the plain path and the docs agree on names without
sharing code. Knows no model and no numpy; opens no file. In order: names of files and tiers, `Field`,
one table per file, quantiles, lines of JSON, the check of a record, the docs.

    line = encode(record)                # compact JSON, field order = table order
    problems(decode(line), "full")       # [] when the record is as the table says
    python -m dsatrace.schema            # prints the tables of docs/records.md
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

SCHEMA_VERSION = 1

Level = Literal["full", "blocks", "stats"]
LEVELS: tuple[Level, ...] = ("full", "blocks", "stats")
LatencyKind = Literal["none", "measured", "modelled"]
"""How a tier's time was had: it has none of its own, a clock, or a model."""

TIER_NAMES = ("hbm", "local_pool", "remote_pool")
TIER_CHOICES = {
    "granularity": ("block", "row"),
    "on_error": ("recompute", "fail"),
    "index_keys": ("hbm", "offloaded"),
}
"""What the manifest's `tiers` may say in these fields."""
STEPS_FILE = "trace_steps.jsonl"
STEPS_PARQUET_FILE = "trace_steps.parquet"  # the same records as columns, in an exported run
REQUESTS_FILE = "requests.jsonl"
MANIFEST_FILE = "manifest.json"
SUMMARY_FILE = "summary.json"
RUN_STATES = ("running", "complete", "incomplete")

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a record.

    `keys` makes it an object with those keys, each holding `children`. `entry` makes it an
    object whose keys are data, and is how the docs spell the way to its `children`.
    `optional` fields may be absent: they came later, or stand only where they say something.
    """

    name: str
    type: str
    unit: str
    meaning: str
    levels: tuple[Level, ...] = LEVELS
    children: tuple[Field, ...] = ()
    keys: tuple[str, ...] = ()
    entry: str = ""
    optional: bool = False


_FULL: tuple[Level, ...] = ("full",)
_BLOCKS: tuple[Level, ...] = ("full", "blocks")

# fmt: off

# Shapes that stand in several tables.

_BLOCK_SIZE = Field("block_size_tokens", "int", "tokens", "tokens in a block")
_LATENCY_KIND = Field("latency_kind", "string", "", "measured or modelled")
_RANDOM_MEAN = Field("random_mean", "float | null", "", "the same for a random selector: k / N")
_SELECTIONS = Field("selections", "string", "", "model; random_weights or synthetic support no claim about "
                    "locality; none: no model ran")
_STATE = Field("state", "string", "", "running, complete or incomplete")

_STATISTICS = {
    "min": "smallest",
    "p50": "median, nearest rank",
    "p95": "95th percentile, nearest rank",
    "p99": "99th percentile, nearest rank",
    "max": "largest",
    "mean": "arithmetic mean",
}


def _statistics(names: str, type_: str, unit: str) -> tuple[Field, ...]:
    """One field per name; a mean is a float, whatever it is the mean of."""
    types = {"mean": "float | null"}
    return tuple(Field(name, types.get(name, type_), unit, _STATISTICS[name]) for name in names.split())


_DISTRIBUTION = _statistics("min p50 p95 max mean", "number | null", "")
_LATENCY = _statistics("p50 p95 p99 max mean", "float | null", "ms")


def _pools(children: tuple[Field, ...]) -> tuple[Field, ...]:
    """The two tiers behind HBM, alike; either may be missing."""
    names = ("local_pool", "remote_pool")
    return tuple(Field(name, "object | null", "", "null: there is none", children=children) for name in names)


# trace_steps.jsonl: one record per layer of a request's step.

_OFFLOADED = (
    Field("requested_tokens", "int", "tokens", "selected tokens that no tier above it held. This and the "
          "fields after it stand where the manifest has `tiers`", optional=True),
    Field("hit_tokens", "int", "tokens", "of those, held here when they were selected", optional=True),
    Field("missed_tokens", "int", "tokens", "the others, asked of the next tier", optional=True),
    Field("requested_blocks", "int", "blocks", "touched blocks that lay not wholly in the tiers above it",
          optional=True),
    Field("missed_blocks", "int", "blocks", "of those, the ones with a token that it missed", optional=True),
    Field("evicted_units", "int", "units", "given up by the tier to make room", optional=True),
    Field("bytes_written", "int", "bytes", "written into the tier: what was fetched into HBM, written back "
          "or promoted to a pool", optional=True),
    Field("errors", "int", "", "the store's failed batches and corrupt units", optional=True),
)

_FETCH = (
    Field("hit_blocks", "int", "blocks", "touched blocks this tier served: it is the furthest that any of "
          "their selected tokens came from"),
    Field("bytes_read", "int", "bytes", "hbm: tokens held by those blocks x latent bytes a token and layer "
          "(its hit tokens alone where rows move); a pool: the units fetched, each charged to the first "
          "request of the batch that selected it"),
    Field("read_ops", "int", "reads", "hbm: runs of adjacent block ids, or positions where rows move; a "
          "pool: its store's own, shared out over the step's records"),
    Field("latency_us", "float", "us", "time of the layer's batch of reads, for which all requests in it "
          "wait; 0 where `latency_kind` is none"),
    Field("batch_size", "int", "requests", "requests in the step; 0 for a tier that the run does not have"),
    Field("bytes_useful", "int", "bytes", "of the tier's selected tokens, latent bytes a token and layer; a "
          "pool: of `bytes_read` the record's selected tokens' own"),
    Field("latency_kind", "string", "", "none, measured or modelled"),
    *_OFFLOADED,
)

FETCH_TOTALS = ("hit_blocks", "bytes_read", "read_ops", "bytes_useful")
"""Of `kv_fetch`, what summary.json adds up."""
OFFLOADED_FETCH = tuple(field.name for field in _OFFLOADED)
"""And what else, in a run whose manifest has `tiers`."""
_FETCH_TOTALS = tuple(field for field in _FETCH if field.name in FETCH_TOTALS + OFFLOADED_FETCH)

STEP_FIELDS = (
    Field("event", "string", "", '`"dsa_topk"`'),
    Field("request_id", "string", "", "the request, as in requests.jsonl"),
    Field("layer_id", "int", "", "layer, 0-based"),
    Field("step_idx", "int", "", "the request's own decode step, 0-based; -1 for a prefill record"),
    Field("seq_len_current", "int", "tokens", "positions visible to the query, itself included"),
    Field("selected_token_pos", "int[]", "position", "absolute logical positions, ascending; with "
          "`--trace-keep-order` by score descending, then position ascending", _FULL),
    Field("unique_token_pos_count", "int", "tokens", "selected positions"),
    Field("offset_min", "int", "tokens", "smallest offset; offset = query position - selected position"),
    Field("offset_p50", "int", "tokens", "median offset, nearest rank"),
    Field("offset_max", "int", "tokens", "largest offset"),
    _BLOCK_SIZE,
    Field("selected_block_ids", "int[]", "block", "touched logical blocks (position // size), ascending",
          _BLOCKS),
    Field("unique_blocks", "int", "blocks", "touched blocks"),
    Field("tokens_per_touched_block", "object", "", "selected tokens in a touched block, over the record's "
          "blocks", children=(
        Field("mean", "float", "tokens", "selected tokens / touched blocks"),
        Field("p50", "int", "tokens", "median, nearest rank"),
        Field("p95", "int", "tokens", "95th percentile, nearest rank"),
    )),
    Field("kv_fetch", "object", "", "what each tier served", keys=TIER_NAMES, children=_FETCH),
    Field("prefix", "object", "", "the request's shared prefix and how much of the selection lies in it",
          children=(
        Field("prefix_cache_hit", "bool", "", "at least one full leading block is shared"),
        Field("prefix_cached_blocks", "int", "blocks", "full leading blocks shared: equal to an earlier "
              "request's; where `prefix_source` is cache, those that lie whole in its `prefix_hit_tokens`, "
              "whatever the cache's own block size"),
        Field("prefix_key", "string", "hex", "keyed hash of the prompt's first tokens"),
        Field("intersection_ratio", "float", "", "touched prefix blocks / touched blocks"),
        Field("intersection_blocks", "int[]", "block", "touched prefix blocks, ascending", _BLOCKS),
    )),
    Field("scores_stats", "object", "score", "over the selection; absent where `scores_topk` stands",
          optional=True, children=(
        Field("min", "float", "score", "lowest selected score"),
        Field("mean", "float", "score", "mean selected score"),
        Field("max", "float", "score", "highest selected score"),
    )),
    Field("scores_topk", "float[]", "score", "with `--trace-store-scores`: `scores_topk[i]` belongs to "
          "`selected_token_pos[i]`", _FULL, optional=True),
    Field("forward_idx", "int", "", "the run's forward pass, 0-based: the same for all records of one"),
    Field("step_wall_us", "float", "us", "wall time around the forward"),
    Field("step_synced", "bool", "", "the device was synchronised before the clock was read"),
    Field("phase", "string", "", "decode, or prefill (the prompt's last position)"),
    Field("path", "string", "", "dense while seq_len_current <= top-k, else sparse"),
    Field("kth_margin", "float | null", "score", "k-th minus (k+1)-th score; null on the dense path"),
    Field("indexer_scan", "object", "", "what the indexer read to choose", children=(
        Field("tokens", "int", "tokens", "keys scanned: every visible position; 0 where "
              "`source_layer` stands"),
        Field("bytes_read", "int", "bytes", "tokens x indexer bytes a token and layer"),
    )),
    Field("source_layer", "int", "", "the layer before it whose selection this one uses; only where it has "
          "no indexer. All that follows from a selection is as in that layer's record", optional=True),
    Field("needle", "object", "", "the answer in the prompt; only where the workload knows where it stands",
          optional=True, children=(
        Field("tokens", "int", "tokens", "prompt positions that hold the answer"),
        Field("selected", "int", "tokens", "those of them that are selected"),
    )),
)

# requests.jsonl: one record per request.

REQUEST_FIELDS = (
    Field("request_id", "string", "", "unique in the run"),
    Field("source_row", "int | null", "row", "row of the data set the prompt came from"),
    Field("num_prompt_tokens", "int", "tokens", "prompt tokens"),
    Field("num_output_tokens", "int", "tokens", "generated tokens"),
    Field("arrival_s", "float", "s", "from the run's start"),
    Field("first_token_s", "float | null", "s", "from the run's start; null when none came"),
    Field("finish_s", "float | null", "s", "from the run's start; null when it did not finish"),
    Field("state", "string", "", "how it ended: stop, length, rejected, aborted, unfinished, or failed: a "
          "tier lost its KV for good"),
    Field("score", "float | null", "", "the task's score, where the workload has one"),
    Field("admitted_s", "float | null", "s", "from the run's start: first taken up by the engine; null when "
          "it never was", optional=True),
    Field("num_preemptions", "int", "", "times it had to give its blocks back and start over", optional=True),
    Field("labels", "object", "", "the groups its score is averaged in: label -> value", optional=True),
    Field("needle_positions", "int[]", "position", "prompt positions that hold the answer, ascending; empty "
          "where they are not known", optional=True),
    Field("prefix_hit_tokens", "int | null", "tokens", "prompt tokens found in the prefix cache when its "
          "prefill first began, and not computed; null when it never began. This and the next two stand "
          "where `prefix_source` is cache", optional=True),
    Field("num_prefill_tokens", "int", "tokens", "tokens computed in its prefill, with what a preemption "
          "made it compute again", optional=True),
    Field("prefill_s", "float", "s", "time of the forwards that computed those", optional=True),
    Field("num_recomputes", "int", "", "times it was computed again because a tier lost its KV; stands where "
          "the manifest has `tiers`", optional=True),
    Field("error", "string", "", "why it was rejected or failed", optional=True),
    Field("text", "string", "", "the answer; only with `--save-text`", optional=True),
)

# manifest.json: what the run was.

_LAYOUT = (
    Field("name", "string", "", "layout"),
    Field("latent_bytes_per_token", "int", "bytes", "a token and layer: latent and rope key"),
    Field("index_bytes_per_token", "int", "bytes", "a token and layer: indexer key and scales"),
)

_POOL = (
    Field("store", "string", "", "what keeps its units, credentials redacted"),
    Field("blocks", "int | null", "blocks", "of a layer it has room for; null: no limit of its own"),
    _LATENCY_KIND,
)

_TIER_SETUP = (
    Field("granularity", "string", "", "what moves as one: block, a block of one layer, or row, one token"),
    Field("unit_tokens", "int", "tokens", "tokens in a unit"),
    Field("unit_bytes", "int", "bytes", "unit_tokens x latent bytes of the cache layout"),
    Field("policy", "string", "", "which unit HBM gives up"),
    Field("prefetch", "string", "", "what is fetched before it is selected"),
    Field("on_error", "string", "", "when a tier loses a request's KV: recompute, or fail the request"),
    Field("index_keys", "string", "", "where the indexer's keys lie: hbm or offloaded"),
    Field("hbm", "object", "", "", children=(Field("blocks", "int", "blocks", "of a layer it holds"),)),
    *_pools(_POOL),
)

LAYER_FIELDS = (
    Field("top_k", "int", "", "most ids that a record selects"),
    Field("heads", "int", "", "selections per step"),
    Field("source_layer", "int | null", "", "the layer before it whose selection it uses; null: it has an "
          "indexer"),
)
"""What the manifest says of each layer's selections."""

MANIFEST_FIELDS = (
    Field("schema_version", "int", "", "of the records; fields are only ever added"),
    Field("tool", "string", "", '`"dsatrace"`'),
    Field("tool_version", "string", "", "version of the package"),
    _STATE,
    Field("error", "string | null", "", "why the run is incomplete, where that is known"),
    Field("started_utc", "string", "", "ISO 8601"),
    Field("argv", "string[]", "", "command line, secrets redacted"),
    _SELECTIONS,
    Field("model_config", "object", "", "the model's hyperparameters"),
    Field("model_config_digest", "string", "hex", "hash of the canonical model_config"),
    Field("cache_layout", "string", "", "the layout that bytes are counted with"),
    Field("cache_layouts", "object[]", "", "bytes a token and layer of each layout", children=_LAYOUT),
    Field("tokenizer", "string | null", "", "tokenizer file or name"),
    Field("chat", "string | null", "", "how messages became prompts: deepseek_v32, a Jinja template by name "
          "and digest, or plain text; null where none were", optional=True),
    Field("data_source", "string | null", "", "embedded, file or hub revision"),
    Field("device", "string", "", "device the model ran on"),
    Field("hbm_stand_in", "string | null", "", "what stands in for HBM where there is none"),
    Field("world_size", "int", "ranks", "tensor-parallel ranks"),
    Field("seed", "int", "", "seed of the run and of step sampling"),
    Field("serving", "object | null", "", "how requests that arrived over time were served, batch size and "
          "such; null where none did", optional=True, children=(
        Field("mode", "string", "", "how the engine takes requests up"),
        Field("clock", "string", "", "real, or virtual: measured steps, skipped gaps"),
    )),
    Field("prefix_source", "string", "", "what the records' `prefix` says: analysis (equal to an earlier "
          "prompt, it could be reused) or cache (found in the engine's prefix cache, it was); absent means "
          "analysis", optional=True),
    Field("tiers", "object | null", "", "where latents lay that HBM did not hold; null or absent: everything "
          "was in HBM", optional=True, children=_TIER_SETUP),
    Field("selection", "object | null", "", "what a selection is; null where no model ran. Absent: every "
          "layer has an indexer", optional=True, children=(
        Field("unit", "string", "", "what an id stands for: token"),
        Field("unit_tokens", "int", "tokens", "tokens that an id covers"),
        Field("id_kind", "string", "", "position: ids are absolute logical positions"),
        Field("layers", "object[]", "", "a layer each", children=LAYER_FIELDS),
        Field("door", "string", "", "where the selections come from: serve, this tool's engine"),
    )),
    Field("trace", "object", "", "how the run was traced", children=(
        Field("level", "string", "", "full, blocks or stats"),
        _BLOCK_SIZE,
        Field("sample_rate", "float", "", "share of the steps that is recorded; 0: requests only"),
        Field("store_scores", "bool", "", "scores are recorded"),
        Field("keep_order", "bool", "", "positions stand in score order"),
        Field("prefill", "string", "", "off, or last: the prompt's last position is recorded"),
        Field("sync_cuda", "bool", "", "the device is synchronised once a step"),
        Field("prefix_key_tokens", "int", "tokens", "tokens hashed into prefix_key"),
        Field("prefix_key_id", "string", "hex", "names the secret of the keyed hashes"),
        Field("queue_policy", "string", "", "block: the model waits for a writer that is behind; drop: it "
              "loses the step"),
        Field("queue_steps", "int", "steps", "steps that may wait for the writer"),
        Field("on_error", "string", "", "when the trace cannot be written: stop the run, or continue "
              "untraced"),
    )),
    Field("quantile", "string", "", "definition of every quantile"),
    Field("resumed_at_forward", "int[]", "", "`forward_idx` from which each resume of the run went on; step "
          "times are those of the parts together, the tracing cost is the last part's", optional=True),
)

# summary.json: what came of it.

_OVERLAP = (
    Field("pairs", "int", "", "pairs of selections compared, for each layer"),
    Field("mean", "float | null", "", "share of the selection that the other one held too, over all layers"),
    _RANDOM_MEAN,
    Field("per_layer", "float[] | null", "", "mean of each layer; null where nothing was compared"),
)

_SCORE = (
    Field("mean", "float | null", "", "arithmetic mean"),
    Field("num_scored", "int", "requests", "requests that have a score"),
)

_SERVING = (
    Field("mode", "string", "", "how the engine took requests up"),
    Field("clock", "string", "", "of all times here: real, or virtual (measured steps, skipped gaps)"),
    Field("counts", "object", "", "what became of the requests", children=(
        Field("served", "int", "requests", "state stop or length"),
        Field("rejected", "int", "requests", "could never fit"),
        Field("aborted", "int", "requests", "dropped while waiting or running"),
        Field("unfinished", "int", "requests", "the run ended first"),
        Field("preemptions", "int", "", "times a request had to start over"),
        Field("failed", "int", "requests", "a tier lost their KV; stands where there is one", optional=True),
        Field("recomputes", "int", "", "times a request was computed again because a tier lost its KV; "
              "stands where there is one", optional=True),
    )),
    Field("latency_ms", "object", "ms", "finish - arrival, served requests", children=_LATENCY),
    Field("time_to_first_token_ms", "object", "ms", "first token - arrival, served requests",
          children=_LATENCY),
    Field("time_per_output_token_ms", "object", "ms", "(finish - first token) / (output tokens - 1), served "
          "requests with two or more", children=_LATENCY),
    Field("queue_ms", "object", "ms", "admitted - arrival, served requests", children=_LATENCY),
    Field("span_s", "float | null", "s", "first arrival to last finish, served requests"),
    Field("requests_per_s", "float | null", "1/s", "served requests over the span"),
    Field("output_tokens_per_s", "float | null", "tokens/s", "their output tokens over the span"),
    Field("requests_over_time", "object[]", "", "at most 64 equal buckets of 2^n seconds, from the run's "
          "start", children=(
        Field("start_s", "int", "s", "from the run's start"),
        Field("arrived", "int", "requests", "arrivals"),
        Field("finished", "int", "requests", "served requests that finished"),
    )),
)

_PREFIX_CACHE = (
    Field("prompt_tokens", "int", "tokens", "of requests whose prefill began"),
    Field("hit_tokens", "int", "tokens", "of those, found cached when it first began"),
    Field("hit_rate", "float | null", "", "hit_tokens / prompt_tokens"),
    Field("computed_tokens", "int", "tokens", "computed in prefill, again after preemptions"),
    Field("prefill_s", "float", "s", "time of the prefill forwards, counted in whole us a request"),
    Field("saved_s", "float | null", "s", "hit_tokens x prefill_s / computed_tokens"),
    Field("saved_kind", "string", "", "modelled: nobody timed what was not computed"),
)

_MOVED = (
    Field("in_records", "int", "bytes", "that the records hold"),
    Field("elsewhere", "int", "bytes", "steps and rows without a record, prefill, refills, prefetch"),
    Field("store", "int", "bytes", "as the store itself counts: its units x unit_bytes"),
)

_POOL_TOTALS = (
    Field("bytes_read", "object", "bytes", "by who says so", children=_MOVED),
    Field("bytes_written", "object", "bytes", "by who says so", children=_MOVED),
    Field("requested_units", "int", "units", "asked of the store"),
    Field("hit_units", "int", "units", "of those, given back"),
    Field("missed_units", "int", "units", "the others"),
    Field("corrupt_units", "int", "units", "came back, and were not what had been stored"),
    Field("read_batches", "int", "", "calls that read"),
    Field("read_ops", "int", "reads", "operations of those, after coalescing"),
    Field("read_us", "float", "us", "time of those calls"),
    Field("write_batches", "int", "", "calls that wrote"),
    Field("write_us", "float", "us", "time of those calls"),
    Field("stored_units", "int", "units", "taken by the store"),
    Field("evicted_units", "int", "units", "given up by it"),
    Field("errors", "int", "", "failed batches"),
    Field("timeouts", "int", "", "of those, for time"),
    Field("bytes_moved", "int", "bytes", "read and written, padding included"),
    _LATENCY_KIND,
)

_INDEX_TOTALS = (
    Field("bytes_read", "int", "bytes", "keys and scales given back"),
    Field("bytes_written", "int", "bytes", "keys and scales taken"),
    Field("read_batches", "int", "", "fetches: one an indexer and forward"),
    Field("read_us", "float", "us", "they took"),
    Field("write_batches", "int", "", "puts: one an indexer and forward"),
    Field("write_us", "float", "us", "they took"),
    Field("errors", "int", "", "batches that failed and units that came back corrupt"),
)

_TIER_TOTALS = (
    Field("since_forward", "int", "", "`forward_idx` counted from: where the run began or was last resumed"),
    *_pools(_POOL_TOTALS),
    Field("prefetch", "object | null", "", "null where nothing is fetched ahead", children=(
        Field("units", "int", "units", "fetched ahead"),
        Field("used_units", "int", "units", "of those, what the layer then selected"),
        Field("missed_units", "int", "units", "selected, and not in HBM in time"),
        Field("recall", "float | null", "", "used_units / (used_units + missed_units)"),
        Field("precision", "float | null", "", "used_units / units"),
    )),
    Field("index_keys", "object | null", "", "the indexer's keys, which have stores of their own; null where "
          "HBM holds them all", children=(
        *_pools(_INDEX_TOTALS),
    )),
    Field("lost_units", "int", "units", "that no tier gave back"),
    Field("num_recomputes", "int", "", "times a request was computed again for that"),
    Field("failed_requests", "int", "requests", "ended for that"),
)

SUMMARY_FIELDS = (
    Field("schema_version", "int", "", "of the records"),
    _STATE,
    _SELECTIONS,
    Field("counts", "object", "", "what the run recorded", children=(
        Field("steps", "int", "steps", "traced decode forwards"),
        Field("prefills", "int", "steps", "traced prefill forwards"),
        Field("records", "int", "records", "lines of trace_steps.jsonl"),
        Field("sparse_records", "int", "records", "those on the sparse path"),
        Field("requests", "int", "requests", "lines of requests.jsonl"),
    )),
    Field("dropped_steps", "int", "steps", "sampled forwards that were not recorded: dropped from a full "
          "queue, or lost to an error"),
    Field("unique_blocks", "object", "blocks", "touched blocks a record", children=_DISTRIBUTION),
    Field("tokens_per_touched_block", "object", "tokens", "selected tokens a touched block, every block "
          "pooled", children=_DISTRIBUTION),
    Field("offsets", "object", "tokens", "every selected token pooled", children=_DISTRIBUTION),
    Field("prefix_intersection_ratio", "object", "", "a record", children=_DISTRIBUTION),
    Field("prefix_hot_blocks", "object", "", "request id -> its most touched prefix blocks, at most 20; "
          "requests with a prefix hit only", entry="<request>[]", children=(
        Field("block_id", "int", "block", "logical block"),
        Field("touches", "int", "records", "records that touched it"),
    )),
    Field("step_ms", "object", "ms", "wall time of traced decode forwards, counted in whole us",
          children=_statistics("p50 p95 p99 max", "float | null", "ms")),
    Field("blocks_touched", "object[]", "", "touched blocks a sparse record, at several block sizes, beside "
          "two selectors of the same k", children=(
        _BLOCK_SIZE,
        Field("mean", "float | null", "blocks", "measured"),
        Field("p50", "int | null", "blocks", "measured, nearest rank"),
        Field("p95", "int | null", "blocks", "measured, nearest rank"),
        Field("uniform_mean", "float | null", "blocks", "modelled: exact expectation of a uniform selector"),
        Field("recency_mean", "float | null", "blocks", "modelled: the last k tokens"),
        Field("context_mean", "float | null", "blocks", "blocks of the whole context"),
    )),
    Field("step_overlap", "object", "", "share of a selection already in the step before; both on the sparse "
          "path", children=_OVERLAP),
    Field("layer_overlap", "object", "", "share of a selection already in the layer before, same step, "
          "sparse path; a layer without an indexer is not compared", children=_OVERLAP),
    Field("needle_recall", "object | null", "", "share of the answer's tokens that a sparse decode record "
          "selected; null where no answer is known", optional=True, children=(
        Field("records", "int", "records", "sparse decode records of requests with an answer"),
        Field("mean", "float | null", "", "a record"),
        _RANDOM_MEAN,
        Field("per_layer", "float[] | null", "", "mean of each layer; null where there was no record"),
    )),
    Field("kv_fetch", "object", "", "totals a tier", keys=TIER_NAMES, children=_FETCH_TOTALS),
    Field("bytes_read", "object", "bytes", "totals over all records", children=(
        Field("without_indexer_scan", "int", "bytes", "latents of the touched blocks, all tiers"),
        Field("indexer_scan", "int", "bytes", "indexer keys"),
        Field("with_indexer_scan", "int", "bytes", "the sum of both"),
    )),
    Field("scores", "object | null", "", "the task's scores; null where no request has one",
          optional=True, children=(
        *_SCORE,
        Field("by", "object", "", "the same in each group", entry="<label>.<value>", children=_SCORE),
    )),
    Field("serving", "object | null", "", "latencies, counted in whole us; null where no requests arrived "
          "over time", optional=True, children=_SERVING),
    Field("prefix_cache", "object | null", "", "what the engine's prefix cache saved; null where there was "
          "none", optional=True, children=_PREFIX_CACHE),
    Field("tiers", "object | null", "", "what the tiers' stores did, as the run itself counted; null where "
          "everything was in HBM, where nothing was said yet, and in a summary of several runs",
          optional=True, children=_TIER_TOTALS),
    Field("workload", "object | null", "", "what the workload says of itself: its name, its counts, the rows "
          "it left out", optional=True),
    Field("tracing_cost", "object | null", "", "what tracing took from the model thread; null where nothing "
          "was traced live", children=(
        Field("traced_steps", "int", "steps", "forwards handed to the writer"),
        Field("handover_us_mean", "float | null", "us", "copy to the host, without the synchronisation"),
        Field("blocked_us_mean", "float | null", "us", "waiting for a place in the writer's queue"),
        Field("sync_us_mean", "float | null", "us", "synchronisation of the device"),
        Field("without_sync_us_mean", "float | null", "us", "hand-over and waiting"),
        Field("with_sync_us_mean", "float | null", "us", "hand-over, waiting and synchronisation"),
        Field("writer_busy_ms", "float", "ms", "the writer thread's wall time at work, the whole run"),
    )),
    Field("histograms", "object", "", "name -> `{values, counts}`: what the distributions were computed "
          "from; they merge by addition"),
)

# fmt: on

TABLES: dict[str, tuple[Field, ...]] = {
    STEPS_FILE: STEP_FIELDS,
    REQUESTS_FILE: REQUEST_FIELDS,
    MANIFEST_FILE: MANIFEST_FIELDS,
    SUMMARY_FILE: SUMMARY_FIELDS,
}

QUANTILE_DEFINITION = "nearest rank: the smallest value whose cumulative count reaches q"


def nearest_rank(count: int, percent: int) -> int:
    """0-based index of the quantile among `count` sorted values: ceil(count * percent / 100) - 1."""
    if count < 1 or not 0 <= percent <= 100:
        raise ValueError(f"no {percent}th percentile of {count} values")
    return max(1, -(-count * percent // 100)) - 1


def quantile_sorted(values: Sequence[Number], percent: int) -> Number:
    """The quantile of ascending `values`."""
    return values[nearest_rank(len(values), percent)]


def quantile_histogram(values: Iterable[Number], counts: Sequence[int], percent: int) -> Number:
    """The quantile of ascending distinct `values`, `counts[i]` of each."""
    rank, seen = nearest_rank(sum(counts), percent), 0
    for value, count in zip(values, counts, strict=True):
        seen += count
        if seen > rank:
            return value
    raise AssertionError("the counts were summed to find the rank")


def distribution(values: Sequence[Number], counts: Sequence[int], mean: float | None) -> dict[str, Any]:
    """`{min, p50, p95, max, mean}` of ascending distinct `values`; all null when there are none."""
    if not counts:
        return {field.name: None for field in _DISTRIBUTION}
    p50, p95 = (quantile_histogram(values, counts, percent) for percent in (50, 95))
    return {"min": values[0], "p50": p50, "p95": p95, "max": values[-1], "mean": mean}


def encode(record: Mapping[str, Any]) -> str:
    """One line of plain JSON, without the newline; NaN and infinity raise `ValueError`."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def decode(line: str | bytes) -> dict[str, Any]:
    """The record of one line; anything but a JSON object raises `ValueError`."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {type(record).__name__}")
    return record


def check_level(level: str) -> None:
    """Raises `ValueError` naming the levels there are."""
    if level not in LEVELS:
        raise ValueError(f"trace level {level!r} is not one of {', '.join(LEVELS)}")


def at_level(
    record: Mapping[str, Any], level: Level, fields: Sequence[Field] = STEP_FIELDS
) -> dict[str, Any]:
    """The record with only the fields of `level`, in table order; what is absent stays absent."""
    check_level(level)
    kept: dict[str, Any] = {}
    for field in fields:
        if level not in field.levels or field.name not in record:
            continue
        value = record[field.name]
        nested = field.children and not field.keys and isinstance(value, Mapping)
        kept[field.name] = at_level(value, level, field.children) if nested else value
    return kept


def project(record: Mapping[str, Any], fields: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The record with only `fields`: dotted paths; a parent's name takes all below it."""
    kept: dict[str, Any] = {}
    for name, value in record.items():
        path = prefix + name
        if path in fields:
            kept[name] = value
        elif isinstance(value, Mapping) and (inner := project(value, fields, f"{path}.")):
            kept[name] = inner
    return kept


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int,),
    "float": (int, float),
    "number": (int, float),
    "bool": (bool,),
    "object": (dict,),
    "null": (type(None),),
}


@functools.cache
def _item_types(declared: str) -> frozenset[type]:
    """Types of a list's items. JSON has no NaN: among floats null stands for it."""
    return frozenset((*_TYPES[declared], *(_TYPES["null"] if declared == "float" else ())))


def _has_type(value: object, declared: str) -> bool:
    """Whether the value has one of the types that `declared` names, as in `int[] | null`."""
    for option in declared.split(" | "):
        if not option.endswith("[]"):
            fits = type(value) in _TYPES[option]
        else:
            fits = isinstance(value, list) and _item_types(option[:-2]).issuperset(map(type, value))
        if fits:
            return True
    return False


def problems(
    record: Mapping[str, Any],
    level: Level = "full",
    fields: tuple[Field, ...] = STEP_FIELDS,
    where: str = "",
) -> list[str]:
    """What differs from the table: missing fields, wrong types, wrong order. Unknown keys are ignored."""
    found: list[str] = []
    expected = {field.name: field for field in fields if level in field.levels}
    for name, field in expected.items():
        if name in record:
            found += _value_problems(record[name], level, field, where + name)
        elif not field.optional:
            found.append(f"{where}{name}: missing")
    if fields is STEP_FIELDS and ("scores_stats" in record) == ("scores_topk" in record):
        found.append("scores_stats, scores_topk: exactly one of them must stand")
    if [name for name in record if name in expected] != [name for name in expected if name in record]:
        found.append(f"{where or 'record'}: fields out of order")
    return found


def _value_problems(value: Any, level: Level, field: Field, path: str) -> list[str]:
    """The same for one value: its type, and what an object holds. Objects in a list are not looked into."""
    if not _has_type(value, field.type):
        return [f"{path}: {value!r} is not {field.type}"]
    found: list[str] = []
    for key in field.keys:
        if isinstance(inner := value.get(key), dict):
            found += problems(inner, level, field.children, f"{path}.{key}.")
        else:
            found.append(f"{path}.{key}: {inner!r} is not object")
    if field.children and isinstance(value, dict) and not (field.keys or field.entry):
        found += problems(value, level, field.children, f"{path}.")
    return found


def field_paths(fields: tuple[Field, ...], prefix: str = "") -> Iterator[tuple[str, Field]]:
    """(dotted path, field) of every field, parents first; a tier's name reads `<tier>`."""
    for field in fields:
        path = prefix + field.name
        yield path, field
        key = ".<tier>" if field.keys else f".{field.entry}" if field.entry else ""
        items = "[]" if field.type.startswith("object[]") else ""
        yield from field_paths(field.children, f"{path}{items}{key}.")


def records_markdown() -> str:
    """The tables of every file, as docs/records.md shows them; only step records have levels."""
    lines: list[str] = []
    for file_name, fields in TABLES.items():
        last = ("levels",) if file_name == STEPS_FILE else ()
        head = ("field", "type", "unit", "meaning", *last)
        lines += [f"### `{file_name}`", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for path, field in field_paths(fields):
            levels = "all" if field.levels == LEVELS else ", ".join(field.levels)
            row = (f"`{path}`", field.type.replace("|", "or"), field.unit, field.meaning, levels)
            lines.append(f"| {' | '.join(row[: len(head)])} |")
        lines.append("")
    return "\n".join((*lines, f"Quantiles: {QUANTILE_DEFINITION}.")) + "\n"


if __name__ == "__main__":
    print(records_markdown(), end="")
