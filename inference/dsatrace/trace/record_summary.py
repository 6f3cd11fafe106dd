"""A summary fed with stored records instead of live captures.

At level full a forward's records hold its whole capture, so the live summary's `add_step` counts.
Below it the positions are gone: `add_columns` counts what is left, and `take_stored` adds the rest
from the run's last summary.json. Knows no file.

    shape = RunShape(block_size=16, kind=kind, index_bytes=132)
    summary = RecordSummary((16, 32, 64), "model", shape, serving=None)
    summary.add_forward(records)               # all records of one forward, level full
    summary.to_json("complete")
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dsatrace.kv.prefix import RequestPrefix
from dsatrace.kv.tiers.account import FetchAccount, OffloadedAccount
from dsatrace.schema import FETCH_TOTALS, OFFLOADED_FETCH, TIER_NAMES
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.histogram import Histogram
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.overlap import NeedleCounts, recalls
from dsatrace.trace.records import StepRecords, cached_blocks
from dsatrace.trace.statistics import count_blocks, fused_statistics
from dsatrace.trace.summary import Summary, context_blocks, recency_blocks, uniform_blocks
from dsatrace.trace.unfinished import Shares

NUMBER_FIELDS = (
    *("layer_id", "seq_len_current", "step_idx", "forward_idx", "step_wall_us", "offset_max"),
    "unique_blocks",
    *("prefix.intersection_ratio", "indexer_scan.bytes_read"),
    *(f"kv_fetch.{tier}.{name}" for tier in TIER_NAMES for name in FETCH_TOTALS),
    *("needle.tokens", "needle.selected"),
)
"""What `add_columns` reads at level stats: numbers only, None or nan where one is absent."""

BLOCK_FIELDS = (
    *NUMBER_FIELDS,
    *("request_id", "selected_block_ids", "prefix.prefix_cached_blocks", "prefix.intersection_blocks"),
)
"""What `add_columns` reads at level blocks."""

TIER_FIELDS = tuple(f"kv_fetch.{tier}.{name}" for tier in TIER_NAMES for name in OFFLOADED_FETCH)
"""Numbers that `add_columns` also reads where the manifest has `tiers`."""

FULL_FIELDS = (
    *("request_id", "layer_id", "step_idx", "seq_len_current", "selected_token_pos", "kv_fetch", "prefix"),
    *("forward_idx", "step_wall_us", "phase", "kv_head", "selected_ids", "needle"),
)
"""What `add_forward` reads."""

Record = Mapping[str, Any]
Columns = Mapping[str, Any]  # by dotted path, a sequence with a value for each record


@dataclasses.dataclass(frozen=True)
class RunShape:
    """What the manifest says that records are counted with."""

    block_size: int  # tokens
    kind: SelectionKind  # of the selections
    index_bytes: int  # per token and layer
    offloaded: bool = False  # the manifest has `tiers`
    goes_on: bool = False  # the manifest has `answer_end`; columns of the records then tell `request_id`

    @property
    def top_k(self) -> int:
        return self.kind.max_width


class RecordSummary(Summary):
    """A `Summary` of one run's records, in the order of the file."""

    def __init__(
        self,
        compared_block_sizes: tuple[int, ...],
        selections: str,
        shape: RunShape,
        serving: Mapping[str, Any] | None,
    ) -> None:
        kind = None if shape.kind.is_exact else shape.kind
        offloaded, goes_on = shape.offloaded, shape.goes_on
        super().__init__(
            compared_block_sizes, selections, serving, offloaded=offloaded, kind=kind, goes_on=goes_on
        )
        self._shape = shape
        self._forward_idx: int | None = None
        self._contexts = Histogram()  # positions visible to sparse records below level full

    @property
    def sets(self) -> list[tuple[int, int | None]]:
        """(layer, KV head) of the records of one request in one forward."""
        kind = self._shape.kind
        return list(zip(kind.set_layers.tolist(), kind.set_heads, strict=True))

    @property
    def num_sets(self) -> int:
        return len(self._shape.kind.set_layers)

    def add_forward(self, records: Sequence[Record]) -> None:
        """Takes all full records of one forward, request by request, set by set."""
        first, kind = records[0], self._shape.kind
        rows = records[:: self.num_sets]
        capture = StepCapture(
            phase=first["phase"],
            request_ids=tuple(record["request_id"] for record in rows),
            step_idx=tuple(record["step_idx"] for record in rows),
            seq_len=np.array([record["seq_len_current"] for record in rows], dtype=np.int32),
            batch_size=len(rows),
            positions=_ids(records, kind),
            score_stats=None,
            scores=None,
            prefixes=tuple(
                RequestPrefix(record["prefix"]["prefix_cached_blocks"], "")
                for record in (rows if kind.holds("prefix") else ())
            ),
            forward_idx=first["forward_idx"],
            step_wall_us=first["step_wall_us"],
            step_synced=True,
        )
        block_size, tiers = self._shape.block_size, TIER_NAMES if kind.holds("kv_fetch") else ()
        cached = cached_blocks(capture)
        stats = fused_statistics(capture.positions, capture.seq_len, cached, block_size, kind=kind)
        self.add_step(
            StepRecords(
                capture=capture,
                kind=kind,
                stats=stats,
                fetches={name: _account(records, name, self._shape.offloaded) for name in tiers},
                level="full",
                block_size=block_size,
                index_bytes_per_token=self._shape.index_bytes,
                positions=stats.ids,
                scores=None,
                needles=_needles(records),
            )
        )

    def add_columns(self, columns: Columns) -> None:
        """Takes records below level full, as columns, in pieces of any length."""
        num_blocks = np.asarray(columns["unique_blocks"])
        self.counts["records"] += len(num_blocks)
        self.dense["unique_blocks"].add(num_blocks)
        self.ratios.add(np.asarray(columns["prefix.intersection_ratio"]).tolist())
        for tier, totals in self.fetch.items():
            for name in totals:
                totals[name] += int(np.sum(columns[f"kv_fetch.{tier}.{name}"]))
        self.scan_bytes += int(np.sum(columns["indexer_scan.bytes_read"]))
        self._count_forwards(columns)
        if "selected_block_ids" in columns:
            self._touch_blocks(columns)
        self._add_sparse_columns(columns, num_blocks)

    def take_stored(self, stored: Mapping[str, Any], level: Literal["blocks", "stats"]) -> None:
        """Call after the last columns: adds what they do not hold from the run's summary.json."""
        self._add_baselines()
        for name in ("tokens_per_touched_block", "offsets"):
            self.dense[name].add_json(stored["histograms"][name])
        for at_size in self.blocks_at:
            if not self._tells_blocks_at(at_size.block_size, level):
                at_size.touched.add_json(stored["histograms"][f"unique_blocks_at_{at_size.block_size}"])
        self.overlap.step.add_json(stored["step_overlap"], self._shape.top_k)
        self.overlap.layer.add_json(stored["layer_overlap"], self._shape.top_k)
        if "unfinished" in stored:
            sizes = [at_size.block_size for at_size in self.blocks_at]
            self.shares = Shares.from_json(sizes, stored["unfinished"], self._shape.top_k)
        if level == "stats":
            self._hot.update(stored["prefix_hot_blocks"])

    def name_requests(self, prefix: str) -> None:
        """Puts `prefix` before every request id, so that merged runs keep their requests apart."""
        self._hot = {f"{prefix}/{name}": hot for name, hot in self._hot.items()}
        self._running = {f"{prefix}/{name}": touches for name, touches in self._running.items()}

    def _count_forwards(self, columns: Columns) -> None:
        forwards = np.asarray(columns["forward_idx"])
        before = forwards[0] - 1 if self._forward_idx is None else self._forward_idx
        starts = np.flatnonzero(np.diff(forwards, prepend=before))
        self._forward_idx = int(forwards[-1])
        decode = np.asarray(columns["step_idx"])[starts] >= 0
        self.counts["steps"] += int(decode.sum())
        self.counts["prefills"] += int((~decode).sum())
        self.step_us.add([round(us) for us in np.asarray(columns["step_wall_us"])[starts[decode]].tolist()])

    def _touch_blocks(self, columns: Columns) -> None:
        names = ("request_id", "prefix.prefix_cached_blocks", "prefix.intersection_blocks")
        for request_id, num_cached, blocks in zip(*(columns[name] for name in names), strict=True):
            if num_cached:
                touched = np.array(blocks, dtype=np.int64)
                self._touch(request_id, np.bincount(touched, minlength=num_cached))

    def _add_sparse_columns(self, columns: Columns, num_blocks: np.ndarray) -> None:
        seq_len = np.asarray(columns["seq_len_current"], dtype=np.int64)
        sparse = seq_len > self._shape.top_k
        if not sparse.any():
            return
        self.counts["sparse_records"] += int(sparse.sum())
        # The newest k positions reach back exactly k - 1.
        self.sparse_active += int((np.asarray(columns["offset_max"])[sparse] != self._shape.top_k - 1).sum())
        self._contexts.add(seq_len[sparse])
        ids = list(itertools.compress(columns.get("selected_block_ids", ()), sparse.tolist()))
        pointers = np.array([0, *itertools.accumulate(map(len, ids))])
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, pointers[-1])
        self._add_needle_columns(columns, seq_len, sparse)
        for at_size in self.blocks_at:
            if at_size.block_size == self._shape.block_size:
                at_size.touched.add(num_blocks[sparse])
            elif ids and self._tells_blocks_at(at_size.block_size, "blocks"):
                factor = at_size.block_size // self._shape.block_size
                at_size.touched.add(count_blocks(flat, pointers, factor))

    def _add_needle_columns(self, columns: Columns, seq_len: np.ndarray, sparse: np.ndarray) -> None:
        tokens, selected = (
            np.nan_to_num(np.asarray(columns[f"needle.{name}"], dtype=np.float64)).astype(np.int64)
            for name in ("tokens", "selected")
        )
        decode = np.asarray(columns["step_idx"]) >= 0
        layer = np.asarray(columns["layer_id"])
        num_tokens = np.full(len(layer), self._shape.top_k)
        found = recalls(NeedleCounts(tokens, selected), layer, seq_len, num_tokens, sparse & decode)
        nobody = [""] * len(found)  # whose they are counts only where answers end before their requests
        self.add_recalls(found, columns.get("request_id", nobody), columns["step_idx"])

    def _add_baselines(self) -> None:
        """Once per context length, so that the sums do not depend on the pieces."""
        seq_len, counts = (np.array(part, dtype=np.int64) for part in self._contexts.items())
        for at_size in self.blocks_at:
            size, k = at_size.block_size, self._shape.top_k
            at_size.recency.add_counted(recency_blocks(seq_len, k, size), counts)
            at_size.context.add_counted(context_blocks(seq_len, size), counts)
            at_size.uniform_sum.add(float(uniform_blocks(seq_len, k, size) @ counts))

    def _tells_blocks_at(self, size: int, level: str) -> bool:
        """Whether a record of the level says how many blocks of `size` it touches."""
        own_size = self._shape.block_size
        return size == own_size or (level == "blocks" and size % own_size == 0)


