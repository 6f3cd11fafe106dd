"""Derives one step's records from its capture, a whole step at once, and writes them as JSON lines.

Knows no thread and no file.

    step = deriver.derive(capture)         # StepRecords, arrays of B x L records
    data = StepLines().encode(step)        # one line per record
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.tiers.account import FetchAccount, StepReads, Tiers
from dsatrace.schema import Level
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.json_lines import Choice, Layout, LineEncoder, Optional, Runs
from dsatrace.trace.kernels import compile_kernels
from dsatrace.trace.kind import SelectionKind, engine_kind
from dsatrace.trace.overlap import NeedleCounts, count_needles
from dsatrace.trace.statistics import Scratch, StepStatistics, fused_statistics, request_major


@dataclasses.dataclass(frozen=True)
class StepRecords:
    """One step, derived: R = B x L records, request-major, of L sets per request (see `kind`)."""

    capture: StepCapture
    kind: SelectionKind
    stats: StepStatistics
    fetches: Mapping[str, FetchAccount]  # by tier name; {} where nothing is known of them
    level: Level
    block_size: int  # tokens
    index_bytes_per_token: int  # per token and layer
    positions: np.ndarray  # (M,) int32 ids, as recorded: ascending, or in canonical score order
    scores: np.ndarray | None  # (M,) float32, scores[i] belongs to positions[i]; None unless recorded
    needles: NeedleCounts | None = None  # None: no request's answer is known

    @property
    def num_sets(self) -> int:
        return len(self.capture.positions)

    @property
    def layer(self) -> np.ndarray:
        """(R,) int64."""
        return np.tile(self.kind.set_layers, len(self.capture.request_ids))

    @property
    def num_records(self) -> int:
        return len(self.stats.token_ptr) - 1

    @property
    def visible(self) -> np.ndarray:
        """(B,) int64: ids that each request's query can choose from."""
        return self.kind.visible(np.asarray(self.capture.seq_len, dtype=np.int64))

    @property
    def sparse(self) -> np.ndarray:
        """(R,) bool: there are more ids to choose from than are selected."""
        sparse: np.ndarray = np.greater.outer(self.visible, self.kind.top_k).ravel()
        return sparse

    @property
    def scan_bytes(self) -> np.ndarray:
        """(R,) int64: bytes of those keys; of a KV head its share."""
        num_heads = np.tile(self.kind.num_heads, len(self.capture.request_ids))
        num_bytes: np.ndarray = self.num_scanned * self.index_bytes_per_token // num_heads
        return num_bytes

    @property
    def num_scanned(self) -> np.ndarray:
        """(R,) int64: keys that the layer's indexer read, one per visible id; 0 without an indexer."""
        return np.outer(self.visible, self.kind.has_indexer).ravel()


class RecordDeriver:
    """Derives a run's steps. With `reuse` a step's arrays are valid until the next `derive`, and no step
    allocates them anew."""

    def __init__(
        self,
        config: TraceConfig,
        layout: CacheLayout,
        tiers: Tiers,
        reuse: bool = False,
        shared_layers: Mapping[int, int] | None = None,
        kind: SelectionKind | None = None,
    ) -> None:
        """Without `kind` the selections are the engine's. `shared_layers`: see `manifest.shared_layers`."""
        compile_kernels()  # now, not during the first step
        self._scratch = Scratch() if reuse else None
        self._config = config
        self._layout = layout
        self._tiers = tiers
        self._shared_layers = shared_layers or {}
        self._kind = kind

    def derive(self, capture: StepCapture) -> StepRecords:
        """Raises `ValueError` for a capture that no model can have produced."""
        config = self._config
        kind = self._kind
        if kind is None:
            num_layers, _, top_k = capture.positions.shape
            kind = engine_kind(num_layers, top_k, tuple(self._shared_layers.items()))
        else:
            _check_capture(capture, kind)
        stats_of_scores = capture.score_stats
        if stats_of_scores is not None and not np.isfinite(stats_of_scores[..., :3]).all():
            raise ValueError(f"forward {capture.forward_idx}: the indexer's scores are not finite numbers")
        cached = cached_blocks(capture)
        stats = fused_statistics(
            capture.positions, capture.seq_len, cached, config.block_size, self._scratch, kind
        )
        positions, scores = _as_recorded(capture, stats, config)
        needles = capture.needles if "positions" in kind.tells else ()
        return StepRecords(
            capture=capture,
            kind=kind,
            stats=stats,
            fetches=self._accounts(capture, stats, kind) if kind.holds("kv_fetch") else {},
            level=config.level,
            block_size=config.block_size,
            index_bytes_per_token=self._layout.index_bytes_per_token,
            positions=positions,
            scores=scores,
            needles=count_needles(needles, stats, capture.positions.shape[0]),
        )

    def _accounts(
        self, capture: StepCapture, stats: StepStatistics, kind: SelectionKind
    ) -> Mapping[str, FetchAccount]:
        reads = StepReads(
            seq_len=np.repeat(np.asarray(capture.seq_len, dtype=np.int64), capture.positions.shape[0]),
            block_size=self._config.block_size,
            batch_size=capture.batch_size,
            block_ids=stats.block_ids,
            block_ptr=stats.block_ptr,
            tokens_selected=stats.tokens_in_block,
            tokens=stats.tokens,
            token_ptr=stats.token_ptr,
            positions=capture.positions,
            fetches=capture.fetches,
        )
        try:
            accounts = self._tiers.accounts(reads)
        except ValueError as error:
            raise ValueError(f"forward {capture.forward_idx}: {error}") from error
        if (kind.num_heads == 1).all():
            return accounts
        num_heads = np.tile(kind.num_heads, len(capture.request_ids))
        return {
            name: dataclasses.replace(
                account,
                bytes_read=account.bytes_read // num_heads,
                bytes_useful=account.bytes_useful // num_heads,
            )
            for name, account in accounts.items()
        }


