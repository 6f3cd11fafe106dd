"""A long run in bounded memory: writes N records through the real sinks, verifies and summarizes them.

Selections are made up (evenly spread, 32K context), four requests are served at a time. Each stage
runs in its own process; its time and peak memory are printed. Says nothing about any model. The
tests run a small one.

    python3 scripts/bench/long_run.py --records 1000000 --level stats
    python3 scripts/bench/long_run.py --records 50000 --level full
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))

from dsatrace.commands.progress import bytes_bar, records_counter
from dsatrace.errors import exits_cleanly
from dsatrace.files import write_json
from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.prefix import RequestPrefix
from dsatrace.kv.tiers.fetches import HBM, LOCAL, NUM_TIERS, StepFetches
from dsatrace.schema import LEVELS, MANIFEST_FILE, STEPS_FILE, Level
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import PoolSettings, RunInfo, TierSettings, manifest
from dsatrace.trace.records import RecordDeriver
from dsatrace.trace.request_facts import RequestFacts, request_line
from dsatrace.trace.summarize import summarize_runs
from dsatrace.trace.summary import Summary
from dsatrace.trace.tracer import tiers_of
from dsatrace.trace.writer import open_sinks
from dsatrace.units import size_text
from dsatrace.verify.run import verify
from dsatrace.workloads.request import Request

LAYOUT = CacheLayout("demo", 1152, 132)
STEPS_A_REQUEST = 64
OFFLOADED = TierSettings(
    granularity="block",
    unit_tokens=16,
    unit_bytes=16 * LAYOUT.latent_bytes_per_token,
    policy="lru",
    prefetch="none",
    on_error="recompute",
    index_keys="hbm",
    hbm_blocks=8192,
    local_pool=PoolSettings("ram", None, "measured"),
)
Advance = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One step: `num_layers` x `batch` records of `top_k` tokens."""

    num_layers: int = 61
    batch: int = 4
    top_k: int = 2048
    num_prompt_tokens: int = 32768
    num_step_times: int = 10_000  # different ones, in us: their histogram grows until it has them all

    @property
    def records_a_step(self) -> int:
        return self.num_layers * self.batch


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000, help="at least (default: %(default)s)")
    parser.add_argument("--level", choices=LEVELS, default="stats", help="default: %(default)s")
    parser.add_argument("--keep", type=Path, help="folder for the run, kept; a temporary one otherwise")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="dsatrace-long-") as temporary:
        folder = args.keep or Path(temporary) / "run"
        for stage in (write_stage, verify_stage, summarize_stage):
            text, seconds, peak_mib = in_own_process(stage, folder, args.records, args.level)
            name = stage.__name__.removesuffix("_stage")
            print(f"{name:10} {seconds:8.1f} s {peak_mib:8.0f} MiB peak   {text}", flush=True)
    return 0


def write_stage(folder: Path, num_records: int, level: Level) -> str:
    with records_counter("write") as advance:
        written = write_run(folder, num_records, level, Shape(), advance)
    size = (folder / STEPS_FILE).stat().st_size
    return f"{written} records of level {level}, {size_text(size)}, {size / written:.0f} bytes per record"


def verify_stage(folder: Path, num_records: int, level: Level) -> str:
    with bytes_bar("verify", folder / STEPS_FILE) as advance:
        return verify(folder, advance).text().splitlines()[0]


def summarize_stage(folder: Path, num_records: int, level: Level) -> str:
    with records_counter("summarize") as advance:
        record = summarize_runs([folder], advance)
    return f"{record['counts']['records']} records again"


def write_run(
    folder: Path,
    num_records: int,
    level: Level,
    shape: Shape,
    advance: Advance = lambda count: None,
    tiers: TierSettings | None = None,
) -> int:
    """Writes a complete run of at least `num_records` records, all requests ended; returns how many.

    With `tiers`, every fourth block of a context comes from the local pool at every step.
    """
    config = TraceConfig(out=folder, level=level)
    info = RunInfo(
        model_config={"n_layers": shape.num_layers, "index_topk": shape.top_k},
        layouts=(LAYOUT,),
        device="none",
        selections="synthetic",
        tiers=tiers,
    )
    folder.mkdir(parents=True)
    write_json(folder / MANIFEST_FILE, manifest(info, config, "running", key_id="00000000"))
    deriver = RecordDeriver(config, LAYOUT, tiers_of(info), reuse=True)
    summary = Summary(config.compared_block_sizes, info.selections, offloaded=tiers is not None)
    sinks = open_sinks(folder, config, summary)
    prompt = (0,) * shape.num_prompt_tokens
    facts = RequestFacts(num_output_tokens=STEPS_A_REQUEST + 1, state="length")
    written = 0
    for capture in captures(num_records, shape):
        step = deriver.derive(capture if tiers is None else fetched(capture, tiers))
        for sink in sinks:
            sink.write_step(step)
            if capture.step_idx[0] == STEPS_A_REQUEST - 1:
                for request_id in capture.request_ids:
                    request = Request(request_id, prompt, facts.num_output_tokens)
                    line = request_line(request, facts, has_prefix_cache=False, has_tiers=tiers is not None)
                    sink.write_request(line)
        written += step.num_records
        advance(step.num_records)
    files = {name: digest for sink in sinks for name, digest in (sink.close("complete") or {}).items()}
    write_json(folder / MANIFEST_FILE, manifest(info, config, "complete", key_id="00000000", files=files))
    return written


