"""How large a trace will be: made-up steps through the real encoders, counted and scaled.

An estimate, for two kinds of selections, clustered and uniform; a model's own lie between
them or near. Knows a model's numbers of layers and selected tokens, not the model.

    load = TraceLoad(num_layers=61, top_k=2048, context=32768, num_steps=1000, batch_size=4)
    estimate_sizes(load, "full")             # [Size("jsonl", 13600, 14700, ...), Size("parquet", ...)]
    load.num_records, load.ring_bytes
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.tiers.account import default_tiers
from dsatrace.schema import Level
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.parquet.file import GROUP_BYTES, GROUP_RECORDS, write_parquet
from dsatrace.trace.records import RecordDeriver, StepLines
from dsatrace.trace.synthetic import KINDS, Kind, SyntheticSelections

SAMPLE_RECORDS = 512
NUM_STATS = 4  # float32 a layer and row, beside the positions: min, mean, max, margin
SPARE_SLOTS = 2  # of the ring, beside those that wait: one being filled, one being written

DEMO_LAYOUT = CacheLayout("demo", latent_bytes_per_token=1152, index_bytes_per_token=132)


@dataclasses.dataclass(frozen=True)
class TraceLoad:
    """What will be traced. Each request begins at `context` and is decoded for `num_steps` steps."""

    num_layers: int
    top_k: int
    context: int  # tokens of a prompt
    num_steps: int  # decode steps a request: its generated tokens but the first
    batch_size: int  # requests at a time
    num_requests: int | None = None  # None: one batch
    block_size: int = 16  # tokens
    store_scores: bool = False  # at level full
    sample_rate: float = 1.0
    layout: CacheLayout = DEMO_LAYOUT  # of which only the digits matter
    shared_layers: Mapping[int, int] = dataclasses.field(default_factory=dict)  # see `manifest.shared_layers`

    @property
    def requests(self) -> int:
        return self.batch_size if self.num_requests is None else self.num_requests

    @property
    def num_records(self) -> int:
        """A request, step and layer each; with sampling, in the mean."""
        return round(self.requests * self.num_steps * self.sample_rate) * self.num_layers

    @property
    def queue_slot_bytes(self) -> int:
        """Host memory of one step that waits for the writer."""
        row = 4 * (self.top_k * (2 if self.store_scores else 1) + NUM_STATS)
        return self.num_layers * min(self.batch_size, self.requests) * row

    def ring_bytes(self, queue_steps: int) -> int:
        """Host memory of the ring the queue's steps lie in; the queue itself holds references."""
        return (queue_steps + SPARE_SLOTS) * self.queue_slot_bytes


@dataclasses.dataclass(frozen=True)
class Size:
    """The step records in one format: from clustered to uniform selections, the smaller first."""

    format: str  # jsonl or parquet
    bytes_per_record: tuple[float, float]
    total_bytes: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Encoded records of one kind."""

    lines: list[bytes]  # without newlines
    seconds: float  # of deriving and encoding them, on this machine

    @property
    def line_bytes(self) -> float:
        return sum(len(line) + 1 for line in self.lines) / len(self.lines)


def estimate_sizes(load: TraceLoad, level: Level) -> list[Size]:
    """JSONL and Parquet at one level."""
    samples = [draw_sample(load, level, kind) for kind in KINDS]
    jsonl = [load.num_records * sample.line_bytes for sample in samples]
    parquet = [_parquet_bytes(sample, load.num_records) for sample in samples]
    return [_size("jsonl", jsonl, load.num_records), _size("parquet", parquet, load.num_records)]


def _size(name: str, totals: Sequence[float], num_records: int) -> Size:
    low, high = min(totals), max(totals)
    return Size(name, (low / max(1, num_records), high / max(1, num_records)), (low, high))


def records_per_second(load: TraceLoad, level: Level = "full") -> float:
    """What one writer thread derives and encodes on this machine, clustered selections."""
    sample = draw_sample(load, level, "clustered")
    return len(sample.lines) / sample.seconds


def draw_sample(load: TraceLoad, level: Level, kind: Kind, num_records: int = SAMPLE_RECORDS) -> Sample:
    """About so many records, no more than the load has, spread over its steps; one request a step."""
    config = TraceConfig(
        out=Path("unused"),
        block_size=load.block_size,
        level=level,
        store_scores=load.store_scores and level == "full",
    )
    tiers = default_tiers(load.layout)
    deriver = RecordDeriver(config, load.layout, tiers, shared_layers=load.shared_layers)
    encoder = StepLines()
    source = SyntheticSelections(kind, load.num_layers, load.top_k, shared_layers=load.shared_layers)
    num_steps = max(2, min(load.num_steps, -(-num_records // load.num_layers)))
    lines: list[bytes] = []
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
        text = encoder.encode(deriver.derive(capture))
        seconds += (time.perf_counter() - start) * (i > 0)  # the first one warms up
        lines += bytes(text).splitlines()
    # Of n steps n - 1 were timed.
    return Sample(lines, seconds * num_steps / (num_steps - 1))


def _parquet_bytes(sample: Sample, num_records: int) -> float:
    """Two sizes of file tell a record's bytes from a row group's."""
    half = len(sample.lines) // 2
    small, large = _file_bytes(sample.lines[:half]), _file_bytes(sample.lines)
    a_record = (large - small) / (len(sample.lines) - half)
    a_group = max(0.0, large - a_record * len(sample.lines))
    records_a_group = min(GROUP_RECORDS, GROUP_BYTES / sample.line_bytes)
    return a_record * num_records + a_group * max(1.0, num_records / records_a_group)


def _file_bytes(lines: Sequence[bytes]) -> int:
    handle, name = tempfile.mkstemp(suffix=".parquet")
    os.close(handle)
    try:
        write_parquet(Path(name), ((line, orjson.loads(line)) for line in lines))
        return Path(name).stat().st_size
    finally:
        Path(name).unlink()
