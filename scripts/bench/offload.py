"""What it costs to keep the latents elsewhere: decode speed and bytes moved against the share in HBM.

The trained needle-2k model answers a long needle-in-a-haystack prompt; its selections are those of
a model that looks things up, not random ones. The prompt is computed once, with everything in HBM.
Every setup starts from a copy of that cache and decodes the same tokens, the setups taking turns of
a few steps, so that whatever else the machine does falls on all. Logits are compared bit for bit.
HBM is host memory here, as is the RAM pool: what is measured is the software's cost, the bytes and
the hits; what those bytes cost on a link is modelled with `--store sim:pcie5-x16+ram`, say.

    python3 scripts/bench/offload.py                       # 8K tokens, some minutes
    python3 scripts/bench/offload.py --context 2048 --shares 50 --policies lru --store mmap:/tmp/units
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))

from dsatrace.engine.config import GRANULARITIES, PREFETCH_KINDS, OffloadSetup
from dsatrace.engine.offload import OffloadedCache, tokens_of_unit, unit_bytes
from dsatrace.engine.tiers import open_tiers
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.kv.fetches import NUM_TIERS, FetchCounters
from dsatrace.model.batch import Batch, Span
from dsatrace.model.cache import KVCache
from dsatrace.model.checkpoint import load_checkpoint
from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.transformer import Transformer
from dsatrace.workloads.needle import needle_prompt
from dsatrace.workloads.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "data" / "models" / "needle-2k"
CHUNK = 256  # tokens of a prefill step
TURN = 8  # decode steps of one setup before it is the next one's turn
WARM_UP = 8  # steps that are not timed: what a prefill leaves in HBM is not what decode reads
BOX = Console(width=132, highlight=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """One setup beside all-HBM."""

    granularity: str
    policy: str
    prefetch: str
    share: int  # percent of the blocks that HBM holds


@dataclasses.dataclass
class Side:
    """A cache and what its steps took; `case` None: everything in HBM."""

    case: Case | None
    cache: KVCache
    step_s: list[float] = dataclasses.field(default_factory=list)
    before: FetchCounters | None = None  # when the timed steps began
    before_bytes: int = 0
    error: str | None = None  # why it cannot run at this share

    def counted(self) -> tuple[FetchCounters, int]:
        """Counters of all layers, and bytes read from and written to the pool."""
        assert isinstance(self.cache, OffloadedCache)
        tiers = self.cache.tiers
        units = sum(int(tiers.read_units[t] + tiers.written_units[t]) for t in range(NUM_TIERS))
        return self.cache.total, units * self.cache.unit_bytes


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.context < 512 or args.steps < 1 or not all(1 <= share <= 100 for share in args.shares):
        raise UserError("--context from 512 on, --steps from 1 on, --shares from 1 to 100 percent")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offload-")))
        model, tokens = load_model(folder), prompt_tokens(args.context)
        num_blocks = -(-(len(tokens) + WARM_UP + args.steps) // args.block_size)
        whole = Side(None, model.new_cache(num_blocks, args.block_size))
        answer = decode_all(model, whole, tokens, WARM_UP + args.steps)
        cases = [
            Case(granularity, policy, prefetch, share)
            for granularity in args.granularities
            for policy in args.policies
            for prefetch in args.prefetch
            for share in args.shares
        ]
        sides = [whole, *(offloaded(model, whole.cache, case, args, stack) for case in cases)]
        race(model, sides, tokens, answer, args.steps)
    rows = results(sides, args)
    show(rows, len(tokens), args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot(rows, args)
    return 0


def load_model(folder: Path) -> Transformer:
    args = ModelArgs.from_json(MODEL / "serving_config.json")
    convert_checkpoint(MODEL, folder, args.n_routed_experts, model_parallel=1)
    with torch.device("meta"):
        model = Transformer(args)
    load_checkpoint(model, folder)
    return model.eval()


def prompt_tokens(context: int) -> list[int]:
    tokenizer = load_tokenizer(MODEL)
    prompt = needle_prompt(context, lambda text: len(tokenizer.encode(text)), depth=0.5, seed=0)
    return list(tokenizer.encode(prompt.text))


def forward(model: Transformer, cache: KVCache, first: int, tokens: Sequence[int]) -> torch.Tensor:
    span = Span(range(cache.num_blocks), first, tokens)
    return model(Batch.build([span], cache.block_size), cache)


def decode_all(
    model: Transformer, whole: Side, tokens: Sequence[int], num_steps: int
) -> list[tuple[int, torch.Tensor]]:
    """Prefills, and decodes greedily once: each step's input token and the logits it gives."""
    for first in track(range(0, len(tokens), CHUNK), "prefill", console=BOX, transient=True):
        logits = forward(model, whole.cache, first, tokens[first : first + CHUNK])
    answer = []
    for position in range(len(tokens), len(tokens) + num_steps):
        token = int(logits[0].argmax())
        logits = forward(model, whole.cache, position, [token])
        answer.append((token, logits))
    return answer


