"""What writing a trace costs: ours against a plain script, and against numpy with orjson.

One step is 61 layers x 2048 tokens per request; selections are synthetic. Encoders take turns on the
same steps, and each writes its own file; the figure is the thread's CPU time, user and system. Then
what tracing takes from a model thread: one that waits 40 ms per step without the GIL, as for a GPU,
and the eager model on this CPU with tiny weights. Compare ratios: absolute times depend on the machine.

    python3 scripts/bench/trace_writer.py              # a minute or two
    python3 scripts/bench/trace_writer.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import torch
from machine import Rows, announce

from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.tiers.account import default_tiers
from dsatrace.model.batch import Batch, Span
from dsatrace.model.config import ModelArgs
from dsatrace.model.selection import Selection
from dsatrace.model.transformer import Transformer
from dsatrace.schema import LEVELS
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.estimate import KINDS, SyntheticSelections
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.observe import ForwardRecorder, ForwardRow, Hook, OnSelect, Slot, hooked
from dsatrace.trace.parquet.file import open_writer, write_parquet
from dsatrace.trace.parquet.steps import step_batch
from dsatrace.trace.records import RecordDeriver, StepLines
from dsatrace.trace.summary import Summary
from dsatrace.trace.tracer import Tracer
from dsatrace.units import size_text
from dsatrace.workloads.request import Request

NUM_LAYERS, TOP_K, BLOCK_SIZE = 61, 2048, 16
BATCHES, CONTEXTS = (1, 4), (32_768, 131_072)
LAYOUT = CacheLayout("demo", 1152, 132)
SECRET = b"a benchmark has no secrets......"
STEP_S = 0.040
TURN = 10  # steps in a row with tracing on, then off
EAGER_CONTEXT = 4096


def record_of(
    capture: StepCapture,
    b: int,
    layer: int,
    positions: Any,
    num_unique: int,
    *,
    offsets: Sequence[Any],  # least, median, most
    blocks: Any,
    in_block: Sequence[Any],  # tokens of a touched block: mean, median, 95th percentile
    runs: Any,
    shared: Any,
) -> dict[str, Any]:
    """What both plain ways write of one layer of request `b`, of what each has found."""
    assert capture.score_stats is not None
    low, mean, high, margin = capture.score_stats[layer, b].tolist()
    return {
        "event": "dsa_topk",
        "request_id": capture.request_ids[b],
        "layer_id": layer,
        "step_idx": capture.step_idx[b],
        "seq_len_current": int(capture.seq_len[b]),
        "selected_token_pos": positions,
        "unique_token_pos_count": num_unique,
        **dict(zip(("offset_min", "offset_p50", "offset_max"), offsets, strict=True)),
        "block_size_tokens": BLOCK_SIZE,
        "selected_block_ids": blocks,
        "unique_blocks": len(blocks),
        "tokens_per_touched_block": dict(zip(("mean", "p50", "p95"), in_block, strict=True)),
        "kv_fetch": {"hbm": {"hit_blocks": len(blocks), "read_ops": runs, "latency_us": 0.0}},
        "prefix": {
            "prefix_key": capture.prefixes[b].key,
            "intersection_ratio": len(shared) / len(blocks),
            "intersection_blocks": shared,
        },
        "scores_stats": {"min": low, "mean": mean, "max": high},
        "kth_margin": margin,
    }


def naive_lines(capture: StepCapture) -> str:
    """The first way one would write it: plain Python, a record at a time."""
    lines = []
    for b in range(len(capture.request_ids)):
        seq_len = int(capture.seq_len[b])
        for layer in range(capture.positions.shape[0]):
            positions = sorted(p for p in capture.positions[layer, b].tolist() if p >= 0)
            offsets = [seq_len - 1 - p for p in positions]
            per_block = Counter(p // BLOCK_SIZE for p in positions)
            blocks = sorted(per_block)
            shared = sorted(set(blocks) & set(range(capture.prefixes[b].num_cached_blocks)))
            counts = list(per_block.values())
            runs = 1 + sum(after != before + 1 for before, after in itertools.pairwise(blocks))
            record = record_of(
                *(capture, b, layer, positions, len(set(positions))),
                offsets=(min(offsets), statistics.median(offsets), max(offsets)),
                blocks=blocks,
                in_block=(
                    *(statistics.mean(counts), statistics.median(counts)),
                    statistics.quantiles(counts, n=20)[-1],
                ),
                runs=runs,
                shared=shared,
            )
            lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


def numpy_lines(capture: StepCapture) -> bytes:
    """The second way: one numpy sort for the whole step, and orjson a record at a time."""
    ordered = np.sort(capture.positions, axis=2)  # (L, B, K), all chosen: every context is longer than K
    num_layers, batch, k = ordered.shape
    block_of = ordered // BLOCK_SIZE
    is_first = np.diff(block_of, axis=2, prepend=-1) != 0
    starts = np.flatnonzero(is_first)
    touched, counts = block_of.ravel()[starts], np.diff(starts, append=ordered.size)
    new_runs = np.cumsum(np.diff(touched, prepend=-2) != 1)
    ends = np.cumsum(is_first.sum(axis=2))  # (L * B,)
    lines = []
    for b in range(len(capture.request_ids)):
        seq_len = int(capture.seq_len[b])
        for layer in range(num_layers):
            r = layer * batch + b
            low, high = int(ends[r - 1]) if r else 0, int(ends[r])
            positions, blocks, in_block = ordered[layer, b], touched[low:high], np.sort(counts[low:high])
            shared = blocks[: np.searchsorted(blocks, capture.prefixes[b].num_cached_blocks)]
            record = record_of(
                *(capture, b, layer, positions, k),
                offsets=tuple(seq_len - 1 - positions[i] for i in (-1, k // 2, 0)),
                blocks=blocks,
                in_block=(k / len(blocks), in_block[len(blocks) // 2], in_block[len(blocks) * 95 // 100]),
                runs=1 + new_runs[high - 1] - new_runs[low],
                shared=shared,
            )
            lines.append(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


class Encoders:
    """Each way to turn a step into bytes, with its own file."""

    def __init__(self, folder: Path) -> None:
        self._config = TraceConfig(out=folder)
        self._deriver = RecordDeriver(self._config, LAYOUT, default_tiers(LAYOUT), reuse=True)
        self._lines = StepLines()
        self._summary = Summary(self._config.compared_block_sizes, "synthetic")
        self.ways: dict[str, Callable[[StepCapture], bytes | memoryview]] = {
            "naive": lambda capture: naive_lines(capture).encode(),
            "numpy": numpy_lines,
            "ours": lambda capture: self._lines.encode(self._deriver.derive(capture)),
            "ours_with_summary": self.with_summary,
            "columns": self.columns,
            "parquet": self.parquet,
        }
        self._files = {name: (folder / name).open("wb", buffering=0) for name in self.ways}

    def columns(self, capture: StepCapture) -> bytes:
        """What the writer's thread does where a run writes Parquet: no bytes yet."""
        step_batch(self._deriver.derive(capture))
        return b""

    def parquet(self, capture: StepCapture) -> bytes:
        """That, and what the thread beside it does, were every step a part."""
        table, data = pa.Table.from_batches([step_batch(self._deriver.derive(capture))]), io.BytesIO()
        with open_writer(data, table.schema) as writer:
            writer.write_table(table)
        return data.getvalue()

    def with_summary(self, capture: StepCapture) -> memoryview:
        """All that the writer's thread does."""
        step = self._deriver.derive(capture)
        self._summary.add_step(step)
        return self._lines.encode(step)

    def check(self, capture: StepCapture) -> None:
        """All ways find the same sets."""
        ours = bytes(self.ways["ours"](capture)).splitlines()
        for way in ("naive", "numpy"):
            for mine, theirs in zip(ours, bytes(self.ways[way](capture)).splitlines(), strict=True):
                left, right = json.loads(mine), json.loads(theirs)
                for name in ("selected_token_pos", "selected_block_ids", "offset_min", "offset_max"):
                    assert left[name] == right[name], (way, name)

    def cpu_ms(self, captures: Sequence[StepCapture], rounds: int) -> dict[str, float]:
        """Median CPU milliseconds of a step, the ways taking turns; `write` is ours into its file.

        Apart, since it is the file system's work and the same for equal bytes.
        """
        spent: dict[str, list[float]] = {name: [] for name in (*self.ways, "write")}
        for i in range(rounds + 1):
            capture = captures[i % len(captures)]
            for name, way in self.ways.items():
                start = time.thread_time()
                encoded = way(capture)
                done = time.thread_time()
                self._files[name].write(encoded)
                if i:  # the first is for warming up
                    spent[name].append((done - start) * 1e3)
                    if name == "ours":
                        spent["write"].append((time.thread_time() - done) * 1e3)
        return {name: statistics.median(times) for name, times in spent.items()}


