"""What it costs to keep the latents elsewhere: decode speed and bytes moved against the share in HBM.

The trained needle-2k model is told some hundred numbers and asked for one after another, turn by
turn, as in its training, so that its selections move as in a lookup. The first prompt is computed
once, with everything in HBM. Every setup starts from a copy of that cache and decodes the same
tokens, questions and right answers alike, one token per step. In each round every setup does one
step, in rotating order, so that other load falls on all; a ratio compares a setup's step with the
all-HBM step of the same round. Logits are compared bit for bit. Every fourth round is not timed but
reported by the engine, for the hit rate.

HBM is host memory here, and so is the RAM pool: hits, bytes and operations are what this model asks
for, the times are what software costs. `--store sim:pcie5-x16+ram` models what the bytes would take
on a link: nothing waits for it, the column `store ms` holds it.

    python3 scripts/bench/offload.py                       # 8K tokens, two minutes
    python3 scripts/bench/offload.py --context 2048 --shares 50 --policies lru --store mmap:/tmp/units
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from machine import announce, flag_parser
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.kv.stores.interface import StoreStats
from dsatrace.kv.tiers.fetches import HBM, LOCAL, FetchCounters, LayerFetch
from dsatrace.kv.tiers.residency import TIER_POLICIES
from dsatrace.model.batch import Batch, Span
from dsatrace.model.cache import KVCache
from dsatrace.model.selection import Selection
from dsatrace.model.transformer import Transformer
from dsatrace.report.drawing import FORMATS, picture
from dsatrace.runner.offload.cache import OffloadedCache, tokens_of_unit, unit_bytes
from dsatrace.runner.offload.opening import open_tiers
from dsatrace.runner.settings import Granularity, OffloadSettings, PrefetchKind
from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.generator import generate
from dsatrace.workloads.tokenizer import load_tokenizer
from train_needle.export import load_exported
from train_needle.samples import Talk

MODEL = Path(__file__).resolve().parents[2] / "data" / "models" / "needle-2k"
TASK = "niah_multikey_2"  # every line of the prompt is a number that may be asked for
TOLD = re.compile(r"One of the special magic numbers for (\S+) is: (\d+)\.")
CHUNK = 256  # tokens of a prefill step
WARM_UP = 16  # rounds that count for nothing: what a prefill leaves in HBM is not what decode reads
REPORTED = 4  # every so many rounds the engine reports what it fetched, which takes time
ROWS = "row"
ROW_BLOCK = 16  # tokens of a block where rows move: a unit of allocation only
MARKERS = "osD^v*P"
DASHES = ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)))
CONSOLE = Console(width=150, highlight=False)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A prompt and what comes after it."""

    prompt: list[int]
    then: list[int]  # of the answer and the turns that follow, a token a step
    is_answer: list[bool]  # of each of `then`: the model's to say


@dataclasses.dataclass(frozen=True)
class Case:
    """One setup beside all-HBM."""

    unit: str  # moved as one: `row`, or the tokens of a block
    policy: str
    prefetch: PrefetchKind
    share: int  # percent of the blocks that HBM holds

    @property
    def granularity(self) -> Granularity:
        return "row" if self.unit == ROWS else "block"

    @property
    def block_size(self) -> int:
        return ROW_BLOCK if self.unit == ROWS else int(self.unit)


@dataclasses.dataclass(frozen=True)
class Moved:
    """Counters of an offloaded cache and its pool; subtract two for the steps in between."""

    counters: FetchCounters
    bytes_read: int  # from the pool, latents alone
    bytes_written: int  # into it
    store: StoreStats

    @classmethod
    def so_far(cls, cache: OffloadedCache) -> Moved:
        tiers, store = cache.tiers, cache.tiers.stats()[LOCAL]
        assert store is not None
        read, written = (int(x[LOCAL]) * cache.unit_bytes for x in (tiers.read_units, tiers.written_units))
        return cls(cache.total, read, written, store)

    def __sub__(self, earlier: Moved) -> Moved:
        return Moved(
            self.counters - earlier.counters,
            self.bytes_read - earlier.bytes_read,
            self.bytes_written - earlier.bytes_written,
            self.store - earlier.store,
        )


@dataclasses.dataclass(kw_only=True)
class Side:
    """A cache and what its rounds took."""

    cache: KVCache
    step_s: dict[int, float] = dataclasses.field(default_factory=dict)  # by round, timed ones only


