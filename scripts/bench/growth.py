"""How time and memory grow: of the verbs with a run's records, of the writer and of a decode step.

`verbs` writes runs through the real sinks (selections made up, evenly spread over a 32K context, four
requests served at a time) and lets every verb read them; `writer` encodes steps of other shapes;
`decode` steps the tiny config over a cache filled at random, not prefilled: what a step costs does not
depend on the values, and its answers mean nothing. Each row is a process of its own and is printed as
it is measured: processor time of all its processes, clock, peak memory. `per further` is what a record
took beyond those of the row before: where it stays, the verb grows linearly.

    python3 scripts/bench/growth.py verbs --level stats
    python3 scripts/bench/growth.py verbs --top-k 256 --folder /data/growth
    python3 scripts/bench/growth.py decode --contexts 2048 131072
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import Rows, announce, peak_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.files import write_json
from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.prefix import RequestPrefix
from dsatrace.kv.tiers.fetches import HBM, LOCAL, NUM_TIERS, StepFetches
from dsatrace.schema import LEVELS, MANIFEST_FILE, Level
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import PoolSettings, RunInfo, TierSettings, manifest
from dsatrace.trace.records import RecordDeriver, StepLines
from dsatrace.trace.request_facts import RequestFacts, request_line
from dsatrace.trace.summary import Summary
from dsatrace.trace.tracer import tiers_of
from dsatrace.trace.writer import open_sinks
from dsatrace.workloads.request import Request

CONFIG = Path(__file__).resolve().parents[2] / "inference" / "config_tiny.json"
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


class Cost(NamedTuple):
    """What a row took, of all its processes."""

    cpu_s: float
    wall_s: float
    peak_mib: float  # of the largest


class Verb(NamedTuple):
    """A command line over a run; with `makes`, a folder that later verbs read."""

    name: str
    reads: str
    line: str
    makes: str = ""


VERBS = (
    Verb("verify", "jsonl", "verify {run} --jobs 1"),
    Verb("summarize", "jsonl", "summarize {run} --out {folder}/summary.json"),
    Verb("report", "jsonl", "report {run} --no-figure"),
    Verb("report --html", "jsonl", "report {run} --html {folder}/page.html"),
    Verb("export --to parquet", "jsonl", "export {run} --to parquet --out {made}", "parquet"),
    Verb("export --to replay", "jsonl", "export {run} --to replay --out {made}", "layout"),
    Verb("replay", "jsonl", "replay {run} --no-figure --out {folder}/replayed"),
    Verb("verify", "parquet", "verify {run} --jobs 1"),
    Verb("summarize", "parquet", "summarize {run} --out {folder}/summary.json"),
    Verb("report --html", "parquet", "report {run} --html {folder}/page.html"),
    Verb("replay", "layout", "replay {run} --no-figure --out {folder}/replayed_layout"),
)
FULL_ONLY = ("export --to replay", "replay")
"""Verbs that need positions."""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    modes = parser.add_subparsers(required=True, metavar="{verbs,writer,decode}")
    verbs = modes.add_parser("verbs", help="by the number of records")
    verbs.set_defaults(work=grow_verbs)
    counts = [10_000, 100_000, 1_000_000]
    verbs.add_argument("--counts", type=int, nargs="+", default=counts, help="least records (%(default)s)")
    verbs.add_argument("--level", choices=LEVELS, default="full", help="default: %(default)s")
    verbs.add_argument("--top-k", type=int, default=2048, help="ids of a record (%(default)s)")
    verbs.add_argument("--layers", type=int, default=Shape.num_layers, help="of the model (%(default)s)")
    verbs.add_argument("--only", nargs="+", choices=sorted({verb.name for verb in VERBS}), help="these verbs")
    verbs.add_argument("--folder", type=Path, help="for the runs, on a disk with room (default: temporary)")
    writer = modes.add_parser("writer", help="by layers, top-k and batch")
    writer.set_defaults(work=grow_writer)
    writer.add_argument("--steps", type=int, default=100, help="of each shape (%(default)s)")
    decode = modes.add_parser("decode", help="by context and batch")
    decode.set_defaults(work=grow_decode)
    contexts = [2048, 8192, 32768, 131072]
    decode.add_argument("--contexts", type=int, nargs="+", default=contexts, help="tokens (%(default)s)")
    decode.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="requests (%(default)s)")
    decode.add_argument("--steps", type=int, default=20, help="timed of each (%(default)s)")
    decode.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    args = parser.parse_args(argv)
    announce(
        "numpy", "numba", "orjson", "pyarrow", "torch", threads=getattr(args, "threads", "as by default")
    )
    args.work(args)
    return 0


def grow_verbs(args: argparse.Namespace) -> None:
    """Each verb over runs of growing length; a run goes once its verbs have read it."""
    if min(*args.counts, args.layers) < 1 or not 1 <= args.top_k <= Shape.num_prompt_tokens:
        raise UserError(f"--counts and --layers must be at least 1, --top-k 1 to {Shape.num_prompt_tokens}")
    needed = [verb for verb in VERBS if args.level == "full" or verb.name not in FULL_ONLY]
    if args.only:
        needed = [verb for verb in needed if verb.name in args.only]
        makers = {verb.reads for verb in needed} - {"jsonl"}
        needed += [verb for verb in VERBS if verb.makes in makers and verb not in needed]
        needed.sort(key=VERBS.index)
    else:
        of_command(["warmup"])  # compiles what the first row would compile
    shape = Shape(num_layers=args.layers, top_k=args.top_k)
    table = Rows(
        f"level {args.level}, {shape.num_layers} layers, {args.top_k} ids per record",
        *(f"{'verb':19} ", f"{'of':8} ", "records", "CPU s", "wall s", "CPU us/record"),
        *("per further", "peak MiB"),
    )
    before: dict[tuple[str, str], tuple[int, float]] = {}
    with tempfile.TemporaryDirectory(prefix="dsatrace-growth-", dir=args.folder) as temporary:
        for count in sorted(args.counts):
            folder = Path(temporary) / str(count)
            told, *cost = in_own_process(write_stage, folder / "jsonl", count, args.level, shape)
            written = int(told)
            row = partial(_add_row, table, before, written)
            row("write", "jsonl", Cost(*cost))
            for verb in needed:
                places = {"run": folder / verb.reads, "folder": folder, "made": folder / verb.makes}
                row(verb.name, verb.reads, of_command([one.format(**places) for one in verb.line.split()]))
            runs = [made for name in ("jsonl", "parquet", "layout") if (made := folder / name).is_dir()]
            sizes = ", ".join(f"{made.name} {_size(made) / written:,.0f}" for made in runs)
            print(f"bytes per record: {sizes}")
            shutil.rmtree(folder)


def _add_row(
    table: Rows,
    before: dict[tuple[str, str], tuple[int, float]],
    records: int,
    verb: str,
    of: str,
    cost: Cost,
) -> None:
    """Adds a verb's row, and keeps it in `before` for the next one of the same verb."""
    further = ""
    if (verb, of) in before:
        fewer, took = before[verb, of]
        further = f"{(cost.cpu_s - took) / (records - fewer) * 1e6:.1f}"
    before[verb, of] = records, cost.cpu_s
    times = f"{cost.cpu_s:.2f}", f"{cost.wall_s:.2f}", f"{cost.cpu_s / records * 1e6:.1f}"
    table.add(verb, of, f"{records}", *times, further, f"{cost.peak_mib:.0f}")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