def _check_capture(capture: StepCapture, kind: SelectionKind) -> None:
    """Raises `ValueError` for a capture that is not of this kind."""
    batch = len(capture.request_ids)
    holds = {
        "positions": (capture.positions.shape, (len(kind.set_layers), batch, kind.max_width)),
        "score_stats": (capture.score_stats is not None, "scores" in kind.tells),
        "step_wall_us": (capture.step_wall_us is not None, "timing" in kind.tells),
        "step_synced": (capture.step_synced is not None, "timing" in kind.tells),
        "prefixes": (len(capture.prefixes), batch if kind.holds("prefix") else 0),
    }
    for name, (found, wanted) in holds.items():
        if found != wanted:
            said = f"{found}, and the run's kind says {wanted}"
            if isinstance(found, bool):
                said = "is there" if found else "is missing"
                said += f", and the run's kind says it is {'there' if wanted else 'missing'}"
            raise ValueError(f"forward {capture.forward_idx}: {name}: {said}")


def cached_blocks(capture: StepCapture) -> np.ndarray:
    """(B,) int64; 0 where nothing is known of prefixes."""
    if not capture.prefixes:
        return np.zeros(len(capture.request_ids), dtype=np.int64)
    return np.array([prefix.num_cached_blocks for prefix in capture.prefixes], dtype=np.int64)