@dataclasses.dataclass(kw_only=True)
class Offloaded(Side):
    """A cache with most of its latents in the pool."""

    case: Case
    cache: OffloadedCache
    before: Moved | None = None  # when the warm-up ended
    requested_tokens: int = 0  # of the rounds that were reported
    hit_tokens: int = 0

    def note(self, fetch: LayerFetch) -> None:
        self.requested_tokens += int((fetch.served_by >= HBM).sum())
        self.hit_tokens += int((fetch.served_by == HBM).sum())


@dataclasses.dataclass(frozen=True)
class Measured:
    """One case. Bytes, operations and the pool's time are means per step, all layers together."""

    tokens_per_s: float  # of the median step
    ratio: float  # to all-HBM: median over the rounds
    ratio_quartiles: tuple[float, float]
    hit_rate: float  # of selected tokens
    read_bytes: float  # from the pool
    written_bytes: float  # into it
    read_over_selected: float  # bytes read over those of all selected tokens, hits included
    read_ops: float
    store_ms: float  # reads and writes
    recall: float | None  # of the prefetch, see `Prefetcher`
    precision: float | None


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table."""

    case: Case
    hbm_blocks: int  # that the share comes to, a layer
    needs_blocks: int  # most that one layer selected in one step
    num_blocks: int
    measured: Measured | None  # None: HBM does not hold one step


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The whole run, as `--json` writes it."""

    machine: dict[str, Any]
    prompt_tokens: int
    steps: int
    store: str
    latency_kind: str  # of the store's times
    answers: tuple[int, int]  # tokens of answers that the model says by itself, and all of them
    selected_bytes: int  # of all tokens that one step selects
    all_hbm_tokens_per_s: float
    lines: list[Line]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    torch.set_num_threads(args.threads)
    about = announce("torch", "numpy", "numba", threads=args.threads)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="offload-"))
        model = load_exported(MODEL, Path(scratch))
        outcome = run(model, args, stack, about)
    show(outcome)
    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(outcome), indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(outcome, args.plot)
    return 0