_PROBE = """
import resource, sys
from dsatrace.cli import main
code = main(sys.argv[2:])
own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
cpu_s = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
open(sys.argv[1], "w").write(f"{cpu_s} {max(held, children.ru_maxrss) / 1024}")
sys.exit(code)
"""
"""Runs a command line of dsatrace as a user does, and writes what it took to a file."""


def of_command(arguments: Sequence[str]) -> Cost:
    """What a command line took, from the start of its process to its end."""
    with tempfile.NamedTemporaryFile("r") as told:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, told.name, *arguments], capture_output=True, text=True, check=False
        )
        wall_s = time.perf_counter() - started
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise UserError(f"dsatrace {' '.join(arguments)}: exit {done.returncode}: {' '.join(last)}")
        cpu_s, peak_mib = map(float, told.read().split())
    return Cost(cpu_s, wall_s, peak_mib)


def write_stage(folder: Path, num_records: int, level: Level, shape: Shape) -> str:
    return str(write_run(folder, num_records, level, shape))


WRITER_SHAPES = (
    *((layers, 2048, 1) for layers in (1, 4, 16, 61)),
    *((61, top_k, 1) for top_k in (64, 256, 1024)),
    *((61, 2048, batch) for batch in (4, 8, 16, 32)),
)
"""(layers, top-k, batch)"""