def captures(num_records: int, shape: Shape) -> Iterator[StepCapture]:
    """Rounds of `batch` requests that decode together to their ends."""
    rng = np.random.default_rng(0)
    num_rounds = -(-num_records // (shape.records_a_step * STEPS_A_REQUEST))
    for forward_idx in range(num_rounds * STEPS_A_REQUEST):
        turn, step_idx = divmod(forward_idx, STEPS_A_REQUEST)
        seq_len = shape.num_prompt_tokens + step_idx + 1
        gaps = rng.integers(
            1, seq_len // shape.top_k, (shape.num_layers, shape.batch, shape.top_k), endpoint=True
        )
        hits = turn > 0  # every round's prompts begin like the first round's
        yield StepCapture(
            phase="decode",
            request_ids=tuple(f"r{turn * shape.batch + b}" for b in range(shape.batch)),
            step_idx=(step_idx,) * shape.batch,
            seq_len=np.full(shape.batch, seq_len, dtype=np.int32),
            batch_size=shape.batch,
            positions=(np.cumsum(gaps, axis=2) - 1).astype(np.int32),
            score_stats=np.broadcast_to(
                np.array([1.0, 2.0, 3.0, 0.25], dtype=np.float32), (shape.num_layers, shape.batch, 4)
            ),
            scores=None,
            prefixes=tuple(RequestPrefix(64 * hits, f"{b:016x}") for b in range(shape.batch)),
            forward_idx=forward_idx,
            step_wall_us=float(rng.integers(30_000, 30_000 + shape.num_step_times)),
            step_synced=True,
        )


def fetched(capture: StepCapture, tiers: TierSettings) -> StepCapture:
    """The capture with every fourth unit fetched from the local pool; its positions ascend."""
    unit_of = capture.positions // tiers.unit_tokens
    is_far = unit_of % 4 == 0  # (L, B, K)
    is_first = np.diff(unit_of, axis=2, prepend=-1) != 0
    counted = {
        name: np.zeros((*unit_of.shape[:2], NUM_TIERS), dtype=np.int64)
        for name in ("bytes_read", "bytes_useful", "read_ops", "evicted_units", "bytes_written", "errors")
    }
    counted["read_ops"][..., LOCAL] = num_units = (is_far & is_first).sum(axis=2)
    counted["bytes_read"][..., LOCAL] = counted["bytes_written"][..., HBM] = num_units * tiers.unit_bytes
    counted["bytes_useful"][..., LOCAL] = is_far.sum(axis=2) * LAYOUT.latent_bytes_per_token
    latency_us = np.zeros((len(unit_of), NUM_TIERS))
    latency_us[:, LOCAL] = 25.0
    served_by = np.where(is_far, LOCAL, HBM).astype(np.int8)
    return dataclasses.replace(
        capture, fetches=StepFetches(served_by=served_by, latency_us=latency_us, **counted)
    )


def in_own_process(stage: Callable[..., str], *arguments: object) -> tuple[str, float, float]:
    """What the stage says, its seconds, and the peak memory of its process in MiB."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_stage, args=(sender, stage, *arguments))
    process.start()
    sender.close()
    try:
        result: tuple[str, float, float] = receiver.recv()
    except EOFError:
        raise SystemExit(1) from None  # the child has said why
    finally:
        process.join()
    return result


def _run_stage(sender: Connection, stage: Callable[..., str], *arguments: object) -> None:
    started = time.perf_counter()
    text = stage(*arguments)
    seconds = time.perf_counter() - started
    sender.send((text, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


if __name__ == "__main__":
    sys.exit(main())
