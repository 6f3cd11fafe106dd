"""How fast the engine serves: its scheduler alone, under the token simulator, and with a model.

The simulator serves a day of generated BurstGPT-like arrivals, in both admission modes: tokens and
times are made up, so that only the engine takes time. The tiny model serves the same requests in
batches and one by one; the sides take turns, so that other load falls on all. The ratios count.
Weights are random and arrivals synthetic: this says nothing about answers or a real service's load.

    python3 scripts/bench/serving.py                         # 100,000 requests; batches of 1, 4, 16
    python3 scripts/bench/serving.py --only simulator --num-requests 1000000 --profile
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from machine import Rows, announce, flag_parser

from dsatrace.engine.engine import Engine, serve
from dsatrace.engine.scheduler import Admission
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.engine.simulator import StepTime, open_simulator
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.workloads.burstgpt import Arrivals
from dsatrace.workloads.burstgpt_synthetic import BurstSettings, generate_burstgpt
from dsatrace.workloads.request import Request

CONFIG = Path(__file__).resolve().parents[2] / "inference" / "config_tiny.json"
DAY_S = 86_400.0
END_TOKEN = 0
MODES: tuple[Admission, ...] = ("continuous", "fifo-batch")
ONE_BY_ONE = "one by one"


def a_day_of(num_requests: int) -> BurstSettings:
    """BurstGPT-like arrivals with gaps so long that they span about a day; none of them fails."""
    shape = BurstSettings.gap_shape
    return BurstSettings(
        num_rows=num_requests, gap_scale_s=DAY_S / num_requests / shape, failure_share=0.0, seed=0
    )


def burst_requests(settings: BurstSettings) -> list[Request]:
    """One request per arrival, of its lengths; nobody reads the prompt's tokens, which are all alike."""
    return [
        Request(
            f"r{arrival.row.source_row}",
            (1,) * arrival.row.request_tokens,
            arrival.row.response_tokens,
            arrival_s=arrival.arrival_s,
            stop_at_eos=False,
        )
        for arrival in Arrivals(generate_burstgpt(settings))
    ]


@dataclasses.dataclass(frozen=True)
class Simulated:
    """One admission mode. `wall_s` and `cpu_s` are what the engine took; the other times are modelled."""

    wall_s: float
    cpu_s: float  # of this process alone, where others make it wait
    requests_per_s: float
    tokens_per_s: float  # prompt and answer tokens scheduled
    num_preemptions: int
    simulated_s: float
    latency_p50_s: float
    latency_max_s: float