def run(
    model: Transformer, args: argparse.Namespace, stack: contextlib.ExitStack, about: dict[str, Any]
) -> Outcome:
    talk = dialogue(args.context, WARM_UP + args.steps)
    num_tokens = len(talk.prompt) + len(talk.then)
    whole = Side(cache=model.new_cache(-(-num_tokens // ROW_BLOCK), ROW_BLOCK))
    needed = dict.fromkeys(args.units, 0)
    logits = decode_all(model, whole.cache, talk, needed)
    lines, sides = list[Line](), list[Offloaded]()
    for case in cases_of(args):
        num_blocks = -(-num_tokens // case.block_size)
        hbm_blocks = max(1, num_blocks * case.share // 100)
        needs = -(-needed[case.unit] // (case.block_size if case.unit == ROWS else 1))
        lines.append(Line(case, hbm_blocks, needs, num_blocks, None))
        if hbm_blocks >= needs:
            sides.append(offloaded(model, whole.cache, case, num_blocks, hbm_blocks, args.store, stack))
    race(model, [whole, *sides], talk, logits)
    selected = model.args.n_layers * model.args.index_topk * whole.cache.latent_bytes_per_token
    measured = {side.case: measure(side, whole, args.steps, selected) for side in sides}
    kinds = [Moved.so_far(side.cache).store.latency_kind for side in sides]
    said = [int(row[0].argmax()) == token for row, token in zip(logits, talk.then, strict=False)]
    right = [told for told, due in zip(said, talk.is_answer, strict=True) if due]
    return Outcome(
        about,
        len(talk.prompt),
        args.steps,
        args.store,
        kinds[0] if kinds else "none",
        (sum(right), len(right)),
        selected,
        1 / statistics.median(whole.step_s.values()),
        [dataclasses.replace(line, measured=measured.get(line.case)) for line in lines],
    )


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for what argparse lets through."""
    if args.context < 512 or args.steps < REPORTED or args.threads < 1:
        raise UserError(f"use --context from 512, --steps from {REPORTED} and --threads from 1 on")
    if not all(1 <= share <= 100 for share in args.shares):
        raise UserError(f"--shares {' '.join(map(str, args.shares))}: they are percent, from 1 to 100")
    if args.plot and args.plot.suffix.removeprefix(".") not in FORMATS:
        raise UserError(f"--plot {args.plot}: name a file that ends in .{', .'.join(FORMATS)}")
    for unit in args.units:
        if unit != ROWS and not (unit.isdecimal() and int(unit)):
            raise UserError(f"--units {unit}: use row, or the tokens of a block")


def cases_of(args: argparse.Namespace) -> Iterator[Case]:
    """With all blocks in HBM nothing is evicted or fetched, so policy and prefetch do not matter."""
    for unit in args.units:
        for share in args.shares:
            if share == 100:
                yield Case(unit, args.policies[0], "none", share)
            else:
                yield from (
                    Case(unit, *how, share) for how in itertools.product(args.policies, args.prefetch)
                )


def dialogue(context: int, num_steps: int) -> Dialogue:
    """A prompt of `context` tokens with its answer, and as many more questions as `num_steps` take."""
    tokenizer, draw = load_tokenizer(MODEL), random.Random(0)
    example = next(generate(TASK, context, tokenizer, num_examples=1, seed=0))
    told = TOLD.findall(example.prompt)
    talk = Talk(tokenizer)
    talk.ask(example.prompt, example.answer_prefix, f" {example.references[0]}.")
    start = talk.answers[0][0]
    while len(talk.ids) < start + num_steps:
        key, value = draw.choice(told)
        text, prefix = texts.niah("number", "", key, plural=False)
        talk.ask(text.rpartition("\n")[2], prefix, f" {value}.")
    due = {token for first, end in talk.answers for token in range(first, end)}
    end = start + num_steps
    return Dialogue(talk.ids[:start], talk.ids[start:end], [token in due for token in range(start, end)])


def forward(model: Transformer, cache: KVCache, first: int, tokens: Sequence[int]) -> torch.Tensor:
    span = Span(range(cache.num_blocks), first, tokens)
    logits: torch.Tensor = model(Batch.build([span], cache.block_size), cache)
    return logits


def decode_all(
    model: Transformer, cache: KVCache, talk: Dialogue, needed: dict[str, int]
) -> list[torch.Tensor]:
    """Prefills, then decodes what follows: the logits before each step, and after the last.

    Raises each of `needed`, by unit, to the most units that a layer selected in a step.
    """
    logits = []
    for first in track(range(0, len(talk.prompt), CHUNK), "prefill", console=CONSOLE, transient=True):
        before = forward(model, cache, first, talk.prompt[first : first + CHUNK])
    logits.append(before)

    def count(layer_id: int, selection: Selection) -> None:
        positions = selection.positions[selection.positions >= 0].numpy()
        for unit, most in needed.items():
            needed[unit] = max(most, len(np.unique(positions // (1 if unit == ROWS else int(unit)))))

    for indexer in model.indexers:
        indexer.on_select = count
    logits += [forward(model, cache, len(talk.prompt) + at, [token]) for at, token in enumerate(talk.then)]
    for indexer in model.indexers:
        indexer.on_select = None
    return logits


def offloaded(
    model: Transformer,
    whole: KVCache,
    case: Case,
    num_blocks: int,
    hbm_blocks: int,
    store: str,
    stack: contextlib.ExitStack,
) -> Offloaded:
    """A cache that holds what `whole` holds, most of it in a pool of its own."""
    size = case.block_size
    setup = OffloadSettings(hbm_blocks, local=store, granularity=case.granularity, tier_policy=case.policy)
    tiers = open_tiers(
        setup,
        unit_bytes(model.setup, size, case.granularity),
        num_layers=model.args.n_layers,
        num_blocks=num_blocks,
        units_per_block=size // tokens_of_unit(case.granularity, size),
        suffix=f".{case.unit}.{case.policy}.{case.prefetch}.{case.share}",
    )
    stack.callback(tiers.close)
    cache = OffloadedCache(
        model.setup,
        num_blocks,
        size,
        tiers=tiers,
        hbm_blocks=hbm_blocks,
        granularity=case.granularity,
        policy=case.policy,
        prefetch=case.prefetch,
    )
    stack.callback(cache.prefetcher.close)
    num_tokens = min(num_blocks * size, whole.num_blocks * whole.block_size)
    for first in range(0, num_tokens, CHUNK):
        here = slice(first, min(first + CHUNK, num_tokens))
        batch = Batch.build([Span(range(num_blocks), first, range(here.stop - first))], size)
        for layer_id, latent in enumerate(whole.latent):
            cache.write_latent(layer_id, batch, latent.flatten(0, 1)[here])
    for mine, theirs in (
        *zip(cache.index_k, whole.index_k, strict=True),
        *zip(cache.index_scale or [], whole.index_scale or [], strict=True),
    ):
        mine.flatten(0, 1)[:num_tokens] = theirs.flatten(0, 1)[:num_tokens]
    return Offloaded(case=case, cache=cache)


def race(model: Transformer, sides: Sequence[Side], talk: Dialogue, logits: Sequence[torch.Tensor]) -> None:
    """Every side decodes the same tokens; one whose logits differ ends the run."""
    for at in track(range(len(talk.then)), "decode", console=CONSOLE, transient=True):
        for turn in range(len(sides)):
            side = sides[(at + turn) % len(sides)]
            if not torch.equal(_step(model, side, talk, at), logits[at + 1]):
                raise UserError(f"{side}: step {at} gives other logits than with everything in HBM")


def _step(model: Transformer, side: Side, talk: Dialogue, at: int) -> torch.Tensor:
    reported: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    is_reported = at >= WARM_UP and at % REPORTED == 0
    if isinstance(side, Offloaded):
        if at == WARM_UP:
            side.before = Moved.so_far(side.cache)
        if is_reported:
            reported = side.cache.reporting(side.note)
    with reported:
        started = time.perf_counter()
        logits = forward(model, side.cache, len(talk.prompt) + at, [talk.then[at]])
        took = time.perf_counter() - started
    if at >= WARM_UP and not is_reported:
        side.step_s[at] = took
    return logits


def measure(side: Offloaded, whole: Side, num_steps: int, selected_bytes: int) -> Measured:
    assert side.before is not None
    moved = Moved.so_far(side.cache) - side.before
    ratios = [whole.step_s[at] / took for at, took in side.step_s.items()]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    counters = moved.counters
    guessed = counters.used_units + counters.missed_units
    prefetches = side.case.prefetch != "none"
    return Measured(
        tokens_per_s=1 / statistics.median(side.step_s.values()),
        ratio=ratio,
        ratio_quartiles=(low, high),
        hit_rate=side.hit_tokens / side.requested_tokens,
        read_bytes=moved.bytes_read / num_steps,
        written_bytes=moved.bytes_written / num_steps,
        read_over_selected=moved.bytes_read / num_steps / selected_bytes,
        read_ops=moved.store.read_ops / num_steps,
        store_ms=(moved.store.read_us + moved.store.write_us) / num_steps / 1e3,
        recall=counters.used_units / guessed if prefetches and guessed else None,
        precision=counters.used_units / counters.prefetched_units if counters.prefetched_units else None,
    )


def show(outcome: Outcome) -> None:
    right, said = outcome.answers
    CONSOLE.print(
        f"needle-2k, {outcome.prompt_tokens:,} tokens, then {outcome.steps} steps a setup; "
        f"pool {outcome.store}\n"
        f"everything in HBM: {outcome.all_hbm_tokens_per_s:.1f} tokens/s; a step selects "
        f"{outcome.selected_bytes / 1024:.0f} KiB; {right} of {said} tokens of answers are the model's own"
    )
    prefetches = any(line.case.prefetch != "none" for line in outcome.lines)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    for name in ("moved as", "in HBM", "policy", *(["prefetch"] if prefetches else [])):
        table.add_column(name)
    for name in (
        *("tokens/s", "of all\nHBM", "quartiles", "hit\nrate", "KiB\nread", "KiB\nwritten"),
        *("read /\nselected", "reads", f"store ms\n{outcome.latency_kind}"),
        *(["recall", "precision"] if prefetches else []),
    ):
        table.add_column(name, justify="right")
    rows = dict.fromkeys(tuple(_cells(line, prefetches)) for line in outcome.lines)
    for cells in rows:  # what does not fit, does not under any policy: said once
        table.add_row(*cells)
    table.caption = "KiB, reads and the store's ms are of one step, all layers; logits equal bit for bit"
    CONSOLE.print(table)


def _cells(line: Line, prefetches: bool) -> Iterator[str]:
    case, measured = line.case, line.measured
    yield from (unit_name(case.unit), f"{case.share} %")
    yield "any" if case.share == 100 or measured is None else case.policy
    if prefetches:
        yield "any" if measured is None else case.prefetch
    if measured is None:
        yield f"needs {line.needs_blocks / line.num_blocks:.0%}"
        return
    low, high = measured.ratio_quartiles
    yield from (f"{measured.tokens_per_s:.1f}", f"{measured.ratio:.2f}x", f"{low:.2f}-{high:.2f}")
    yield from (f"{measured.hit_rate:.1%}", f"{measured.read_bytes / 1024:,.0f}")
    yield from (f"{measured.written_bytes / 1024:,.0f}", f"{measured.read_over_selected:.2f}x")
    yield from (f"{measured.read_ops:.0f}", f"{measured.store_ms:.2f}")
    if prefetches:
        yield from ("-" if x is None else f"{x:.0%}" for x in (measured.recall, measured.precision))


def unit_name(unit: str) -> str:
    return "row" if unit == ROWS else f"block of {unit}"


def plot(outcome: Outcome, path: Path) -> None:
    """Speed, hits and bytes against the share in HBM, without prefetch: by what moves as one under the first
    policy, and by policy for what moves first. Points of one share stand side by side."""
    lines = [line for line in outcome.lines if line.case.prefetch == "none"]
    shares = sorted({line.case.share for line in lines})
    needs = {line.case.unit: line.needs_blocks / line.num_blocks for line in lines}
    policies = list(dict.fromkeys(line.case.policy for line in lines))
    unit, policy = next(iter(needs)), policies[0]
    groups: list[tuple[str, dict[str, list[Line]]]] = [
        (
            f"policy {policy}",
            {
                f"{unit_name(name)}\n(a step needs {need:.0%})": [
                    line for line in lines if line.case.unit == name and line.case.policy == policy
                ]
                for name, need in needs.items()
            },
        ),
        (
            f"moved as {unit_name(unit)}",
            {
                name: [
                    line
                    for line in lines
                    if line.case.unit == unit and (line.case.policy == name or line.case.share == 100)
                ]
                for name in policies
            },
        ),
    ]
    selected = outcome.selected_bytes / 1024
    panels: list[tuple[str, Callable[[Measured], float], float, float | None]] = [
        ("tokens/s, everything in HBM = 1", lambda m: m.ratio, 1.0, None),
        ("selected tokens found in HBM, %", lambda m: 100 * m.hit_rate, 100.0, 100.0),
        (f"KiB read a step (grey: selected, {selected:.0f})", lambda m: m.read_bytes / 1024, selected, None),
    ]
    with picture(path, (13, 7.6), rows=2, columns=3, without="another --plot") as (figure, axes):
        for row, (what, series) in enumerate(groups):
            for place, (title, value, reference, top) in zip(axes[3 * row :], panels, strict=False):
                place.axhline(reference, color="0.7", zorder=0)
                for i, (label, of_label) in enumerate(series.items()):
                    aside = 0.14 * (i - (len(series) - 1) / 2)
                    points = sorted(
                        (shares.index(line.case.share) + aside, value(line.measured))
                        for line in of_label
                        if line.measured
                    )
                    place.plot(
                        [x for x, _ in points],
                        [height for _, height in points],
                        color=f"C{i}",
                        marker=MARKERS[i % len(MARKERS)],
                        linestyle=DASHES[i % len(DASHES)],
                        linewidth=1,
                        label=label,
                        clip_on=False,
                    )
                place.set_xticks(range(len(shares)), [f"{share} %" for share in shares])
                place.set(xlabel="blocks in HBM", title=f"{title}\n{what}", ylim=(0, top))
            axes[3 * row + 2].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        figure.suptitle(
            f"What a smaller HBM costs: needle-2k at {outcome.prompt_tokens:,} tokens, 1 request, 4 layers, "
            f"{outcome.steps} decode steps, pool {outcome.store}"
        )


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = flag_parser(__doc__)
    add = parser.add_argument
    add("--context", type=int, default=8192, help="tokens of the prompt and its answer")
    add("--steps", type=int, default=128, help="decode steps after the warm-up")
    add("--units", nargs="+", default=[ROWS, "4", "16", "64"], help="row, or tokens of a block")
    add("--shares", type=int, nargs="+", default=[100, 50, 25, 10], help="percent of the blocks in HBM")
    add(
        "--policies",
        nargs="+",
        default=["lru", "fifo", "lfu", "s3-fifo", "arc"],
        choices=TIER_POLICIES,
        help="eviction policies of HBM",
    )
    add("--prefetch", nargs="+", default=["none"], choices=get_args(PrefetchKind), help="what is guessed")
    add("--store", default="ram", help="the pool: ram, mmap:PATH, redis://HOST:PORT, sim:...")
    add("--threads", type=int, default=1, help="torch threads")
    add("--json", type=Path, help="write everything there")
    add("--plot", type=Path, help="draw it there: .png, .svg or .pdf")
    return parser


if __name__ == "__main__":
    sys.exit(main())