def grow_writer(args: argparse.Namespace) -> None:
    """The writer's thread: what a step takes by its shape, the fastest quarter of the steps."""
    title = "processor time of a step, ms: derived, encoded, written to a file and summed up"
    table = Rows(title, "layers", "top-k", "batch", "ms", "us/record", "peak MiB")
    for layers, top_k, batch in WRITER_SHAPES:
        shape = Shape(num_layers=layers, batch=batch, top_k=top_k)
        told, *_, peak_mib = in_own_process(writer_stage, shape, args.steps)
        ms = float(told)
        us = ms * 1e3 / shape.records_a_step
        table.add(*map(str, (layers, top_k, batch)), f"{ms:.3f}", f"{us:.2f}", f"{peak_mib:.0f}")


def writer_stage(shape: Shape, num_steps: int) -> str:
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "lines").open("wb", buffering=0) as file:
        config = TraceConfig(out=Path(folder) / "run")
        info = RunInfo(
            model_config={"n_layers": shape.num_layers, "index_topk": shape.top_k},
            layouts=(LAYOUT,),
            device="none",
            selections="synthetic",
        )
        deriver = RecordDeriver(config, LAYOUT, tiers_of(info), reuse=True)
        lines, summary = StepLines(), Summary(config.compared_block_sizes, "synthetic")
        kept = list(itertools.islice(captures(num_steps * shape.records_a_step, shape), 4))
        took = []
        for i in range(num_steps + len(kept)):
            capture = dataclasses.replace(kept[i % len(kept)], step_idx=(i,) * shape.batch, forward_idx=i)
            started = time.thread_time()
            step = deriver.derive(capture)
            file.write(lines.encode(step))
            summary.add_step(step)
            took.append(time.thread_time() - started)
            file.seek(0)
    return str(np.quantile(took[len(kept) :], 0.25) * 1e3)


def grow_decode(args: argparse.Namespace) -> None:
    """A decode step by context and batch, the median of some."""
    title = f"config_tiny.json with contexts up to 128K, random weights, {args.threads} threads of torch"
    table = Rows(title, "context", "batch", "wall ms", "CPU ms", "cache MiB", "peak MiB")
    for context, batch in itertools.product(args.contexts, args.batches):
        told, *_, peak_mib = in_own_process(decode_stage, context, batch, args.steps, args.threads)
        wall_ms, cpu_ms, cache_mib = map(float, told.split())
        sizes = f"{cache_mib:.0f}", f"{peak_mib:.0f}"
        table.add(str(context), str(batch), f"{wall_ms:.2f}", f"{cpu_ms:.2f}", *sizes)


def decode_stage(context: int, batch: int, num_steps: int, threads: int) -> str:
    import torch

    from dsatrace.model.batch import Batch, Span
    from dsatrace.model.config import ModelArgs
    from dsatrace.model.transformer import Transformer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    overrides: dict[str, Any] = {"max_seq_len": 2 * max(context, 65536)}
    args = ModelArgs.from_json(CONFIG, **overrides)
    model = Transformer(args).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.05)
    block_size, warm = 64, 3
    per_request = -(-(context + warm + num_steps) // block_size)
    cache = model.new_cache(batch * per_request, block_size)
    for tensor in (*cache.latent, *cache.index_k, *(cache.index_scale or ())):
        tensor.copy_(torch.rand(tensor.shape).sub_(0.5))
    wall, cpu = [], []
    for step in range(warm + num_steps):
        spans = [
            Span(range(b * per_request, (b + 1) * per_request), context + step, [b]) for b in range(batch)
        ]
        started, used = time.perf_counter(), time.process_time()
        model(Batch.build(spans, block_size), cache)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    cache_mib = cache.bytes_per_token * batch * per_request * block_size / 2**20
    return f"{np.median(wall[warm:]) * 1e3} {np.median(cpu[warm:]) * 1e3} {cache_mib}"


def write_run(
    folder: Path,
    num_records: int,
    level: Level,
    shape: Shape,
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


def in_own_process(stage: Callable[..., str], *arguments: object) -> tuple[str, float, float, float]:
    """What the stage says, and what it took: a `Cost`, as numbers."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_stage, args=(sender, stage, *arguments))
    process.start()
    sender.close()
    try:
        result: tuple[str, float, float, float] = receiver.recv()
    except EOFError:
        raise SystemExit(1) from None  # the child has said why
    finally:
        process.join()
    return result


def _run_stage(sender: Connection, stage: Callable[..., str], *arguments: object) -> None:
    started, before = time.perf_counter(), time.process_time()
    text = stage(*arguments)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - before
    sender.send((text, cpu_s, wall_s, peak_bytes() / 2**20))


if __name__ == "__main__":
    sys.exit(main())
