"""Every record that a run writes, as tables: fields, order, types, units, meaning.

Standard library only, so that the fast path, the plain path and the docs agree on names without
sharing code. Knows no model; opens no file. In order: names of files and tiers, `Field`, one table per
file, quantiles, lines of JSON, the check of a record, the docs.

    line = encode(record)                # compact JSON, field order = table order
    problems(decode(line), "full")       # [] when the record is as the table says
    python -m dsatrace.schema            # prints the tables of docs/records.md
"""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

SCHEMA_VERSION = 1

Level = Literal["full", "blocks", "stats"]
LEVELS: tuple[Level, ...] = ("full", "blocks", "stats")
LatencyKind = Literal["none", "measured", "modelled"]
"""Where a tier's times come from: it has none, a clock, or a model."""

TIER_NAMES = ("hbm", "local_pool", "remote_pool")
TIER_CHOICES = {
    "granularity": ("block", "row"),
    "on_error": ("recompute", "fail"),
    "index_keys": ("hbm", "offloaded"),
}
"""Values of these fields of the manifest's `tiers`."""
STEPS_FILE = "trace_steps.jsonl"
STEPS_PARQUET_FILE = "trace_steps.parquet"  # the same records as columns
STEPS_FOLDER = "trace_steps"  # several such files, in the order of their names, instead of one
PART_RECORDS = 1 << 11
"""A run writes such a file once it has so many records."""
LOST_RECORDS = 2 * PART_RECORDS
"""A kill loses fewer, and a step's: one file is being filled, and one written."""
REQUESTS_FILE = "requests.jsonl"
MANIFEST_FILE = "manifest.json"
SUMMARY_FILE = "summary.json"
RUN_STATES = ("running", "complete", "incomplete")