def _as_recorded(
    capture: StepCapture, stats: StepStatistics, config: TraceConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions (N,) in their recorded order, and their scores where those are recorded."""
    if not config.needs_scores:
        return stats.ids, None
    if capture.scores is None:
        raise ValueError(
            "the trace needs scores (--trace-store-scores, --trace-keep-order) and the capture has none"
        )
    positions, scores = request_major(capture.positions), request_major(capture.scores)  # (R, K)
    chosen = positions >= 0
    # The last key sorts first: padding to the end, then score descending, then position ascending.
    keys = (positions, -scores, ~chosen) if config.keep_order else (positions, ~chosen)
    order = np.lexsort(keys, axis=-1)
    chosen = np.take_along_axis(chosen, order, axis=1)
    ordered = np.take_along_axis(positions, order, axis=1)[chosen].astype(np.int32, copy=False)
    if not config.store_scores:
        return ordered, None
    return ordered, np.take_along_axis(scores, order, axis=1)[chosen].astype(np.float32, copy=False)


class StepLines:
    """Writes steps as lines of `trace_steps.jsonl`, into one buffer."""

    def __init__(self) -> None:
        self._encoder = LineEncoder()

    def encode(self, step: StepRecords) -> memoryview:
        """One line per record; valid until the next call."""
        return self._encoder.encode(record_layout(step), step.num_records)


def record_layout(step: StepRecords) -> Layout:
    """The step's records in the schema's field order: a column where records differ, else a plain value."""
    capture, stats, kind = step.capture, step.stats, step.kind
    request, of_set = np.divmod(np.arange(step.num_records), step.num_sets)  # (R,) each
    seq_len = np.asarray(capture.seq_len, dtype=np.int64)[request]
    with_positions, with_blocks = step.level == "full", step.level != "stats"
    num_tokens, num_blocks = stats.num_tokens, stats.num_blocks
    first_block, end_block = stats.block_ptr[:-1], stats.block_ptr[1:]
    record = {
        "event": "dsa_topk",
        "request_id": Choice(capture.request_ids, request),
        "layer_id": kind.set_layers[of_set],
        "step_idx": np.asarray(capture.step_idx)[request],
        "seq_len_current": seq_len,
        **({"selected_token_pos": _of_ids(step, step.positions)} if with_positions else {}),
        "unique_token_pos_count": num_tokens,
        "offset_min": stats.offset_min,
        "offset_p50": stats.offset_p50,
        "offset_max": stats.offset_max,
        "block_size_tokens": step.block_size,
        **({"selected_block_ids": Runs(stats.block_ids, first_block, end_block)} if with_blocks else {}),
        "unique_blocks": num_blocks,
        "tokens_per_touched_block": {
            "mean": num_tokens / num_blocks,
            "p50": stats.tokens_p50,
            "p95": stats.tokens_p95,
        },
        "kv_fetch": {name: account.columns() for name, account in step.fetches.items()},
        "prefix": _prefix(step, request, with_blocks) if kind.holds("prefix") else None,
        **_scores(step, request, of_set),
        "forward_idx": capture.forward_idx,
        "step_wall_us": capture.step_wall_us,
        "step_synced": capture.step_synced,
        "phase": capture.phase,
        "path": Choice(("dense", "sparse"), step.sparse.astype(np.int64)),
        "kth_margin": _margin(step, request, of_set),
        "indexer_scan": {"tokens": step.num_scanned, "bytes_read": step.scan_bytes},
        **_of_set("source_layer", kind.set_sources, of_set),
        **_of_set("kv_head", kind.set_heads, of_set),
        **_other_ids(step, with_positions),
        **_needle(step),
    }
    return record | {name: None for name in kind.null_fields if name in record}


def _of_ids(step: StepRecords, values: np.ndarray) -> Runs:
    """One value per selected id."""
    return Runs(values, step.stats.id_ptr[:-1], step.stats.id_ptr[1:])


def _other_ids(step: StepRecords, with_ids: bool) -> dict[str, Any]:
    """Ids that are no token positions."""
    if not step.kind.holds("selected_ids"):
        return {}
    ids = {"selected_ids": _of_ids(step, step.positions)} if with_ids else {}
    return {**ids, "num_selected_ids": step.stats.num_ids}


def _prefix(step: StepRecords, request: np.ndarray, with_blocks: bool) -> dict[str, Any]:
    """Block ids ascend, so the touched prefix blocks are the first of them."""
    stats, prefixes = step.stats, step.capture.prefixes
    first, num_shared = stats.block_ptr[:-1], stats.num_prefix_blocks
    return {
        "prefix_cache_hit": Choice([prefix.hit for prefix in prefixes], request),
        "prefix_cached_blocks": np.array([prefix.num_cached_blocks for prefix in prefixes])[request],
        "prefix_key": Choice([prefix.key for prefix in prefixes], request),
        "intersection_ratio": num_shared / stats.num_blocks,
        **({"intersection_blocks": Runs(stats.block_ids, first, first + num_shared)} if with_blocks else {}),
    }


def _scores(step: StepRecords, request: np.ndarray, of_set: np.ndarray) -> dict[str, Any]:
    if step.scores is not None:
        return {"scores_topk": _of_ids(step, step.scores)}
    if step.capture.score_stats is None:
        return {"scores_stats": None}
    low, mean, high = step.capture.score_stats[of_set, request, :3].T
    return {"scores_stats": {"min": low, "mean": mean, "max": high}}


def _margin(step: StepRecords, request: np.ndarray, of_set: np.ndarray) -> np.ndarray | None:
    if step.capture.score_stats is None:
        return None
    return np.where(step.sparse, step.capture.score_stats[of_set, request, 3], np.float32("nan"))


def _of_set(name: str, values: Sequence[int | None], of_set: np.ndarray) -> dict[str, Any]:
    """A field that only some sets have."""
    return {} if values.count(None) == len(values) else {name: Optional(values, of_set)}


def _needle(step: StepRecords) -> dict[str, Any]:
    if step.needles is None:
        return {}
    tokens, selected = step.needles.tokens, step.needles.selected  # few pairs are distinct
    pairs, which = np.unique(np.stack([tokens, selected], axis=1), axis=0, return_inverse=True)
    values = [{"tokens": of, "selected": found} if of else None for of, found in pairs.tolist()]
    return {"needle": Optional(values, which.reshape(-1))}