def offloaded(
    model: Transformer, whole: KVCache, case: Case, args: argparse.Namespace, stack: contextlib.ExitStack
) -> Side:
    """A cache that holds what `whole` holds, most of it in the pool."""
    size, num_blocks = whole.block_size, whole.num_blocks
    setup = OffloadSetup(
        hbm_blocks=max(1, num_blocks * case.share // 100),
        local=args.store,
        granularity=case.granularity,
        tier_policy=case.policy,
        prefetch=case.prefetch,
    )
    tiers = open_tiers(
        setup,
        unit_bytes(model.setup, size, setup.granularity),
        num_layers=model.args.n_layers,
        num_blocks=num_blocks,
        units_per_block=size // tokens_of_unit(setup.granularity, size),
        suffix=f".{case.granularity}.{case.policy}.{case.prefetch}.{case.share}",
    )
    stack.callback(tiers.close)
    cache = OffloadedCache(
        model.setup,
        num_blocks,
        size,
        tiers=tiers,
        hbm_blocks=setup.hbm_blocks,
        granularity=setup.granularity,
        policy=case.policy,
        prefetch=setup.prefetch,
    )
    stack.callback(cache.prefetcher.close)
    num_tokens = num_blocks * size
    for first in range(0, num_tokens, CHUNK):
        here = slice(first, min(first + CHUNK, num_tokens))
        batch = Batch.build([Span(range(num_blocks), first, range(here.stop - first))], size)
        for layer_id, latent in enumerate(whole.latent):
            cache.write_latent(layer_id, batch, latent.flatten(0, 1)[here])
    for mine, theirs in zip(cache.index_k, whole.index_k, strict=True):
        mine.copy_(theirs)
    for mine, theirs in zip(cache.index_scale or [], whole.index_scale or [], strict=True):
        mine.copy_(theirs)
    return Side(case, cache)


def race(
    model: Transformer,
    sides: Sequence[Side],
    tokens: Sequence[int],
    answer: Sequence[tuple[int, torch.Tensor]],
    num_steps: int,
) -> None:
    """Every side decodes the same tokens, in turns; a side whose logits differ ends the run."""
    firsts = range(0, WARM_UP + num_steps, TURN)
    for first in track(firsts, "decode", console=BOX, transient=True):
        for side in sides:
            if side.error is None:
                _turn(model, side, len(tokens), answer, range(first, min(first + TURN, WARM_UP + num_steps)))


def _turn(
    model: Transformer,
    side: Side,
    prompt_len: int,
    answer: Sequence[tuple[int, torch.Tensor]],
    steps: range,
) -> None:
    for step in steps:
        if step == WARM_UP and side.case is not None:
            side.before, side.before_bytes = side.counted()
        token, expected = answer[step]
        started = time.perf_counter()
        try:
            logits = forward(model, side.cache, prompt_len + step, [token])
        except UserError as error:  # HBM does not hold what a step selects
            side.error = str(error)
            return
        if step >= WARM_UP:
            side.step_s.append(time.perf_counter() - started)
        if not torch.equal(logits, expected):
            raise UserError(f"{side.case}: step {step} gives other logits than with everything in HBM")


def results(sides: Sequence[Side], args: argparse.Namespace) -> list[dict[str, object]]:
    """A row a side: medians and means over the timed steps."""
    base_s = statistics.median(sides[0].step_s)
    rows: list[dict[str, object]] = [{"share": 100, "tokens_per_s": 1 / base_s, "ratio": 1.0}]
    for side in sides[1:]:
        assert side.case is not None
        row: dict[str, object] = dataclasses.asdict(side.case)
        if side.error is not None or side.before is None:
            rows.append(row | {"error": side.error})
            continue
        now, num_bytes = side.counted()
        change = now - side.before
        step_s = statistics.median(side.step_s)
        guessed = change.used_units + change.missed_units
        rows.append(
            row
            | {
                "tokens_per_s": 1 / step_s,
                "ratio": base_s / step_s,
                "hit_rate": change.hit_units / change.requested_units,
                "fetched_units_per_step": change.fetched_units / args.steps,
                "bytes_per_step": (num_bytes - side.before_bytes) / args.steps,
                "recall": change.used_units / guessed if guessed else None,
                "precision": change.used_units / change.prefetched_units if change.prefetched_units else None,
            }
        )
    return rows


def show(rows: Sequence[dict[str, object]], context: int, args: argparse.Namespace) -> None:
    title = (
        f"needle-2k, context {context}, blocks of {args.block_size} tokens, pool {args.store}; "
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"medians of {args.steps} steps, logits equal bit for bit"
    )
    table = Table(title=title, title_justify="left")
    for name in ("moved as", "policy", "prefetch"):
        table.add_column(name)
    for name in (
        "in HBM",
        "tokens/s",
        "of all-HBM",
        "hit rate",
        "units/step",
        "KiB/step",
        "recall",
        "precision",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [str(row.get(name, "-")) for name in ("granularity", "policy", "prefetch")]
        cells.append(f"{row['share']} %")
        if row.get("error"):
            table.add_row(*cells, "does not hold one step")
            continue
        cells += [f"{row['tokens_per_s']:.1f}", f"{row['ratio']:.2f}x"]
        cells += [_shown(row.get("hit_rate"), "{:.1%}"), _shown(row.get("fetched_units_per_step"), "{:.1f}")]
        bytes_per_step = row.get("bytes_per_step")
        cells.append("-" if bytes_per_step is None else f"{bytes_per_step / 1024:.1f}")
        table.add_row(*cells, _shown(row.get("recall"), "{:.0%}"), _shown(row.get("precision"), "{:.0%}"))
    BOX.print(table)


def _shown(value: object, form: str) -> str:
    return "-" if value is None else form.format(value)


def plot(rows: Sequence[dict[str, object]], args: argparse.Namespace) -> None:
    """Speed and bytes against the share in HBM, a line a granularity and policy; without prefetch."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, moved) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for granularity, policy in _lines(rows):
        points = [
            row
            for row in rows
            if (row.get("granularity"), row.get("policy")) == (granularity, policy)
            and row.get("prefetch") == "none"
            and not row.get("error")
        ]
        shares = [row["share"] for row in points]
        style = "-" if granularity == "block" else "--"
        label = f"{granularity}, {policy}"
        speed.plot(shares, [row["ratio"] for row in points], style, marker="o", label=label)
        moved.plot(shares, [row["bytes_per_step"] / 1024 for row in points], style, marker="o", label=label)
    speed.set(xlabel="blocks in HBM (%)", ylabel="tokens/s, all-HBM = 1", ylim=(0, None))
    moved.set(xlabel="blocks in HBM (%)", ylabel="KiB moved a decode step", ylim=(0, None))
    speed.legend()
    figure.suptitle(f"needle-2k at {args.context} tokens, latents in {args.store}: what a smaller HBM costs")
    figure.savefig(args.plot, dpi=110)
    plt.close(figure)


def _lines(rows: Sequence[dict[str, object]]) -> Iterator[tuple[object, object]]:
    yield from dict.fromkeys((row["granularity"], row["policy"]) for row in rows if "granularity" in row)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=8192, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps (%(default)s)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block (%(default)s)")
    parser.add_argument("--store", default="ram", help="the pool (%(default)s)")
    parser.add_argument("--shares", type=int, nargs="+", default=[100, 50, 25, 10], help="percent in HBM")
    parser.add_argument("--policies", nargs="+", default=["lru", "fifo", "lfu"], help="who leaves HBM")
    parser.add_argument("--granularities", nargs="+", default=list(GRANULARITIES), choices=GRANULARITIES)
    parser.add_argument("--prefetch", nargs="+", default=["none"], choices=PREFETCH_KINDS)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--plot", type=Path, help="draw them there (PNG)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