def bench_encoders(rounds: int, folder: Path) -> Iterator[dict[str, Any]]:
    """CPU time of a step and bytes of a record, by selection, context and batch."""
    for kind in KINDS:
        for context in CONTEXTS:
            for batch in BATCHES:
                source = SyntheticSelections(kind, NUM_LAYERS, TOP_K)
                captures = [source.capture([context] * batch, step, request_ids=()) for step in range(4)]
                encoders = Encoders(Path(tempfile.mkdtemp(dir=folder)))
                encoders.check(captures[0])
                cpu_ms = encoders.cpu_ms(captures, rounds)
                row = {"kind": kind, "context": context, "batch": batch, "cpu_ms": cpu_ms}
                yield row | {"times_naive": {name: cpu_ms["naive"] / ms for name, ms in cpu_ms.items()}}


def bench_bytes(folder: Path) -> Iterator[dict[str, Any]]:
    """Bytes per record at each level and format, over 8 steps of one request."""
    for kind in KINDS:
        for context in CONTEXTS:
            source = SyntheticSelections(kind, NUM_LAYERS, TOP_K)
            captures = [source.capture([context + step], step) for step in range(8)]
            num_records = len(captures) * NUM_LAYERS
            sizes = {"naive": sum(len(naive_lines(capture)) for capture in captures) / num_records}
            for level in LEVELS:
                deriver = RecordDeriver(TraceConfig(out=folder, level=level), LAYOUT, default_tiers(LAYOUT))
                lines = [bytes(StepLines().encode(deriver.derive(capture))) for capture in captures]
                sizes[f"jsonl_{level}"] = sum(map(len, lines)) / num_records
                parquet = folder / f"{kind}_{context}_{level}.parquet"
                records = (line for step in lines for line in step.splitlines())
                write_parquet(parquet, ((line, orjson.loads(line)) for line in records))
                sizes[f"parquet_{level}"] = parquet.stat().st_size / num_records
            yield {"kind": kind, "context": context, "bytes_a_record": sizes}