UNITS = ("token", "entry", "block", "expert")
ID_KINDS = ("position", "slot")
DOORS = ("serve", "attach", "import", "layerwise")
MISSING = ("scores", "timing", "tiers", "prefix")
"""Values of these fields of the manifest's `selection`."""

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True, eq=False)
class Field:
    """One field of a record.

    `keys` makes it an object with those keys, each with `children`. `entry` makes it an object whose
    keys are data; the docs write the path to its `children` with it. `optional` fields may be absent:
    they were added later, or stand only where they apply. A whole number is at most `most`, and at least
    its negative. A step record's field whose `needs` the run's selections do not tell (see `told`) is null
    or, where `is_absent`, not there.
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
    most: int = 2**63 - 1
    needs: tuple[str, ...] = ()
    is_absent: bool = False


_FULL: tuple[Level, ...] = ("full",)
_LOCATED = ("positions",)
_BLOCKS: tuple[Level, ...] = ("full", "blocks")

# fmt: off
# Shapes that stand in several tables.

_BLOCK_SIZE = Field("block_size_tokens", "int", "tokens", "tokens in a block")
_LATENCY_KIND = Field("latency_kind", "string", "", "measured or modelled")
_RANDOM_MEAN = Field("random_mean", "float | null", "", "the same for a random selector: k / N")
_SELECTIONS = Field("selections", "string", "", "who selected: model; random_weights or synthetic (no claim "
                    "about locality); none (no model ran)")
_STATE = Field("state", "string", "", "running, complete or incomplete")

_RECALL = (
    Field("records", "int", "records", "sparse decode records of requests with an answer"),
    Field("mean", "float | null", "", "mean share per record"),
    _RANDOM_MEAN,
    Field("per_layer", "float[] | null", "", "mean of each layer; null where there was no record"),
)

_STATISTICS = {
    "min": "smallest", "max": "largest", "mean": "arithmetic mean", "p50": "median, nearest rank",
    "p95": "95th percentile, nearest rank", "p99": "99th percentile, nearest rank",
}


def _statistics(names: str, type_: str, unit: str) -> tuple[Field, ...]:
    """One field per name; a mean is always a float."""
    types = {"mean": "float | null"}
    return tuple(Field(name, types.get(name, type_), unit, _STATISTICS[name]) for name in names.split())


_DISTRIBUTION = _statistics("min p50 p95 max mean", "number | null", "")
_LATENCY = _statistics("p50 p95 p99 max mean", "float | null", "ms")


def _pools(children: tuple[Field, ...]) -> tuple[Field, ...]:
    """The two tiers behind HBM; either may be missing."""
    names = ("local_pool", "remote_pool")
    return tuple(Field(name, "object | null", "", "null: there is none", children=children) for name in names)


# trace_steps.jsonl: one record per layer of a request's step.
_OFFLOADED = (
    Field("requested_tokens", "int", "tokens", "selected tokens that no tier above it held. This field and "
          "those after it stand where the manifest has `tiers`", optional=True),
    Field("hit_tokens", "int", "tokens", "of those, held here when they were selected", optional=True),
    Field("missed_tokens", "int", "tokens", "the others, asked of the next tier", optional=True),
    Field("requested_blocks", "int", "blocks", "touched blocks not whole in the tiers above it",
          optional=True),
    Field("missed_blocks", "int", "blocks", "of those, blocks with a token that it missed", optional=True),
    Field("evicted_units", "int", "units", "units that the tier gave up to make room", optional=True),
    Field("bytes_written", "int", "bytes", "written into the tier: fetched into HBM, written back or "
          "promoted to a pool", optional=True),
    Field("errors", "int", "", "the store's failed batches and corrupt units", optional=True),
)

_FETCH = (
    Field("hit_blocks", "int", "blocks", "touched blocks whose furthest selected token came from this tier"),
    Field("bytes_read", "int", "bytes", "hbm: tokens in those blocks x latent bytes per token and layer (its "
          "hit tokens alone where rows move); a pool: the units fetched, each charged to the first request "
          "of the batch that selected it"),
    Field("read_ops", "int", "reads", "hbm: runs of adjacent block ids (of adjacent positions where rows "
          "move); a pool: its store's own reads, shared out over the step's records"),
    Field("latency_us", "float", "us", "time of the layer's batch of reads, which all its requests wait for; "
          "0 where `latency_kind` is none"),
    Field("batch_size", "int", "requests", "requests in the step; 0 for a tier that the run does not have"),
    Field("bytes_useful", "int", "bytes", "hbm: its selected tokens x latent bytes per token and layer; a "
          "pool: the part of `bytes_read` that holds the record's selected tokens"),
    Field("latency_kind", "string", "", "none, measured or modelled"),
    *_OFFLOADED,
)

FETCH_TOTALS = ("hit_blocks", "bytes_read", "read_ops", "bytes_useful")
"""Fields of `kv_fetch` that summary.json adds up."""
OFFLOADED_FETCH = tuple(field.name for field in _OFFLOADED)
"""Those that it also adds up where the manifest has `tiers`."""
_FETCH_TOTALS = tuple(field for field in _FETCH if field.name in FETCH_TOTALS + OFFLOADED_FETCH)

STEP_FIELDS = (
    Field("event", "string", "", '`"dsa_topk"`'),
    Field("request_id", "string", "", "the request, as in requests.jsonl"),
    Field("layer_id", "int", "", "layer, 0-based"),
    Field("step_idx", "int", "", "the request's own decode step, 0-based; in the prompt -1 for its last "
          "position, -2 for the one before, ..."),
    Field("seq_len_current", "int", "tokens", "positions visible to the query, itself included"),
    Field("selected_token_pos", "int[]", "position", "absolute logical positions, ascending; with "
          "`--trace-keep-order` by score descending, then position ascending", _FULL,
          needs=("token positions",)),
    Field("unique_token_pos_count", "int", "tokens", "selected positions: all tokens of the selected ids",
          needs=("tokens",)),
    Field("offset_min", "int", "tokens", "smallest offset; offset = query position - selected position",
          needs=_LOCATED),
    Field("offset_p50", "int", "tokens", "median offset, nearest rank", needs=_LOCATED),
    Field("offset_max", "int", "tokens", "largest offset", needs=_LOCATED),
    _BLOCK_SIZE,
    Field("selected_block_ids", "int[]", "block", "touched blocks (position // size), ascending", _BLOCKS,
          needs=_LOCATED),
    Field("unique_blocks", "int", "blocks", "touched blocks", needs=_LOCATED),
    Field("tokens_per_touched_block", "object", "", "selected tokens per touched block", needs=_LOCATED,
          children=(
        Field("mean", "float", "tokens", "selected tokens / touched blocks"),
        Field("p50", "int", "tokens", "median, nearest rank"),
        Field("p95", "int", "tokens", "95th percentile, nearest rank"),
    )),
    Field("kv_fetch", "object", "", "what each tier served; bytes per layer, of a `kv_head` its share",
          keys=TIER_NAMES, children=_FETCH,
          needs=("positions", "tiers")),
    Field("prefix", "object", "", "the shared prefix, and how much of the selection lies in it",
          needs=("positions", "prefix"), children=(
        Field("prefix_cache_hit", "bool", "", "at least one full leading block is shared"),
        Field("prefix_cached_blocks", "int", "blocks", "full leading blocks that are shared: equal to an "
              "earlier request's or, where `prefix_source` is cache, whole within the request's "
              "`prefix_hit_tokens`, whatever block size the cache uses"),
        Field("prefix_key", "string", "hex", "keyed hash of the prompt's first tokens"),
        Field("intersection_ratio", "float", "", "touched prefix blocks / touched blocks"),
        Field("intersection_blocks", "int[]", "block", "touched prefix blocks, ascending", _BLOCKS),
    )),
    Field("scores_stats", "object", "score", "absent where `scores_topk` stands", optional=True,
          needs=("scores",), children=(
        Field("min", "float", "score", "lowest selected score"),
        Field("mean", "float", "score", "mean selected score"),
        Field("max", "float", "score", "highest selected score"),
    )),
    Field("scores_topk", "float[]", "score", "with `--trace-store-scores`: `scores_topk[i]` belongs to "
          "`selected_token_pos[i]` or `selected_ids[i]`", _FULL, optional=True, needs=("scores",),
          is_absent=True),
    Field("forward_idx", "int", "", "the run's forward pass, 0-based; all records of one pass share it"),
    Field("step_wall_us", "float", "us", "wall time around the forward pass", needs=("timing",)),
    Field("step_synced", "bool", "", "the device was synchronised before the clock was read",
          needs=("timing",)),
    Field("phase", "string", "", "decode, prefill (a position of the prompt) or layerwise (a step of a given "
          "transcript)"),
    Field("path", "string", "", "dense while seq_len_current <= top-k, else sparse. Other units: dense while "
          "there are no more ids to choose from than top-k"),
    Field("kth_margin", "float | null", "score", "k-th minus (k+1)-th score; null on the dense path",
          needs=("scores",)),
    Field("indexer_scan", "object", "", "what the indexer read in order to select", needs=("keys",),
          children=(
        Field("tokens", "int", "tokens", "keys scanned: all visible positions (entries: one key each), or 0 "
              "with a `source_layer`"),
        Field("bytes_read", "int", "bytes", "tokens x indexer bytes per token and layer, of a `kv_head` its "
              "share"),
    )),
    Field("source_layer", "int", "", "the earlier layer whose selection this one uses; stands only where "
          "this layer has no indexer. All that is derived from the selection is as in that layer's record",
          optional=True),
    Field("kv_head", "int", "", "which of the layer's sets this is, 0-based; stands only where the layer has "
          "several", optional=True, needs=("heads",), is_absent=True),
    Field("selected_ids", "int[]", "id", "ids that are no token positions, in the same order; stands only "
          "where `selected_token_pos` is null", _FULL, optional=True, needs=("other ids",), is_absent=True),
    Field("num_selected_ids", "int", "ids", "how many they are", optional=True, needs=("other ids",),
          is_absent=True),
    Field("needle", "object", "", "the answer in the prompt, where it is known", optional=True,
          needs=_LOCATED, is_absent=True, children=(
        Field("tokens", "int", "tokens", "prompt positions that hold the answer"),
        Field("selected", "int", "tokens", "of those, the selected ones"),
    )),
)

# requests.jsonl: one record per request.
_MOST_TOKENS = 100_000_000  # more is no request's, and readers count through them
REQUEST_FIELDS = (
    Field("request_id", "string", "", "unique in the run"),
    Field("source_row", "int | null", "row", "row of the data set the prompt came from"),
    Field("num_prompt_tokens", "int", "tokens", "prompt tokens", most=_MOST_TOKENS),
    Field("num_output_tokens", "int", "tokens", "generated tokens", most=_MOST_TOKENS),
    Field("arrival_s", "float", "s", "from the run's start"),
    Field("first_token_s", "float | null", "s", "from the run's start; null when none came"),
    Field("finish_s", "float | null", "s", "from the run's start; null when it did not finish"),
    Field("state", "string", "", "how it ended: stop, length, rejected, aborted, unfinished or failed (a "
          "tier lost its KV for good)"),
    Field("score", "float | null", "", "the task's score, where the workload has one"),
    Field("admitted_s", "float | null", "s", "from the run's start, when the engine first took it up; null "
          "when it never did", optional=True),
    Field("num_preemptions", "int", "", "times it had to give its blocks back and start over", optional=True),
    Field("labels", "object", "", "the groups its score is averaged in: label -> value", optional=True),
    Field("needle_positions", "int[]", "position", "prompt positions that hold the answer, ascending; empty "
          "where unknown", optional=True),
    Field("prefix_hit_tokens", "int | null", "tokens", "prompt tokens found in the prefix cache when its "
          "prefill first began, and so not computed; null when it never began. This field and the next two "
          "stand where `prefix_source` is cache", optional=True),
    Field("num_prefill_tokens", "int", "tokens", "tokens that its prefill computed, those computed again "
          "after a preemption included", optional=True),
    Field("prefill_s", "float", "s", "time of the forward passes that computed those", optional=True),
    Field("num_recomputes", "int", "", "times it was computed again because a tier lost its KV; stands where "
          "the manifest has `tiers`", optional=True),
    Field("answer_tokens", "int", "tokens", "generated tokens before the first end of sequence, whether that "
          "was sampled or gave way to the next best token; all of them where none came. Records with a "
          "`step_idx` of this or more lie past the answer; `score` and `text` are of the answer alone. This "
          "stands where the manifest has `answer_end`", optional=True),
    Field("error", "string", "", "why it was rejected or failed", optional=True),
    Field("text", "string", "", "the answer; only with `--save-text`", optional=True),
    Field("text_past_answer", "string", "", "what was generated after the answer; only with `--save-text`, "
          "where there is any", optional=True),
    Field("prompt_token_ids", "int[]", "id", "the prompt; only with `--save-tokens`", optional=True),
    Field("output_token_ids", "int[]", "id", "all that was generated; only with `--save-tokens`",
          optional=True),
)

# manifest.json: what the run was.
_POOL = (
    Field("store", "string", "", "the store that keeps its units, credentials redacted"),
    Field("blocks", "int | null", "blocks", "blocks per layer that it has room for; null: it sets no limit"),
    _LATENCY_KIND,
)

_TIER_SETUP = (
    Field("granularity", "string", "", "what moves as one: block (a block of one layer) or row (one token)"),
    Field("unit_tokens", "int", "tokens", "tokens in a unit"),
    Field("unit_bytes", "int", "bytes", "unit_tokens x latent bytes of the cache layout"),
    Field("policy", "string", "", "how HBM chooses the unit it gives up"),
    Field("prefetch", "string", "", "what is fetched before it is selected"),
    Field("on_error", "string", "", "when a tier loses a request's KV: recompute, or fail the request"),
    Field("index_keys", "string", "", "where the indexer's keys lie: hbm or offloaded"),
    Field("hbm", "object", "", "what HBM holds", children=(Field("blocks", "int", "blocks", "per layer"),)),
    *_pools(_POOL),
)

LAYER_FIELDS = (
    Field("top_k", "int", "", "most ids that a record selects"),
    Field("heads", "int", "", "selections per step: 1, one per KV head, or 0 where it selects nothing"),
    Field("source_layer", "int | null", "", "earlier layer whose selection it uses; null: it has an indexer"),
    Field("always_selected", "object | null", "", "tokens that attention reads in any case, which no record "
          "counts; null or absent: none", optional=True, children=(
        Field("sinks", "int", "tokens", "the first tokens of the context"),
        Field("window", "int", "tokens", "the last ones, the query's own included"),
        Field("tail", "int", "tokens", "at most so many after the last whole id"),
    )),
)
"""Of each layer's selections."""