def simulate(
    requests: Sequence[Request], settings: BurstSettings, admission: Admission, batch_size: int, blocks: int
) -> Simulated:
    """Serves the requests through scheduler and block pool, and checks that none is lost."""
    latencies: list[float] = []
    num_tokens = num_preemptions = 0
    started, cpu_started = time.perf_counter(), time.process_time()
    max_seq_len = settings.max_request_tokens + settings.max_response_tokens
    of_engine = EngineSettings(max_seq_len=max_seq_len, max_batch_size=batch_size, cache_blocks=blocks)
    run = RunSettings(stop_tokens=frozenset({END_TOKEN}), admission=admission)
    with open_simulator(of_engine, run) as engine:
        for live in serve(engine, requests):
            assert live.state == "length" and live.finish_s is not None
            latencies.append(live.finish_s - live.request.arrival_s)
            num_tokens += len(live.tokens)
            num_preemptions += live.num_preemptions
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        engine.scheduler.pool.check_integrity()
        assert engine.scheduler.pool.num_free == blocks and len(latencies) == len(requests)
        latencies.sort()
        return Simulated(
            wall_s=wall_s,
            cpu_s=cpu_s,
            requests_per_s=len(requests) / wall_s,
            tokens_per_s=num_tokens / wall_s,
            num_preemptions=num_preemptions,
            simulated_s=engine.now_s,
            latency_p50_s=latencies[(len(latencies) - 1) // 2],
            latency_max_s=latencies[-1],
        )


class ModelServer:
    """The tiny model with random weights, opened anew for each way of serving."""

    def __init__(self, config: Path) -> None:
        import torch

        from dsatrace.model.convert import convert_checkpoint
        from dsatrace.model.tiny import write_checkpoint
        from dsatrace.runner.settings import ModelSettings
        from dsatrace.runner.setup import load_model

        self.device = torch.device("cpu")
        with tempfile.TemporaryDirectory() as folder:
            hf, converted = Path(folder, "hf"), Path(folder, "mp1")
            args = ModelSettings(converted, config).model_args()
            write_checkpoint(hf, args, weights="fp32")
            convert_checkpoint(hf, converted, args.n_routed_experts, 1)
            self.settings = ModelSettings(converted, config, device="cpu")
            self.model = load_model(self.settings, self.device)

    def requests(self, num_requests: int, prompt_len: int, new_tokens: int) -> list[Request]:
        import torch

        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.args.vocab_size
        prompts = torch.randint(0, vocabulary, (num_requests, prompt_len), generator=generator).tolist()
        return [Request(f"r{i}", tuple(prompt), new_tokens) for i, prompt in enumerate(prompts)]

    def serve(self, requests: Sequence[Request], batch_size: int | None) -> tuple[Served, list[list[int]]]:
        """All at once, `batch_size` at a time; for None each one when the last has ended."""
        from dsatrace.runner.setup import open_engine

        longest = max(len(r.prompt_token_ids) + r.max_new_tokens for r in requests)
        settings = dataclasses.replace(self.settings, max_batch_size=batch_size or 1)
        with open_engine(self.model, settings, self.device, RunSettings(longest=longest)) as engine:
            started = time.perf_counter()
            answers = {live.request_id: live.answer for live in self._ended(engine, requests, batch_size)}
            wall_s = time.perf_counter() - started
        out = sum(map(len, answers.values()))
        served = Served(wall_s, out / wall_s, engine.num_decode_tokens / engine.decode_s)
        return served, [answers[request.request_id] for request in requests]

    def _ended(self, engine: Engine, requests: Sequence[Request], batch_size: int | None) -> Iterator[Any]:
        if batch_size is not None:
            yield from serve(engine, requests)
            return
        for request in requests:
            yield from serve(engine, [request])


@dataclasses.dataclass(frozen=True)
class Served:
    """One way to serve the same requests."""

    wall_s: float
    tokens_per_s: float  # generated, prompts' time included
    decode_tokens_per_s: float  # in decode steps alone


def measure_model(
    server: ModelServer, requests: Sequence[Request], batch_sizes: Sequence[int], rounds: int
) -> tuple[dict[str, Served], dict[str, int]]:
    """Medians over rounds in which every side serves once, and how many answers are those of one by one."""
    sides: dict[str, int | None] = {ONE_BY_ONE: None} | {f"batch {size}": size for size in batch_sizes}
    runs: dict[str, list[Served]] = {name: [] for name in sides}
    same: dict[str, int] = {}
    server.serve(requests[:1], None)  # what a first forward alone pays
    for _ in range(rounds):
        expected: list[list[int]] = []
        for name, batch_size in sides.items():
            served, answers = server.serve(requests, batch_size)
            expected = expected or answers
            runs[name].append(served)
            same[name] = sum(own == alone for own, alone in zip(answers, expected, strict=True))
    medians = {
        name: Served(*map(statistics.median, zip(*map(dataclasses.astuple, rows), strict=True)))
        for name, rows in runs.items()
    }
    return medians, same


def show_model(results: dict[str, Served], same: dict[str, int], what: str) -> None:
    headings = ("wall s", "tokens/s", "ratio", "decode tokens/s", "ratio", "same")
    table = Rows(f"tiny model, {what}", f"{'served':11} ", *headings)
    alone = results[ONE_BY_ONE]
    for name, r in results.items():
        whole = f"{r.tokens_per_s:.1f}", f"{r.tokens_per_s / alone.tokens_per_s:.2f}x"
        decode = f"{r.decode_tokens_per_s:.1f}", f"{r.decode_tokens_per_s / alone.decode_tokens_per_s:.2f}x"
        table.add(name, f"{r.wall_s:.2f}", *whole, *decode, str(same[name]))


def bench_simulator(flags: argparse.Namespace) -> dict[str, Any]:
    settings = a_day_of(flags.num_requests)
    requests = burst_requests(settings)
    tokens_in = sum(len(r.prompt_token_ids) for r in requests)
    tokens_out = sum(r.max_new_tokens for r in requests)
    span_s = requests[-1].arrival_s
    print(f"arrivals: {settings.text()}")
    print(
        f"{len(requests):,} requests over {span_s / 3600:.1f} h, "
        f"{tokens_in:,} tokens in, {tokens_out:,} out; "
        f"batch {flags.batch_size}, {flags.cache_blocks} blocks of 64; modelled, not fitted: {StepTime()}"
    )
    profiler = cProfile.Profile() if flags.profile else None
    results = {}
    headings = ("wall s", "CPU s", "requests/s", "Mtokens/s", "preempted", "p50 s", "max s")
    table = Rows("token simulator; latency is modelled", "mode        ", *headings)
    for mode in MODES:
        if profiler is not None:
            profiler.enable()
        r = results[mode] = simulate(requests, settings, mode, flags.batch_size, flags.cache_blocks)
        if profiler is not None:
            profiler.disable()
        speed = f"{r.wall_s:.1f}", f"{r.cpu_s:.1f}", f"{r.requests_per_s:,.0f}", f"{r.tokens_per_s / 1e6:.2f}"
        latency = f"{r.latency_p50_s:.2f}", f"{r.latency_max_s:,.0f}"
        table.add(mode, *speed, f"{r.num_preemptions:,}", *latency)
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(20)
    measured = {mode: dataclasses.asdict(result) for mode, result in results.items()}
    return {"span_s": span_s, "tokens_in": tokens_in, "tokens_out": tokens_out, "results": measured}


def bench_model(flags: argparse.Namespace) -> dict[str, Any]:
    import torch

    if flags.threads:
        torch.set_num_threads(flags.threads)
    server = ModelServer(flags.config)
    requests = server.requests(flags.model_requests, flags.prompt_tokens, flags.new_tokens)
    results, same = measure_model(server, requests, flags.batch_sizes, flags.rounds)
    what = f"{len(requests)} requests of {flags.prompt_tokens} + {flags.new_tokens} tokens, fp32, greedy"
    show_model(results, same, what)
    alone = results[ONE_BY_ONE].tokens_per_s
    return {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "results": {name: dataclasses.asdict(result) for name, result in results.items()},
        "ratios": {name: result.tokens_per_s / alone for name, result in results.items()},
        "same_answers": same,
    }


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and one line of JSON."""
    flags = _parser().parse_args(argv)
    counts = ("num_requests", "batch_size", "cache_blocks", "model_requests", "prompt_tokens", "new_tokens")
    for name in (*counts, "rounds"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(flags, name)}: use at least 1")
    if min(flags.batch_sizes) < 1:
        raise UserError(f"--batch-sizes {min(flags.batch_sizes)}: use at least 1")
    threads = flags.threads or "torch's choice"
    record: dict[str, Any] = {"machine": announce("torch", "numba", threads=threads)}
    if flags.only != "model":
        record["simulator"] = bench_simulator(flags)
    if flags.only != "simulator":
        record["model"] = bench_model(flags)
    print(json.dumps(record))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = flag_parser(__doc__)
    parser.add_argument("--only", choices=("simulator", "model"), help="run one half (default: both)")
    group = parser.add_argument_group("simulator")
    add = group.add_argument
    add("--num-requests", type=int, default=100_000, help="requests in about a day")
    add("--batch-size", type=int, default=16, help="requests at a time")
    add("--cache-blocks", type=int, default=160, help="blocks of 64 tokens; too few for all requests")
    add("--profile", action="store_true", help="show where the engine's time goes")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--config", type=Path, default=CONFIG, help="model config")
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="requests at a time")
    add("--model-requests", type=int, default=16, help="requests of each side")
    add("--prompt-tokens", type=int, default=128, help="tokens per prompt")
    add("--new-tokens", type=int, default=32, help="new tokens per prompt")
    add("--rounds", type=int, default=3, help="times that every side serves")
    add("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