class TracedSteps:
    """Steps that are traced as the runner traces them, with the real writer behind."""

    def __init__(self, folder: Path, hook: Hook, batch: int, seq_len: int) -> None:
        run = RunInfo(model_config={}, layouts=(LAYOUT,), device="cpu", selections="synthetic")
        self.tracer = Tracer(TraceConfig(out=folder), run, secret=SECRET)
        self.recorder = ForwardRecorder(hook, NUM_LAYERS, batch, TOP_K, tracer=self.tracer)
        self.batch, self.seq_len, self.num_steps = batch, seq_len, 0
        for b in range(batch):
            self.tracer.add_request(Request(f"r{b}", (1, 2, 3), max_new_tokens=1))
        self.handover_ms: list[float] = []

    def step(self, forward: Callable[[], None]) -> float:
        """Runs one step; milliseconds of wall time, with the hand-over, which here includes the hooks."""
        began = time.perf_counter()
        rows = [ForwardRow(f"r{b}", b, self.seq_len, self.num_steps) for b in range(self.batch)]
        with self.recorder.recording("decode", rows, self.batch, self.batch):
            started = time.perf_counter()
            forward()
            ended = time.perf_counter()
        self.num_steps += 1
        now = time.perf_counter()
        self.handover_ms.append((started - began + now - ended) * 1e3)
        return (now - began) * 1e3


