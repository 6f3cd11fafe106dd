"""Prefill and decode against transformers' DeepseekV32: same random weights, same tokens, one process.

transformers computes in fp32 without fp8 and Hadamard, and is fed the prompt whole, as `generate` does,
and in chunks, as ours is. Ours computes the same, and once more with the numerics of a real run. All
take turns, so that other load falls on all; each figure is the least of its turns, and processor time
stands beside the clock. A decode turn is a few steps long, since in real use a step finds the CPU caches
as another step has left them. `operations` are those that torch dispatches in one decode step. Peak extra
memory is that of the prefill, KV cache included; Linux. Says nothing about answers: the weights are random.

    python3 scripts/bench/decode.py --threads 1            # 0.5K to 8K; ours alone at 32K
    python3 scripts/bench/decode.py --contexts 2048 --profile
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from machine import Rows, announce, flag_parser, peak_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from dsatrace.engine.settings import EngineSettings
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.model.batch import Batch, Span
from dsatrace.model.checkpoint import load_transformer
from dsatrace.model.config import PLAIN_NUMERICS, ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.tiny import write_checkpoint
from dsatrace.model.transformer import Transformer

CONFIG = Path(__file__).resolve().parents[2] / "inference" / "config_tiny.json"
THEIRS_UP_TO = 8192  # tokens; whole, transformers would need some 50 GB at 32K
CHECKED_TOKENS = 16  # decode steps whose logits are compared before anything is timed
CHECKED_CHUNK = 32
TOLERANCE = 1e-3
TURN = 8  # decode steps of one side before it is the other's turn
MOST_PREFILLS = 8
PREFILL_BUDGET_S = 20.0
"""A side prefills again while it has taken less, up to `MOST_PREFILLS` times: short ones are noisy."""


class Side(Protocol):
    """One implementation. Both calls return the last token's logits `(V,)`."""

    name: str

    def prefill(self, tokens: Sequence[int], room: int) -> torch.Tensor:
        """Drops what was held and computes `tokens`; `room` more may follow."""

    def step(self, token: int) -> torch.Tensor:
        """One decode step."""

    def clear(self) -> None:
        """Frees the KV cache."""


