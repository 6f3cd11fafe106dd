"""How large a trace will be: made-up steps through the real encoders, counted and scaled.

An estimate for two kinds of selections; a model's are between them or near. They say nothing about
any model, whose numbers of layers and selected tokens are all that is known here.

- `clustered`: attention sinks (1/32 of the selection), recent tokens (1/4), hot spots that persist
  (2/3), and noise; a step keeps about 0.85 of the one before it;
- `uniform`: every position is as likely, each step anew: the worst case for a compressor.

    load = TraceLoad(num_layers=61, top_k=2048, context=32768, num_steps=1000, batch_size=4)
    estimate_sizes(load, "full")             # a Size per name of FORMATS
    source = SyntheticSelections("clustered", num_layers=61, top_k=2048, seed=0)
    capture = source.capture(seq_len=[32768], step_idx=0)
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
import pyarrow as pa

from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.prefix import RequestPrefix
from dsatrace.kv.tiers.account import default_tiers
from dsatrace.schema import LOST_RECORDS, PART_RECORDS, Level
from dsatrace.trace.capture import NUM_STATS, SPARE_STEPS, StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.kind import SelectionKind, engine_kind
from dsatrace.trace.parquet import replay_layout
from dsatrace.trace.parquet.columns import without_tiers
from dsatrace.trace.parquet.file import GROUP_BYTES, GROUP_RECORDS, open_writer, write_parquet
from dsatrace.trace.parquet.steps import SCHEMA, step_batch
from dsatrace.trace.records import RecordDeriver, StepLines

Kind = Literal["clustered", "uniform"]
KINDS: tuple[Kind, ...] = ("clustered", "uniform")

SPOT_TOKENS, SPOT_WIDTH = 32, 128  # selected tokens of a hot spot, and the positions they lie in
SPOT_SHARE = 2 / 3  # of the selection
SPOT_CHURN = 0.1  # share of the spots that a step draws anew
NOISE_SHARE = 0.03

SAMPLE_RECORDS = 512
FORMATS: Mapping[str, str] = {
    "jsonl": "as it is recorded",
    "parquet": "export --to parquet",
    "parquet, direct": "--trace-format parquet",
    "replay": "export --to replay",  # not at level stats, which holds no ids
}
DEMO_LAYOUT = CacheLayout("demo", latent_bytes_per_token=1152, index_bytes_per_token=132)


@dataclasses.dataclass(frozen=True)
class TraceLoad:
    """What will be traced: requests that begin at `context` and decode for `num_steps` steps."""

    num_layers: int
    top_k: int
    context: int  # tokens of a prompt
    num_steps: int  # decode steps per request: its generated tokens but the first
    batch_size: int  # requests at a time
    num_requests: int | None = None  # None: one batch
    block_size: int = 16  # tokens
    store_scores: bool = False  # at level full
    sample_rate: float = 1.0
    layout: CacheLayout = DEMO_LAYOUT  # only the number of its digits matters
    shared_layers: Mapping[int, int] = dataclasses.field(default_factory=dict)  # see `manifest.shared_layers`
    kind: SelectionKind | None = None  # of another door than the engine's: stands for layers and top-k

    @property
    def selections(self) -> SelectionKind:
        return self.kind or engine_kind(self.num_layers, self.top_k, tuple(self.shared_layers.items()))

    @property
    def num_sets(self) -> int:
        """Records of one request in one step."""
        return len(self.selections.set_layers)

    @property
    def requests(self) -> int:
        return self.batch_size if self.num_requests is None else self.num_requests

    @property
    def num_records(self) -> int:
        """One per request, step and set; with sampling, the mean."""
        return round(self.requests * self.num_steps * self.sample_rate) * self.num_sets

    @property
    def queue_slot_bytes(self) -> int:
        """Host memory of one step that waits for the writer."""
        row = 4 * (self.selections.max_width * (2 if self.store_scores else 1) + NUM_STATS)
        return self.num_sets * min(self.batch_size, self.requests) * row

    def ring_bytes(self, queue_steps: int) -> int:
        """Host memory of the ring that holds the queue's steps; the queue itself holds references."""
        return (queue_steps + SPARE_STEPS) * self.queue_slot_bytes

    @property
    def replay_groups(self) -> int:
        """Row groups of a layout for replay: whole layers of a request, or stretches of a long one."""
        least, most = replay_layout.GROUP_RECORDS
        num_layers = len(set(self.selections.set_layers.tolist()))
        of_layer = max(1, round(self.num_steps * self.sample_rate) * self.num_sets // num_layers)
        together = -(-least // of_layer)
        return self.requests * (-(-num_layers // together)) * (-(-of_layer * together // most))


@dataclasses.dataclass(frozen=True)
class Size:
    """The step records in one format: the smaller and the larger of the two kinds of selections."""

    format: str  # of FORMATS
    bytes_per_record: tuple[float, float]
    total_bytes: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Encoded records of one kind of selections."""

    lines: list[bytes]  # without newlines
    table: pa.Table  # the same records as columns
    seconds: float  # of deriving and encoding them, on this machine

    @property
    def line_bytes(self) -> float:
        return sum(len(line) + 1 for line in self.lines) / len(self.lines)

    @property
    def records_per_second(self) -> float:
        """What one writer thread derives and encodes as JSON lines on this machine."""
        return len(self.lines) / self.seconds

    @property
    def waiting_bytes(self) -> int:
        """Host memory of the most records that wait to be written as Parquet."""
        num_bytes: int = round(LOST_RECORDS * self.table.nbytes / len(self.table))
        return num_bytes


def estimate_sizes(load: TraceLoad, level: Level) -> list[Size]:
    """At one level, in each of `FORMATS`."""
    totals: dict[str, list[float]] = {name: [] for name in FORMATS}
    for kind in KINDS:
        sample, count = draw_sample(load, level, kind), load.num_records
        totals["jsonl"].append(count * sample.line_bytes)
        totals["parquet"].append(_exported_bytes(sample, count))
        totals["parquet, direct"].append(_columns_bytes(sample.table, count, count / PART_RECORDS))
        if level != "stats":
            table, keys = _laid_out(sample.table), replay_layout.KEYS
            totals["replay"].append(_columns_bytes(table, count, load.replay_groups, keys))
    return [_size(name, of_kinds, load.num_records) for name, of_kinds in totals.items() if of_kinds]


def _size(name: str, totals: Sequence[float], num_records: int) -> Size:
    low, high = min(totals), max(totals)
    return Size(name, (low / max(1, num_records), high / max(1, num_records)), (low, high))


def draw_sample(load: TraceLoad, level: Level, kind: Kind) -> Sample:
    """About `SAMPLE_RECORDS` records, at most the load's, spread over its steps; one request per step."""
    config = TraceConfig(
        out=Path("unused"),
        block_size=load.block_size,
        level=level,
        store_scores=load.store_scores and level == "full",
    )
    tiers = default_tiers(load.layout)
    deriver = RecordDeriver(config, load.layout, tiers, kind=load.selections)
    encoder = StepLines()
    source = SyntheticSelections(kind, selections=load.selections)
    num_steps = max(2, min(load.num_steps, -(-SAMPLE_RECORDS // load.num_sets)))
    lines: list[bytes] = []
    batches: list[pa.RecordBatch] = []
    seconds = 0.0
    for i in range(num_steps):
        step = i * load.num_steps // num_steps
        request = i * load.requests // num_steps
        capture = source.capture(
            [load.context + step + 1],
            step,
            request_ids=[f"r{request}"],
            forward_idx=step + request // load.batch_size * load.num_steps,
            batch_size=min(load.batch_size, load.requests),
        )
        start = time.perf_counter()
        derived = deriver.derive(capture)
        text = encoder.encode(derived)
        seconds += (time.perf_counter() - start) * (i > 0)  # the first one warms up
        lines += bytes(text).splitlines()
        batches.append(step_batch(derived))
    # Of n steps n - 1 were timed.
    columns = pa.Table.from_batches(batches).select(without_tiers(SCHEMA).names)
    return Sample(lines, columns, seconds * num_steps / (num_steps - 1))


def _exported_bytes(sample: Sample, num_records: int) -> float:
    """Two files of different sizes separate a record's bytes from a row group's."""
    half = len(sample.lines) // 2
    small, large = _file_bytes(sample.lines[:half]), _file_bytes(sample.lines)
    a_record = (large - small) / (len(sample.lines) - half)
    a_group = max(0.0, large - a_record * len(sample.lines))
    records_a_group = min(GROUP_RECORDS, GROUP_BYTES / sample.line_bytes)
    return a_record * num_records + a_group * max(1.0, num_records / records_a_group)


def _file_bytes(lines: Sequence[bytes]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.parquet"
        write_parquet(path, ((line, orjson.loads(line)) for line in lines), has_tiers=False)
        return path.stat().st_size


def _columns_bytes(
    table: pa.Table, num_records: int, num_groups: float, statistics: Sequence[str] = ()
) -> float:
    """Three files separate a record's bytes, a row group's and a file's."""
    half = len(table) // 2

    def size_of(*groups: pa.Table) -> int:
        file = io.BytesIO()
        with open_writer(file, table.schema, statistics=statistics) as writer:
            for group in groups:
                writer.write_table(group, row_group_size=len(group))
        return file.getbuffer().nbytes

    first, whole = table.slice(0, half), size_of(table)
    a_record = (whole - size_of(first)) / (len(table) - half)
    a_group = size_of(first, table.slice(half)) - whole
    return whole + a_record * (num_records - len(table)) + a_group * (max(1.0, num_groups) - 1)


def _laid_out(table: pa.Table) -> pa.Table:
    """As one request's records."""
    name = pa.array(["r0"] * len(table))
    table = table.set_column(table.schema.names.index("request_id"), "request_id", name)
    return table.sort_by([("layer_id", "ascending"), ("step_idx", "ascending")])


class SyntheticSelections:
    """Selections of `num_layers` layers over successive steps; the same seed gives the same ones.

    `selections` of another kind stand for the layers and for `top_k`.
    """

    def __init__(
        self,
        kind: Kind,
        num_layers: int = 1,
        top_k: int = 1,
        seed: int = 0,
        selections: SelectionKind | None = None,
    ) -> None:
        self._kind = kind
        self._selections = selections or engine_kind(num_layers, top_k)
        self._rng = np.random.default_rng(seed)
        self._spots: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # by set and request

    def capture(
        self,
        seq_len: Sequence[int],  # (B,) positions visible to each request's query
        step_idx: int,
        *,
        request_ids: Sequence[str] = (),
        forward_idx: int | None = None,
        batch_size: int | None = None,
    ) -> StepCapture:
        """One decode step, with scores, as the model thread would hand it over."""
        of = self._selections
        shape = len(of.set_layers), len(seq_len), of.max_width
        positions = np.full(shape, -1, dtype=np.int32)
        num_visible = of.visible(np.array(seq_len, dtype=np.int64)).tolist()
        for s, top_k in enumerate(of.top_k.tolist()):
            for b, visible in enumerate(num_visible):
                chosen = self._choose(s, b, visible, top_k)
                positions[s, b, : len(chosen)] = self._rng.permutation(chosen)
        scores = -np.sort(-self._rng.normal(2, 1, shape).astype(np.float32))
        stats = np.stack(
            [scores.min(-1), scores.mean(-1), scores.max(-1), self._rng.exponential(0.01, shape[:2])],
            axis=-1,
        ).astype(np.float32)
        for s, source in of.source_sets.items():
            for of_sets in (positions, scores, stats):
                of_sets[s] = of_sets[source]
        batch = shape[1]
        num_prefixes = batch if of.holds("prefix") else 0
        keys = [f"{self._rng.integers(1 << 62):016x}" for _ in range(num_prefixes)]
        step_wall_us = float(self._rng.uniform(20_000, 60_000))
        return StepCapture(
            phase="decode",
            request_ids=tuple(request_ids) or tuple(f"r{b}" for b in range(batch)),
            step_idx=(step_idx,) * batch,
            seq_len=np.array(seq_len, dtype=np.int32),
            batch_size=batch if batch_size is None else batch_size,
            positions=positions,
            score_stats=stats if of.holds("kth_margin") else None,
            scores=scores,
            prefixes=tuple(RequestPrefix(0, key) for key in keys),
            forward_idx=step_idx if forward_idx is None else forward_idx,
            step_wall_us=step_wall_us if of.holds("step_wall_us") else None,
            step_synced=True if of.holds("step_wall_us") else None,
        )

    def _choose(self, s: int, request: int, visible: int, top_k: int) -> np.ndarray:
        """min(top_k, visible) distinct ids."""
        if visible <= top_k:
            return np.arange(visible)
        if self._kind == "uniform":
            return self._rng.choice(visible, top_k, replace=False)
        num_noise = int(top_k * NOISE_SHARE)
        wanted = [
            np.arange(top_k // 32),
            np.arange(visible - top_k // 4, visible),
            self._spot_ids(s, request, visible, top_k),
        ]
        regular = np.unique(np.concatenate(wanted))
        regular = self._rng.permutation(regular)[: top_k - num_noise]
        rest = np.setdiff1d(np.arange(visible), regular, assume_unique=True)
        return np.concatenate([regular, self._rng.choice(rest, top_k - len(regular), replace=False)])

    def _spot_ids(self, s: int, request: int, visible: int, top_k: int) -> np.ndarray:
        """Ids of the hot spots, of which every step draws some anew."""
        rng, num_spots = self._rng, max(1, int(top_k * SPOT_SHARE / SPOT_TOKENS))
        last_start = max(1, visible - SPOT_WIDTH)
        if (s, request) not in self._spots:
            offsets = rng.random((num_spots, SPOT_WIDTH)).argsort(1)[:, :SPOT_TOKENS]
            self._spots[s, request] = (rng.integers(last_start, size=num_spots), offsets)
        starts, offsets = self._spots[s, request]  # (spots,) positions; (spots, tokens) from there
        new = rng.random(num_spots) < SPOT_CHURN
        starts[new] = rng.integers(last_start, size=int(new.sum()))
        tokens = (starts[:, None] + offsets).ravel()
        return tokens[tokens < visible]