def bench_waiting_step(batch: int, context: int, turns: int, folder: Path) -> dict[str, Any]:
    """A step that sleeps, as a thread does that waits for a GPU; then its layers report."""
    selections = [_as_tensors(batch, context, step) for step in range(4)]
    reporting_ms: list[float] = []
    listening: list[OnSelect] = []

    @contextlib.contextmanager
    def hook(*callbacks: OnSelect) -> Iterator[None]:
        listening.extend(callbacks)
        yield
        listening.clear()

    traced = TracedSteps(folder, hook, batch, context)

    def forward() -> None:
        time.sleep(STEP_S)
        for on_select in listening:
            start = time.perf_counter()
            for layer, selection in enumerate(selections[traced.num_steps % len(selections)]):
                on_select(layer, selection)
            reporting_ms.append((time.perf_counter() - start) * 1e3)

    with traced.tracer:
        on, off = _in_turns(traced, forward, turns)
    # The first step is not in `handover_ms` either.
    blocked = [a + b for a, b in zip(reporting_ms[1:], traced.handover_ms, strict=True)]
    return {"batch": batch, "context": context, **_stretch(on, off), **_spread(blocked)}


def bench_eager_step(turns: int, folder: Path) -> dict[str, Any]:
    """61 layers of tiny weights that select 2048 of 4096 tokens, on this CPU; nothing waits for a GPU."""
    args = ModelArgs(
        vocab_size=64,
        dim=64,
        inter_dim=64,
        moe_inter_dim=16,
        n_layers=NUM_LAYERS,
        n_dense_layers=NUM_LAYERS,
        n_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        dtype="fp32",
        index_n_heads=4,
        index_head_dim=16,
        index_topk=TOP_K,
        index_fp8=False,
        index_hadamard=False,
        latent_fp8=False,
    )
    model = Transformer(args).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    cache = model.new_cache(EAGER_CONTEXT // 64, 64)
    for rows in (*cache.latent, *cache.index_k):  # as if a prompt had been read
        rows.normal_(generator=generator)
    batch = Batch.build([Span(range(cache.num_blocks), EAGER_CONTEXT - 1, [1])], cache.block_size)
    traced = TracedSteps(folder, partial(hooked, model.indexers), 1, EAGER_CONTEXT)

    def forward() -> None:
        model(batch, cache)

    with traced.tracer:
        on, off = _in_turns(traced, forward, turns)
    return {**_stretch(on, off), **_spread(traced.handover_ms)}


def _as_tensors(batch: int, context: int, step: int) -> list[Selection]:
    """One forward's selections, a layer each."""
    capture = SyntheticSelections("clustered", NUM_LAYERS, TOP_K, seed=step).capture([context] * batch, step)
    assert capture.scores is not None
    return [
        Selection(
            torch.from_numpy(p.astype(np.int64)), torch.from_numpy(s), torch.zeros(batch), torch.zeros(0)
        )
        for p, s in zip(capture.positions, capture.scores, strict=True)
    ]


def _in_turns(
    traced: TracedSteps, forward: Callable[[], None], turns: int
) -> tuple[list[float], list[float]]:
    """Wall milliseconds of steps with and without tracing."""
    on: list[float] = []
    off: list[float] = []
    traced.step(forward)
    traced.handover_ms.clear()
    for _ in range(turns):
        on += [traced.step(forward) for _ in range(TURN)]
        time.sleep(0.1)  # the writer empties its queue: not on the other's time
        for _ in range(TURN):
            start = time.perf_counter()
            forward()
            off.append((time.perf_counter() - start) * 1e3)
    return on, off


def _stretch(on: Sequence[float], off: Sequence[float]) -> dict[str, float]:
    medians = statistics.median(on), statistics.median(off)
    return {"on_ms": medians[0], "off_ms": medians[1], "stretch": medians[0] / medians[1] - 1}


def _spread(handover_ms: Sequence[float]) -> dict[str, float]:
    median, p95 = np.quantile(handover_ms, [0.5, 0.95]).tolist()
    return {"handover_ms_p50": median, "handover_ms_p95": p95}


def queue_bytes(batch: int) -> dict[str, int]:
    """The ring, and on a CPU the layers' tensors that waiting steps keep; at the default queue."""
    num_slots = TraceConfig(out=Path()).queue_steps + 2
    slot = Slot(NUM_LAYERS, batch, TOP_K, with_scores=False, device=None)
    held = slot.positions.nbytes + slot.stats.nbytes
    kept = NUM_LAYERS * batch * (TOP_K * (8 + 4) + 4)  # positions int64, scores and margin float32
    return {"batch": batch, "ring": num_slots * held, "kept_tensors": (num_slots - 1) * kept}


def shown(
    rows: Iterable[dict[str, Any]], title: str, by: str, cell: Callable[[dict[str, Any], str], str]
) -> list[dict[str, Any]]:
    """Prints each row as it comes: what it is of, then a cell for each entry of its `by`."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        of = [name for name in ("kind", "context", "batch") if name in row]
        if not kept:
            table = Rows(title, *(f"{name:9} " for name in of), *(f"{name:>15}" for name in row[by]))
        table.add(*(str(row[name]) for name in of), *(cell(row, name) for name in row[by]))
        kept.append(row)
    return kept


def encoder_cell(row: dict[str, Any], way: str) -> str:
    return f"{row['cpu_ms'][way]:.2f} ({row['times_naive'][way]:.0f}x)"


def bytes_cell(row: dict[str, Any], what: str) -> str:
    return f"{row['bytes_a_record'][what]:.0f}"


def show_step(table: Rows, name: str, batch: int, row: dict[str, Any]) -> None:
    table.add(
        name,
        str(batch),
        *(f"{row[key]:.2f}" for key in ("off_ms", "on_ms")),
        f"{row['stretch']:+.1%}",
        *(f"{row[key]:.3f}" for key in ("handover_ms_p50", "handover_ms_p95")),
    )


def main() -> int:
    """Measures, prints the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (%(default)s)")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    rounds, turns = (3, 3) if flags.quick else (9, 12)
    before = announce("numpy", "numba", "orjson", "pyarrow", "torch", threads=flags.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        title = f"one step of {NUM_LAYERS} layers x {TOP_K}: CPU ms (times the naive script)"
        encoders = shown(bench_encoders(rounds, folder), title, "cpu_ms", encoder_cell)
        sizes = shown(bench_bytes(folder), "bytes per record", "bytes_a_record", bytes_cell)
        title, step = "a step with tracing on against off: wall ms, medians", f"{'step':24} "
        table = Rows(title, step, "batch", "off", "on", "stretch", "hand-over p50", "p95")
        waiting = []
        for batch in BATCHES:
            row = bench_waiting_step(batch, CONTEXTS[0], turns, folder / f"waiting_{batch}")
            show_step(table, f"waits {STEP_S * 1e3:.0f} ms", batch, row)
            waiting.append(row)
        eager = bench_eager_step(turns, folder / "eager")
        show_step(table, f"eager CPU, context {EAGER_CONTEXT}", 1, eager)
    queues = [queue_bytes(batch) for batch in BATCHES]
    for queue in queues:
        ring, tensors = size_text(queue["ring"]), size_text(queue["kept_tensors"])
        print(f"queue at batch {queue['batch']}: {ring} of ring, at most {tensors} of tensors")
    about = before | {"load_after": [round(load, 1) for load in os.getloadavg()]}
    record = {"machine": about, "encoders": encoders, "bytes": sizes, "waiting": waiting, "eager": eager}
    print(json.dumps(record | {"queue_bytes": queues}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