def _ids(records: Sequence[Record], kind: SelectionKind) -> np.ndarray:
    """(L, B, K) int32 as a capture holds them, -1 where there is none."""
    num_sets, name = len(kind.set_layers), kind.ids_field
    ids = np.full((num_sets, len(records) // num_sets, kind.max_width), -1, dtype=np.int32)
    for r, record in enumerate(records):
        b, s = divmod(r, num_sets)
        selected = record[name]
        ids[s, b, : len(selected)] = selected
    return ids


def _needles(records: Sequence[Record]) -> NeedleCounts | None:
    """The records' counts of their answers' tokens, as stored."""
    stored = [record.get("needle") for record in records]
    if not any(stored):
        return None
    tokens, selected = (
        np.array([one[name] if one else 0 for one in stored]) for name in ("tokens", "selected")
    )
    return NeedleCounts(tokens, selected)


def _account(records: Sequence[Record], tier: str, offloaded: bool) -> FetchAccount:
    """The records' accounts of a tier, as stored."""
    stored = [record["kv_fetch"][tier] for record in records]
    names = (*FETCH_TOTALS, "latency_us", *(OFFLOADED_FETCH if offloaded else ()))
    columns = {name: np.array([account[name] for account in stored]) for name in names}
    kind = OffloadedAccount if offloaded else FetchAccount
    return kind(**columns, batch_size=stored[0]["batch_size"], latency_kind=stored[0]["latency_kind"])


def columns_of(records: Sequence[Record], fields: Sequence[str]) -> dict[str, list[Any]]:
    """The records' values by dotted path, None where a record has none."""
    columns: dict[str, list[Any]] = {}
    for path in fields:
        values: list[Any] = list(records)
        for key in path.split("."):
            values = [None if value is None else value.get(key) for value in values]
        columns[path] = values
    return columns