FILE_FIELDS = (
    Field("bytes", "int", "bytes", "size of the file"),
    Field("sha256", "string", "hex", "SHA-256 of its bytes"),
    Field("records", "int", "", "step records that it holds; stands where there are several such files",
          optional=True),
    Field("requests", "int", "requests", "requests whose records it holds, all of each; likewise",
          optional=True),
)
"""What a manifest says of each of the run's other files."""

MANIFEST_FIELDS = (
    Field("schema_version", "int", "", "version of the records; fields are only ever added"),
    Field("tool", "string", "", '`"dsatrace"`'),
    Field("tool_version", "string", "", "version of the package"),
    _STATE,
    Field("error", "string | null", "", "why the run is incomplete, where that is known"),
    Field("failed_requests", "int", "requests", "requests that ended in state failed; absent where none did",
          optional=True),
    Field("started_utc", "string", "", "ISO 8601"),
    Field("argv", "string[]", "", "command line, secrets redacted"),
    _SELECTIONS,
    Field("model_config", "object", "", "the model's hyperparameters"),
    Field("model_config_digest", "string", "hex", "hash of the canonical model_config"),
    Field("cache_layout", "string", "", "the layout that bytes are counted with"),
    Field("cache_layouts", "object[]", "", "bytes per token and layer of each layout", children=(
        Field("name", "string", "", "name of the layout"),
        Field("latent_bytes_per_token", "int", "bytes", "per token and layer: latent and rope key"),
        Field("index_bytes_per_token", "int", "bytes", "per token and layer: indexer key and scales"),
    )),
    Field("tokenizer", "string | null", "", "tokenizer file or name"),
    Field("chat", "string | null", "", "how messages became prompts: deepseek_v32, a Jinja template by name "
          "and digest, or plain text; null where there were no messages", optional=True),
    Field("data_source", "string | null", "", "embedded, file or hub revision"),
    Field("device", "string", "", "device the model ran on"),
    Field("hbm_stand_in", "string | null", "", "what stands in for HBM where there is none"),
    Field("world_size", "int", "ranks", "tensor-parallel ranks"),
    Field("seed", "int", "", "seed of the run and of step sampling", most=2**64 - 1),
    Field("serving", "object | null", "", "how requests that arrived over time were served, with the "
          "engine's settings; null where none arrived so", optional=True, children=(
        Field("mode", "string", "", "how the engine takes requests up"),
        Field("clock", "string", "", "real, or virtual (measured steps, skipped gaps)"),
    )),
    Field("prefix_source", "string", "", "what the records' `prefix` tells: analysis (equal to an earlier "
          "prompt: it could be reused) or cache (found in the engine's prefix cache: it was reused); absent "
          "means analysis", optional=True),
    Field("tiers", "object | null", "", "where latents lay that HBM did not hold; null or absent: HBM held "
          "everything", optional=True, children=_TIER_SETUP),
    Field("selection", "object | null", "", "what a selection is; null: no model ran; absent: every layer "
          "has an indexer", optional=True, children=(
        Field("unit", "string", "", "what an id stands for: token, entry (a compressed group of tokens), "
              "block (a block of tokens) or expert (routing)"),
        Field("unit_tokens", "int", "tokens", "tokens that an id covers: id j covers those from j x "
              "unit_tokens on. An entry is there to be selected once it is whole, a block once it begins"),
        Field("id_kind", "string", "", "position: ids number tokens, entries or blocks from the context's "
              "start (experts: as the model does); slot: an engine's places, which say nothing of positions"),
        Field("num_ids", "int | null", "ids", "ids that a step chooses from; null or absent: those before "
              "the query", optional=True),
        Field("layers", "object[]", "", "one entry per layer", children=LAYER_FIELDS),
        Field("door", "string", "", "where the selections come from: serve (this tool's engine), attach, "
              "import or layerwise"),
        Field("missing", "string[]", "", "what the door cannot tell: scores, timing, tiers, prefix",
              optional=True),
        Field("sparse_active", "int | null", "records", "records past top-k whose set is not just the newest "
              "ids: evidence that sparse attention was active. null: the run has not ended, or ids do not "
              "tell", optional=True),
    )),
    Field("answer_end", "object", "", "how answers were kept from ending; absent: they ended at an end of "
          "sequence, or had the length that a log told", optional=True, children=(
        Field("min_new_tokens", "int", "tokens", "no answer ended before so many new tokens; 0: no limit"),
        Field("ignore_eos", "bool", "", "every answer went on to its most new tokens"),
    )),
    Field("trace", "object", "", "how the run was traced", children=(
        Field("level", "string", "", "full, blocks or stats"),
        _BLOCK_SIZE,
        Field("sample_rate", "float", "", "share of the steps that are recorded; 0: requests only"),
        Field("store_scores", "bool", "", "scores are recorded"),
        Field("keep_order", "bool", "", "positions stand in score order"),
        Field("prefill", "string", "", "rows of the prompt that are recorded: off, last (of its last "
              "position) or all (of those that have anything to select)"),
        Field("sync_cuda", "bool", "", "the device is synchronised once per step"),
        Field("prefix_key_tokens", "int", "tokens", "tokens hashed into prefix_key"),
        Field("prefix_key_id", "string", "hex", "names the secret of the keyed hashes"),
        Field("queue_policy", "string", "", "if the writer lags: block (the model waits) or drop (the step)"),
        Field("queue_steps", "int", "steps", "steps that may wait for the writer"),
        Field("on_error", "string", "", "when writing fails: stop the run, or continue untraced"),
        Field("format", "string", "", "what the run wrote its step records as: parquet; absent: JSON lines",
              optional=True),
    )),
    Field("quantile", "string", "", "definition of every quantile"),
    Field("resumed_at_forward", "int[]", "", "`forward_idx` at which each resume of the run went on. Step "
          "times cover all parts, the tracing cost only the last one", optional=True),
    Field("files", "object | null", "", "the run's other files as they were when it ended; null: it has not "
          "ended, was killed, or could not write all", entry="<file>", children=FILE_FIELDS, optional=True),
    Field("layout", "string", "", "of an export: replay (whole requests per file, by layer, then step); "
          "absent: records stand in the order they were written", optional=True),
    Field("source_files", "object | null", "", "of an export: the `files` of the runs it was made from; "
          "null: they had none", entry="<file>", children=FILE_FIELDS, optional=True),
)