class Ours:
    def __init__(self, name: str, model: Transformer, chunk: int) -> None:
        self.name, self.model, self.chunk = name, model, chunk

    def prefill(self, tokens: Sequence[int], room: int) -> torch.Tensor:
        block_size = EngineSettings.cache_block_size
        self.cache = self.model.new_cache(-(-(len(tokens) + room) // block_size), block_size)
        self.blocks = list(range(self.cache.num_blocks))
        for start, chunk in chunks(tokens, self.chunk):
            logits = self._forward(start, chunk, start + len(chunk) == len(tokens))
        self.num_tokens = len(tokens)
        return logits[0]

    def step(self, token: int) -> torch.Tensor:
        logits = self._forward(self.num_tokens, [token], wants_logits=True)
        self.num_tokens += 1
        return logits[0]

    def clear(self) -> None:
        del self.cache

    def _forward(self, first_pos: int, tokens: Sequence[int], wants_logits: bool) -> torch.Tensor:
        span = Span(self.blocks, first_pos, tokens, wants_logits)
        logits: torch.Tensor = self.model(Batch.build([span], self.cache.block_size), self.cache)
        return logits


class Theirs:
    def __init__(self, name: str, model: Any, chunk: int | None) -> None:
        self.name, self.model, self.chunk = name, model, chunk

    def prefill(self, tokens: Sequence[int], room: int) -> torch.Tensor:
        self.past = None
        for _, chunk in chunks(tokens, self.chunk or len(tokens)):
            logits = self._forward(chunk)
        return logits

    def step(self, token: int) -> torch.Tensor:
        return self._forward([token])

    def clear(self) -> None:
        del self.past

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int]) -> torch.Tensor:
        out = self.model(torch.tensor([tokens]), past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        logits: torch.Tensor = out.logits[0, -1]
        return logits


def chunks(tokens: Sequence[int], size: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Where each chunk starts, and its tokens."""
    for start in range(0, len(tokens), size):
        yield start, tokens[start : start + size]


def load_theirs(checkpoint: Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the checkpoint is made here; nothing is fetched
    from transformers import DeepseekV32ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of an argument's new name
    return DeepseekV32ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@dataclasses.dataclass
class Measurement:
    """One side at one context: the least times of its turns, the most memory above that before a prefill."""

    num_prefills: int = 0
    prefill_s: float = float("inf")
    prefill_cpu_s: float = float("inf")
    peak_extra_bytes: int = 0
    decode_ms: float = float("inf")
    decode_cpu_ms: float = float("inf")
    operations: int = 0

    def cells(self) -> tuple[str, ...]:
        seconds = (f"{self.prefill_s:.3f}", f"{self.prefill_cpu_s:.3f}")
        milliseconds = (f"{self.decode_ms:.2f}", f"{self.decode_cpu_ms:.2f}")
        extra = f"{self.peak_extra_bytes / 2**20:.0f}"
        return *seconds, extra, f"{self.num_prefills}", *milliseconds, f"{self.operations}"


HEADINGS = (
    "context",
    f"{'side':<31}",
    "prefill s",
    "cpu s",
    "extra MiB",
    "turns",
    "decode ms",
    "cpu ms",
    "operations",
)


def check_same_logits(sides: Sequence[Side], tokens: Sequence[int], args: ModelArgs) -> float:
    """The largest difference of logits while everything is selected, where no tie can matter."""
    prompt_len = max(1, args.index_topk - CHECKED_TOKENS)
    logits = [[side.prefill(tokens[:prompt_len], CHECKED_TOKENS)] for side in sides]
    for token in tokens[prompt_len : args.index_topk]:
        for side, rows in zip(sides, logits, strict=True):
            rows.append(side.step(token))
    first, *others = [torch.stack(rows) for rows in logits]
    worst = max((first - other).abs().max().item() for other in others)
    if not worst <= TOLERANCE:
        raise UserError(f"logits differ by {worst:.1e}, more than {TOLERANCE}: the two are not one model")
    return worst


def measure(
    sides: Sequence[Side], tokens: Sequence[int], context: int, decode_steps: int, rows: Rows
) -> dict[str, Measurement]:
    """Prefills `context` tokens and decodes the next ones, the sides taking turns; adds their rows."""
    results = {side.name: Measurement() for side in sides}
    spent_s = dict.fromkeys(results, 0.0)
    for _ in range(MOST_PREFILLS):
        for side in sides:
            found = results[side.name]
            if spent_s[side.name] >= PREFILL_BUDGET_S:
                continue
            wall_s, cpu_s, extra = timed_with_memory(
                partial(side.prefill, tokens[:context], decode_steps + 1)
            )
            spent_s[side.name] += wall_s
            found.num_prefills += 1
            found.prefill_s = min(found.prefill_s, wall_s)
            found.prefill_cpu_s = min(found.prefill_cpu_s, cpu_s)
            found.peak_extra_bytes = max(found.peak_extra_bytes, extra)
    end = context + decode_steps
    for first in range(context, end, TURN):
        for side in sides:
            found = results[side.name]
            turn = tokens[first : min(first + TURN, end)]
            start, used = time.perf_counter(), time.process_time()
            for token in turn:
                side.step(token)
            wall_s, cpu_s = time.perf_counter() - start, time.process_time() - used
            found.decode_ms = min(found.decode_ms, wall_s / len(turn) * 1e3)
            found.decode_cpu_ms = min(found.decode_cpu_ms, cpu_s / len(turn) * 1e3)
    for side in sides:
        results[side.name].operations = operations(partial(side.step, tokens[end]))
        rows.add(f"{context}", side.name, *results[side.name].cells())
        side.clear()
    return results


def timed_with_memory(work: Callable[[], object]) -> tuple[float, float, int]:
    """Clock and processor seconds of `work`, and the bytes by which resident memory rose above its start."""
    gc.collect()
    release_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_bytes()
    start, used = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - used
    return seconds, cpu_s, peak_bytes() - before


def release_free_memory() -> None:
    """Gives freed memory back to the system (glibc), else one side could hide in what the other freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(work: Callable[[], object]) -> int:
    """Operations that torch dispatches in `work`, views and no-op casts among them."""
    counting: Callable[[], _Counter] = _Counter  # torch leaves its constructor without types
    with (counter := counting()):
        work()
    return counter.count


def profile_decode(side: Side, tokens: Sequence[int], context: int) -> str:
    """Where a decode step goes: operators by their own time, over 20 steps."""
    from torch.profiler import ProfilerActivity, profile

    side.prefill(tokens[:context], 40)
    for token in tokens[:5]:
        side.step(token)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for token in tokens[5:25]:
            side.step(token)
    told: str = profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40
    )
    return told


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Checks, measures, prints rows, ratios and one line of JSON."""
    flags = _parser().parse_args(argv)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    if min(*flags.contexts, flags.decode_steps, flags.chunk) < 1:
        raise UserError("--contexts, --chunk and --decode-steps: use at least 1")
    plain: dict[str, Any] = {**PLAIN_NUMERICS, "dtype": "fp32"}
    try:
        real, args = (ModelArgs.from_json(flags.config, **changes) for changes in ({"dtype": "fp32"}, plain))
    except ValueError as error:
        raise UserError(str(error)) from error
    generator = torch.Generator().manual_seed(0)
    num_tokens = max(*flags.contexts, args.index_topk) + max(flags.decode_steps + 1, 40)
    tokens = torch.randint(0, args.vocab_size, (num_tokens,), generator=generator).tolist()
    about = announce("torch", "transformers", threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        hf, converted = Path(folder, "hf"), Path(folder, "mp1")
        write_checkpoint(hf, args, weights="fp32")
        convert_checkpoint(hf, converted, args.n_routed_experts, 1)
        theirs = load_theirs(hf)
        models = [load_transformer(one, converted) for one in (args, real)]
    worst = check_same_logits(
        [Theirs("", theirs, None), Theirs("", theirs, CHECKED_CHUNK), Ours("", models[0], CHECKED_CHUNK)],
        tokens,
        args,
    )
    print(f"one model: logits within {worst:.1e} up to {args.index_topk} tokens, the top-k")
    whole: Side = Theirs("transformers, whole", theirs, None)
    in_chunks: Side = Theirs(f"transformers, chunks of {flags.chunk}", theirs, flags.chunk)
    ours: Side = Ours("dsatrace", models[0], flags.chunk)
    rounded: Side = Ours("dsatrace, fp8 and Hadamard", models[1], flags.chunk)
    results: dict[int, dict[str, Measurement]] = {}
    rows = Rows(f"prefill and decode, fp32, batch 1, random weights, {flags.config.name}", *HEADINGS)
    for context in sorted(flags.contexts):
        compared = [whole, in_chunks] if context <= THEIRS_UP_TO else []
        results[context] = found = measure(
            [*compared, ours, rounded], tokens, context, flags.decode_steps, rows
        )
        for side in compared:
            print(f"{'':>9}{side.name} over dsatrace: {ratios(found[side.name], found[ours.name])}")
    if flags.profile:
        context = max(flags.contexts)
        print(f"our decode step at {context} tokens, 20 steps:\n{profile_decode(ours, tokens, context)}")
    measured = {str(c): {name: dataclasses.asdict(m) for name, m in s.items()} for c, s in results.items()}
    load_after = os.getloadavg()
    record = {"machine": about, "load_after": load_after, "logits_within": worst, "results": measured}
    print(json.dumps(record))
    return 0


def ratios(theirs: Measurement, ours: Measurement) -> str:
    """Above 1, ours is better."""
    fields = ("prefill_s", "prefill_cpu_s", "peak_extra_bytes", "decode_ms", "decode_cpu_ms")
    return ", ".join(f"{field} {getattr(theirs, field) / getattr(ours, field):.2f}x" for field in fields)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = flag_parser(__doc__)
    contexts = [512, 2048, 4096, 8192, 32768]
    parser.add_argument("--contexts", type=int, nargs="+", default=contexts, help="tokens")
    parser.add_argument(
        "--chunk", type=int, default=EngineSettings.prefill_chunk, help="tokens of a prompt fed at a time"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    parser.add_argument("--decode-steps", type=int, default=64, help="timed at each context")
    parser.add_argument("--config", type=Path, default=CONFIG, help="model config")
    parser.add_argument("--profile", action="store_true", help="where a decode step of ours goes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
