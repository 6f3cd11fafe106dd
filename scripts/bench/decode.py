"""Prefill and decode against transformers' DeepseekV32: same random weights, same tokens, one process.

Both sides compute in fp32 with fp8 and Hadamard off, as transformers does, each out of the box. They
take turns, so that other load falls on both; the ratios count. A decode turn is a few steps long,
since in real use a step finds the CPU caches as another step has left them. Peak extra memory is that
of the prefill, KV cache included. Says nothing about answers: the weights are random.

    python3 scripts/bench/decode.py                        # 0.5K, 2K, 8K; ours alone at 32K
    python3 scripts/bench/decode.py --contexts 2048 --profile
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))

from machine import machine

from dsatrace.commands.parser import HelpFormatter
from dsatrace.engine.settings import EngineSettings
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.model.batch import Batch, Span
from dsatrace.model.checkpoint import load_transformer
from dsatrace.model.config import PLAIN_NUMERICS, ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.tiny import write_checkpoint

CONFIG = Path(__file__).resolve().parents[2] / "inference" / "config_tiny.json"
THEIRS_UP_TO = 8192  # tokens; at 32K transformers would need some 50 GB
CHECKED_TOKENS = 16  # decode steps whose logits are compared before anything is timed
TOLERANCE = 1e-3
TURN = 8  # decode steps of one side before it is the other's turn
SAMPLE_S = 0.002


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
    name = "dsatrace"

    def __init__(self, args: ModelArgs, checkpoint: Path) -> None:
        self.model = load_transformer(args, checkpoint)

    def prefill(self, tokens: Sequence[int], room: int) -> torch.Tensor:
        block_size, chunk = EngineSettings.cache_block_size, EngineSettings.prefill_chunk
        self.cache = self.model.new_cache(-(-(len(tokens) + room) // block_size), block_size)
        self.blocks = list(range(self.cache.num_blocks))
        for start in range(0, len(tokens), chunk):
            logits = self._forward(start, tokens[start : start + chunk], start + chunk >= len(tokens))
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
    name = "transformers"

    def __init__(self, checkpoint: Path) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the checkpoint is made here; nothing is fetched
        from transformers import DeepseekV32ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = DeepseekV32ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], room: int) -> torch.Tensor:
        out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    @torch.inference_mode()
    def step(self, token: int) -> torch.Tensor:
        out = self.model(torch.tensor([[token]]), past_key_values=self.past, use_cache=True)
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def clear(self) -> None:
        del self.past


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One side at one context. Times are medians; memory is above what stood before the prefill."""

    prefill_s: float
    decode_step_s: float
    peak_extra_bytes: int


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
    sides: Sequence[Side], tokens: Sequence[int], context: int, decode_steps: int
) -> dict[str, Measurement]:
    """Prefills `context` tokens and decodes the next ones, the sides taking turns."""
    prefill_s: dict[str, list[float]] = {side.name: [] for side in sides}
    peak = dict.fromkeys(prefill_s, 0)
    step_s: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(max(1, 4096 // context)):  # a short prefill is noisy, a long one takes its time
        for side in sides:
            seconds, extra = timed_with_memory(partial(side.prefill, tokens[:context], decode_steps))
            prefill_s[side.name].append(seconds)
            peak[side.name] = max(peak[side.name], extra)
    end = context + decode_steps
    for first in range(context, end, TURN):
        for side in sides:
            for token in tokens[first : min(first + TURN, end)]:
                start = time.perf_counter()
                side.step(token)
                step_s[side.name].append(time.perf_counter() - start)
    return {
        name: Measurement(statistics.median(prefill_s[name]), statistics.median(step_s[name]), peak[name])
        for name in prefill_s
    }


def timed_with_memory(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds of `work`, and the bytes by which the resident set rose above its start, sampled."""
    gc.collect()
    release_free_memory()
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    return seconds, max(peak, process.memory_info().rss) - before


def release_free_memory() -> None:
    """Gives freed memory back to the system (glibc), else one side could hide in what the other freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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


def ratios(results: dict[int, dict[str, Measurement]]) -> dict[str, dict[str, float]]:
    """transformers over ours, for every context both were measured at: above 1, ours is better."""
    found = {}
    for context, sides in results.items():
        if Theirs.name in sides:
            ours, theirs = dataclasses.asdict(sides[Ours.name]), dataclasses.asdict(sides[Theirs.name])
            found[str(context)] = {key.rpartition("_")[0]: theirs[key] / ours[key] for key in ours}
    return found


def growth(results: dict[int, dict[str, Measurement]]) -> float | None:
    """Our decode step at 32K over that at 2K."""
    if 2048 not in results or 32768 not in results:
        return None
    return results[32768][Ours.name].decode_step_s / results[2048][Ours.name].decode_step_s


def results_table(results: dict[int, dict[str, Measurement]]) -> Table:
    table = Table(title="prefill and decode, fp32, batch 1, random weights")
    for column in ("context", "side", "prefill s", "decode tokens/s", "decode ms", "peak extra MiB"):
        table.add_column(column, justify="left" if column == "side" else "right")
    compared = ratios(results)
    for context, sides in results.items():
        for name, m in sides.items():
            speed = (f"{1 / m.decode_step_s:.1f}", f"{m.decode_step_s * 1e3:.2f}")
            table.add_row(
                f"{context}", name, f"{m.prefill_s:.3f}", *speed, f"{m.peak_extra_bytes / 2**20:.0f}"
            )
        if ratio := compared.get(str(context)):
            decode = f"{ratio['decode_step']:.1f}x"
            table.add_row(
                "", "ratio", f"{ratio['prefill']:.1f}x", decode, decode, f"{ratio['peak_extra']:.1f}x"
            )
        table.add_section()
    return table


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Checks, measures, prints the table and one line of JSON."""
    flags = _parser().parse_args(argv)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    if min(flags.contexts) < 1 or flags.decode_steps < 1:
        raise UserError("--contexts and --decode-steps: use at least 1")
    plain: dict[str, Any] = {**PLAIN_NUMERICS, "dtype": "fp32"}
    try:
        args = ModelArgs.from_json(flags.config, **plain)
    except ValueError as error:
        raise UserError(str(error)) from error
    generator = torch.Generator().manual_seed(0)
    num_tokens = max(*flags.contexts, args.index_topk) + max(flags.decode_steps, 40)
    tokens = torch.randint(0, args.vocab_size, (num_tokens,), generator=generator).tolist()
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        hf, converted = Path(folder, "hf"), Path(folder, "mp1")
        write_checkpoint(hf, args, weights="fp32")
        convert_checkpoint(hf, converted, args.n_routed_experts, 1)
        ours, theirs = Ours(args, converted), Theirs(hf)
    console = Console()
    worst = check_same_logits([theirs, ours], tokens, args)
    console.print(f"one model: logits within {worst:.1e} up to {args.index_topk} tokens, the top-k")
    results: dict[int, dict[str, Measurement]] = {}
    for context in sorted(flags.contexts):
        sides: list[Side] = [theirs, ours] if context <= THEIRS_UP_TO else [ours]
        results[context] = measure(sides, tokens, context, flags.decode_steps)
        for side in sides:
            side.clear()
    console.print(results_table(results))
    if (grown := growth(results)) is not None:
        console.print(f"our decode step at 32K takes {grown:.2f}x that at 2K")
    versions = {name: version(name) for name in ("torch", "transformers")}
    about = machine() | versions | {"torch_threads": torch.get_num_threads(), "load_before": load_before}
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    if flags.profile:
        context = max(flags.contexts)
        console.print(f"our decode step at {context} tokens, 20 steps:")
        print(profile_decode(ours, tokens, context))
    measured = {str(c): {name: dataclasses.asdict(m) for name, m in s.items()} for c, s in results.items()}
    record = {"machine": about, "logits_within": worst, "results": measured, "ratios": ratios(results)}
    print(json.dumps(record | {"decode_32k_over_2k": grown}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=HelpFormatter
    )
    contexts = [512, 2048, 8192, 32768]
    parser.add_argument("--contexts", type=int, nargs="+", default=contexts, help="tokens")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    parser.add_argument("--decode-steps", type=int, default=64, help="timed at each context")
    parser.add_argument("--config", type=Path, default=CONFIG, help="model config")
    parser.add_argument("--profile", action="store_true", help="where a decode step of ours goes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