# summary.json: what came of it.
_OVERLAP = (
    Field("pairs", "int", "", "pairs of selections compared, in all layers together"),
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
    Field("clock", "string", "", "clock of all times here: real, or virtual (measured steps, skipped gaps)"),
    Field("counts", "object", "", "what became of the requests", children=(
        Field("served", "int", "requests", "state stop or length"),
        Field("rejected", "int", "requests", "could never fit"),
        Field("aborted", "int", "requests", "cancelled while waiting or running"),
        Field("unfinished", "int", "requests", "the run ended first"),
        Field("preemptions", "int", "", "times a request had to start over"),
        Field("failed", "int", "requests", "a tier lost their KV; stands if there are any", optional=True),
        Field("recomputes", "int", "", "times lost KV was recomputed; stands if any was", optional=True),
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
    Field("requests_over_time", "object[]", "", "at most 64 equal buckets of 2^n seconds", children=(
        Field("start_s", "int", "s", "from the run's start"),
        Field("arrived", "int", "requests", "arrivals"),
        Field("finished", "int", "requests", "served requests that finished"),
    )),
)

_MOVED = (
    Field("in_records", "int", "bytes", "counted in the records"),
    Field("elsewhere", "int", "bytes", "steps and rows without a record, prefill, refills, prefetch"),
    Field("store", "int", "bytes", "counted by the store itself: its units x unit_bytes"),
)

_POOL_TOTALS = (
    Field("bytes_read", "object", "bytes", "bytes read, by who counted them", children=_MOVED),
    Field("bytes_written", "object", "bytes", "bytes written, by who counted them", children=_MOVED),
    Field("requested_units", "int", "units", "units asked of the store"),
    Field("hit_units", "int", "units", "of those, returned"),
    Field("missed_units", "int", "units", "the others"),
    Field("corrupt_units", "int", "units", "units that came back other than they were stored"),
    Field("read_batches", "int", "", "calls that read"),
    Field("read_ops", "int", "reads", "operations of those calls, after coalescing"),
    Field("read_us", "float", "us", "time of those calls"),
    Field("write_batches", "int", "", "calls that wrote"),
    Field("write_us", "float", "us", "time of those calls"),
    Field("stored_units", "int", "units", "units that the store took"),
    Field("evicted_units", "int", "units", "units that the store gave up"),
    Field("errors", "int", "", "failed batches"),
    Field("timeouts", "int", "", "of those, batches that timed out"),
    Field("skipped_batches", "int", "", "of the errors, batches not sent since the store was hanging",
          optional=True),
    Field("retries", "int", "", "requests sent again since their connection broke", optional=True),
    Field("bytes_moved", "int", "bytes", "read and written, padding included"),
    _LATENCY_KIND,
)

_INDEX_TOTALS = (
    Field("bytes_read", "int", "bytes", "keys and scales given back"),
    Field("bytes_written", "int", "bytes", "keys and scales taken"),
    Field("read_batches", "int", "", "fetches: one per indexer and forward"),
    Field("read_us", "float", "us", "time of the fetches"),
    Field("write_batches", "int", "", "puts: one per indexer and forward"),
    Field("write_us", "float", "us", "time of the puts"),
    Field("errors", "int", "", "batches that failed and units that came back corrupt"),
)

_TIER_TOTALS = (
    Field("since_forward", "int", "", "`forward_idx` that counting began at: the start or last resume"),
    Field("selected_units", "object", "", "units that layers selected, each once a forward, prefill "
          "included; absent in older runs", optional=True, children=(
        Field("requested_units", "int", "units", "distinct units that a layer's rows selected"),
        Field("hit_units", "int", "units", "of those, units that were in HBM"),
        Field("missed_units", "int", "units", "the others"),
    )),
    *_pools(_POOL_TOTALS),
    Field("prefetch", "object | null", "", "what was fetched ahead; null where nothing is", children=(
        Field("units", "int", "units", "units fetched ahead"),
        Field("used_units", "int", "units", "of those, units that the layer then selected"),
        Field("missed_units", "int", "units", "units selected that were not in HBM in time"),
        Field("recall", "float | null", "", "used_units / (used_units + missed_units)"),
        Field("precision", "float | null", "", "used_units / units"),
    )),
    Field("index_keys", "object | null", "", "the stores of the indexer's keys; null where HBM holds all "
          "keys", children=_pools(_INDEX_TOTALS)),
    Field("lost_units", "int", "units", "units that no tier gave back"),
    Field("num_recomputes", "int", "", "times a request was computed again for lost units"),
    Field("failed_requests", "int", "requests", "requests that lost units ended"),
)

_HISTOGRAM = (
    Field("values", "number[]", "", "distinct values, ascending"),
    Field("counts", "int[]", "", "how often each occurs"),
)
SUMMARY_FIELDS = (
    Field("schema_version", "int", "", "version of the records"),
    _STATE,
    _SELECTIONS,
    Field("counts", "object", "", "what the run recorded", children=(
        Field("steps", "int", "steps", "traced decode forwards"),
        Field("prefills", "int", "steps", "traced prefill forwards"),
        Field("records", "int", "records", "lines of trace_steps.jsonl"),
        Field("sparse_records", "int", "records", "those on the sparse path"),
        Field("requests", "int", "requests", "lines of requests.jsonl"),
    )),
    Field("dropped_steps", "int", "steps", "sampled forwards that a full queue or an error lost"),
    Field("unique_blocks", "object", "blocks", "touched blocks per record", children=_DISTRIBUTION),
    Field("tokens_per_touched_block", "object", "tokens", "selected tokens per touched block, all blocks "
          "pooled", children=_DISTRIBUTION),
    Field("offsets", "object", "tokens", "offsets of all selected tokens, pooled", children=_DISTRIBUTION),
    Field("prefix_intersection_ratio", "object", "", "the records' ratios", children=_DISTRIBUTION),
    Field("prefix_hot_blocks", "object", "", "request id -> its most touched prefix blocks, at most 20; only "
          "requests with a prefix hit", entry="<request>[]", children=(
        Field("block_id", "int", "block", "logical block"),
        Field("touches", "int", "records", "records that touched it"),
    )),
    Field("step_ms", "object", "ms", "wall time of traced decode forwards, counted in whole us",
          children=_statistics("p50 p95 p99 max", "float | null", "ms")),
    Field("blocks_touched", "object[]", "", "touched blocks per sparse record, at several block sizes, "
          "beside two selectors of the same k", children=(
        _BLOCK_SIZE,
        Field("mean", "float | null", "blocks", "measured"),
        Field("p50", "int | null", "blocks", "measured, nearest rank"),
        Field("p95", "int | null", "blocks", "measured, nearest rank"),
        Field("uniform_mean", "float | null", "blocks", "modelled: exact expectation of a uniform selector"),
        Field("recency_mean", "float | null", "blocks", "modelled: the last k tokens"),
        Field("context_mean", "float | null", "blocks", "blocks of the whole context"),
    )),
    Field("step_overlap", "object", "", "share of a selection that the step before had too; both on the "
          "sparse path", children=_OVERLAP),
    Field("layer_overlap", "object", "", "share of a selection that the layer before had too, in the same "
          "step, on the sparse path; layers without an indexer are not compared", children=_OVERLAP),
    Field("needle_recall", "object | null", "", "share of the answer's tokens that a sparse decode record "
          "selected, up to the end of the request's answer; null where no answer is known. Past it too where "
          "`past_answer` stands and `needle_recall_past` does not, as in older runs", optional=True,
          children=_RECALL),
    Field("needle_recall_past", "object | null", "", "the same of records past the answers; stands where "
          "requests have `answer_tokens`", optional=True, children=_RECALL),
    Field("kv_fetch", "object | null", "", "totals per tier; null where no record has it", keys=TIER_NAMES,
          children=_FETCH_TOTALS),
    Field("bytes_read", "object", "bytes", "totals over all records; null where no record tells", children=(
        Field("without_indexer_scan", "int | null", "bytes", "latents of the touched blocks, all tiers"),
        Field("indexer_scan", "int | null", "bytes", "indexer keys"),
        Field("with_indexer_scan", "int | null", "bytes", "the sum of both"),
    )),
    Field("sparse_active", "int | null", "records", "records past top-k whose set is not just the newest "
          "ids; null where ids do not tell; absent for the engine's runs", optional=True),
    Field("scores", "object | null", "", "the task's scores; null: there are none", optional=True, children=(
        *_SCORE,
        Field("by", "object", "", "the same in each group", entry="<label>.<value>", children=_SCORE),
    )),
    Field("serving", "object | null", "", "latencies, counted in whole us; null where no requests arrived "
          "over time", optional=True, children=_SERVING),
    Field("prefix_cache", "object | null", "", "what the engine's prefix cache saved; null where there was "
          "none", optional=True, children=(
        Field("prompt_tokens", "int", "tokens", "prompt tokens of requests whose prefill began"),
        Field("hit_tokens", "int", "tokens", "of those, found cached when prefill first began"),
        Field("hit_rate", "float | null", "", "hit_tokens / prompt_tokens"),
        Field("computed_tokens", "int", "tokens", "tokens computed in prefill, again after preemptions too"),
        Field("prefill_s", "float", "s", "time of the prefill forwards, counted in whole us per request"),
        Field("saved_s", "float | null", "s", "hit_tokens x prefill_s / computed_tokens"),
        Field("saved_kind", "string", "", "modelled: nobody timed what was not computed"),
    )),
    Field("past_answer", "object", "", "what requests generated after their answers; stands where they have "
          "`answer_tokens`", optional=True, children=(
        Field("requests", "int", "requests", "requests that went on past their answer"),
        Field("decode_steps", "int", "steps", "decode steps of all requests, recorded or not"),
        Field("past_steps", "int", "steps", "of those, steps that lie past the request's answer"),
    )),
    Field("prefix_cache_cold_starts", "int", "", "resumes of the run: each began with an empty prefix cache, "
          "so that prompts were computed which an undisturbed run finds there; absent: none", optional=True),
    Field("tiers", "object | null", "", "what the tiers' stores did, as the run itself counted; null where "
          "HBM held everything, where the run has not told yet, and in a summary of several runs",
          optional=True, children=_TIER_TOTALS),
    Field("workload", "object | null", "", "the workload's name, counts and rows it left out", optional=True),
    Field("tracing_cost", "object | null", "", "what tracing took from the model thread; null where nothing "
          "was traced live", children=(
        Field("traced_steps", "int", "steps", "forward passes handed to the writer"),
        Field("handover_us_mean", "float | null", "us", "copy to the host, without the synchronisation"),
        Field("blocked_us_mean", "float | null", "us", "waiting for a place in the writer's queue"),
        Field("sync_us_mean", "float | null", "us", "synchronisation of the device"),
        Field("without_sync_us_mean", "float | null", "us", "hand-over and waiting"),
        Field("with_sync_us_mean", "float | null", "us", "hand-over, waiting and synchronisation"),
        Field("writer_busy_ms", "float", "ms", "the writer thread's wall time at work, the whole run"),
    )),
    Field("histograms", "object", "", "the distributions' histograms; merged by addition", entry="<name>",
          children=_HISTOGRAM),
    Field("unfinished", "object", "", "what requests that have not ended yet have added to distributions "
          "that the records do not hold: a resume takes it off, for it serves them from their start; absent "
          "at level full, whose records hold everything", optional=True, children=(
        Field("ended_requests", "int", "requests", "requests that have ended: stop, length or rejected"),
        Field("step_overlap", "object", "", "their part of step_overlap", children=_OVERLAP),
        Field("layer_overlap", "object", "", "their part of layer_overlap", children=_OVERLAP),
        Field("histograms", "object", "", "their part of the histograms", entry="<name>",
              children=_HISTOGRAM),
    )),
)

# fmt: on

TABLES: dict[str, tuple[Field, ...]] = {
    STEPS_FILE: STEP_FIELDS,
    REQUESTS_FILE: REQUEST_FIELDS,
    MANIFEST_FILE: MANIFEST_FIELDS,
    SUMMARY_FILE: SUMMARY_FIELDS,
}


def locked_file(manifest: Mapping[str, Any]) -> str:
    """The file that a live run holds a lock on, so that a reader can tell it from a killed one."""
    return REQUESTS_FILE if manifest["trace"].get("format") == "parquet" else STEPS_FILE


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
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {type(record).__name__}")
    return record


def at_level(
    record: Mapping[str, Any], level: Level, fields: tuple[Field, ...] = STEP_FIELDS
) -> dict[str, Any]:
    """The record with only the fields of `level`, in table order; what is absent stays absent."""
    if level not in LEVELS:
        raise ValueError(f"trace level {level!r} is not one of {', '.join(LEVELS)}")
    kept: dict[str, Any] = {}
    for field in fields:
        if level not in field.levels or field.name not in record:
            continue
        value = record[field.name]
        nested = field.children and not field.keys and isinstance(value, Mapping)
        kept[field.name] = at_level(value, level, field.children) if nested else value
    return kept


def project(record: Mapping[str, Any], fields: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The record with only `fields`: dotted paths; a parent's path takes all below it."""
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


def told(selection: Mapping[str, Any] | None) -> frozenset[str]:
    """What a run's selections tell, by its manifest's `selection`: the words of `Field.needs`."""
    if selection is None:  # an older run, of the engine
        return frozenset(("token positions", "tokens", "positions", "keys", *MISSING))
    unit = selection["unit"]
    is_located = selection["id_kind"] == "position" and unit != "expert"
    tells = {
        "token positions": is_located and unit == "token",
        "other ids": not is_located or unit != "token",
        "tokens": is_located or unit == "token",
        "positions": is_located,
        "keys": unit in ("token", "entry"),
        "heads": any(layer["heads"] > 1 for layer in selection["layers"]),
        **{name: name not in selection.get("missing", ()) for name in MISSING},
    }
    return frozenset(name for name, holds in tells.items() if holds)


@functools.cache
def record_fields(tells: frozenset[str]) -> tuple[Field, ...]:
    """The table of step records of a run whose selections tell this (see `told`)."""
    fields: list[Field] = []
    for field in STEP_FIELDS:
        if tells.issuperset(field.needs):
            always = "other ids" in field.needs  # other fields stand where they apply
            fields.append(dataclasses.replace(field, optional=False) if always else field)
        elif not field.is_absent:
            fields.append(dataclasses.replace(field, type="null", children=(), keys=(), optional=False))
    return tuple(fields)


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int,),
    "float": (int, float),
    "number": (int, float),
    "bool": (bool,),
    "object": (dict,),
    "null": (type(None),),
}


_Types = frozenset[type]
_Expected = tuple[Field, _Types, _Types]
"""A field, and the types that its declaration allows: of the value, and of a list's items."""


def _expected(field: Field) -> _Expected:
    """Of `int[] | null`, say. Among floats of a list null stands for NaN, which JSON lacks."""
    values, items = set[type](), set[type]()
    for option in field.type.split(" | "):
        if option.endswith("[]"):
            items.update(_TYPES[option[:-2]], _TYPES["null"] if option == "float[]" else ())
        else:
            values.update(_TYPES[option])
    return field, frozenset(values), frozenset(items)


@functools.cache
def _at_level(fields: tuple[Field, ...], level: Level) -> Mapping[str, _Expected]:
    return {field.name: _expected(field) for field in fields if level in field.levels}


def problems(
    record: Mapping[str, Any],
    level: Level = "full",
    fields: tuple[Field, ...] = STEP_FIELDS,
    where: str = "",
    in_order: bool = True,
) -> list[str]:
    """How a record differs from its table: missing fields, wrong types or order. Unknown keys are ignored.

    Each is one line that begins with the field's path; `where` stands before it.
    """
    found: list[str] = []
    expected = _at_level(fields, level)
    for name, (field, values, items) in expected.items():
        if name in record:
            value = record[name]
            kind = type(value)
            if kind not in values and not (kind is list and items and items.issuperset(map(type, value))):
                found.append(f"{where}{name}: {reprlib.repr(value)} is not {field.type}")
            elif kind is int and not -field.most <= value <= field.most:
                found.append(f"{where}{name}: {reprlib.repr(value)} is beyond {field.most}")
            elif field.children and value is not None:
                found += _inner_problems(value, level, field, where + name, in_order)
        elif not field.optional:
            found.append(f"{where}{name}: missing")
    if fields[:1] == STEP_FIELDS[:1] and ("scores_stats" in record) == ("scores_topk" in record):
        found.append("scores_stats, scores_topk: exactly one of them must stand")
    if in_order and [n for n in record if n in expected] != [n for n in expected if n in record]:
        found.append(f"{where or 'record'}: fields out of order")
    return found


def _inner_problems(value: Any, level: Level, field: Field, path: str, in_order: bool) -> list[str]:
    """The same for the objects inside a value: its own fields, those of its keys, or of a list's items."""
    found: list[str] = []
    for inner_path, inner in _inner_objects(value, field, path):
        if isinstance(inner, dict):
            found += problems(inner, level, field.children, f"{inner_path}.", in_order)
        else:
            found.append(f"{inner_path}: {reprlib.repr(inner)} is not object")
    return found


def _inner_objects(value: Any, field: Field, path: str) -> Iterator[tuple[str, Any]]:
    """(path, object) of all that have the field's children."""
    if field.keys:
        yield from ((f"{path}.{key}", value.get(key)) for key in field.keys)
    elif field.entry:
        yield from _entries(value, field.entry.count("."), field.entry.endswith("[]"), path)
    elif isinstance(value, list):
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(value))
    else:
        yield path, value


def _entries(value: Any, depth: int, in_lists: bool, path: str) -> Iterator[tuple[str, Any]]:
    """The objects below keys that are data, `depth` levels of keys further down."""
    for key, inner in value.items():
        inner_path = f"{path}.{key}"
        if depth and isinstance(inner, dict):
            yield from _entries(inner, depth - 1, in_lists, inner_path)
        elif in_lists and isinstance(inner, list):
            yield from ((f"{inner_path}[{i}]", item) for i, item in enumerate(inner))
        else:  # an object, or what ought to be something else
            yield inner_path, None if depth or in_lists else inner


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
    lines += [*_selections_markdown(), ""]
    return "\n".join((*lines, f"Quantiles: {QUANTILE_DEFINITION}.")) + "\n"


def _selections_markdown() -> list[str]:
    """For each field of a step record that not every run can tell, what it holds by unit, ids and door."""
    columns: dict[str, frozenset[str]] = {}
    for unit in UNITS:
        for id_kind in ID_KINDS if unit != "expert" else ("position",):
            layers = [{"heads": 2}]
            name = unit if unit == "expert" else f"{unit}, {id_kind}"
            columns[name] = told({"unit": unit, "id_kind": id_kind, "layers": layers})
    lines = [
        "### What a step record holds, by unit and ids",
        "",
        "By the manifest's `selection`: `unit` and `id_kind`. Where its `missing` names what stands in the "
        "last column, the field is null too (`scores_topk`: absent). All other fields hold a value always.",
        "",
        f"| field | {' | '.join(columns)} | null where missing |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for field in STEP_FIELDS:
        if field.needs:
            lacking = "absent" if field.is_absent else "null"
            cells = ["value" if tells.issuperset(field.needs) else lacking for tells in columns.values()]
            missing = ", ".join(name for name in MISSING if name in field.needs)
            lines.append(f"| `{field.name}` | {' | '.join(cells)} | {missing} |")
    return lines


if __name__ == "__main__":
    print(records_markdown(), end="")
