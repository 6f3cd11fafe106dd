"""`dsatrace estimate`: how large a trace will be, and what it takes, before it is run.

dsatrace estimate --config inference/config_671B_v3.2.json --steps 1000 --batch 4 --context 32768
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsatrace.commands.arguments import add_ignore_config_key
from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.flags import add_flags
from dsatrace.schema import LEVELS, MISSING, UNITS, Level
from dsatrace.trace.config import FLAGS, TraceConfig
from dsatrace.units import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from dsatrace.model.config import ModelArgs
    from dsatrace.trace.estimate import Size, TraceLoad
    from dsatrace.trace.kind import SelectionKind


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the estimate; returns the exit code."""
    args = _parser().parse_args(argv)
    load = _load(args)

    from dsatrace.trace.estimate import draw_sample, estimate_sizes

    levels: Sequence[Level] = LEVELS if args.level is None else (args.level,)
    if load.kind is not None:
        if levels not in (LEVELS, ("full",)):
            raise UserError(
                f"--trace-level {args.level}: selections of other units are recorded whole; use full"
            )
        levels = ("full",)
    sizes = {level: estimate_sizes(load, level) for level in levels}
    sample = draw_sample(load, levels[0], "clustered")
    rate = sample.records_per_second
    step_records = load.num_sets * min(load.batch_size, load.requests)
    queue_steps = args.trace_queue_steps
    if args.json:
        estimate = {
            "num_records": load.num_records,
            "sizes": [
                {"level": level, **dataclasses.asdict(size)} for level in levels for size in sizes[level]
            ],
            "ring_bytes": load.ring_bytes(queue_steps),
            "queue_bytes": queue_steps * load.queue_slot_bytes,
            "parquet_waiting_bytes": sample.waiting_bytes,
            "measured_level": levels[0],
            "measured_records_per_s": round(rate),
            "records_per_step": step_records,
        }
        print(json.dumps(estimate, indent=1))
        return 0

    from rich.console import Console

    console = Console(width=100)
    console.print(_table(load, sizes))
    console.print(
        "Modelled: made-up selections through the real encoders, from clustered to uniform ones; "
        "requests.jsonl and summary.json are small beside this."
    )
    console.print(
        f"Host memory: {size_text(load.ring_bytes(queue_steps))} of ring, of which the queue's {queue_steps} "
        f"waiting steps take {size_text(queue_steps * load.queue_slot_bytes)}; with --trace-format parquet "
        f"up to {size_text(sample.waiting_bytes)} of records that wait for their part, too."
    )
    console.print(
        f"Measured here, level {levels[0]}: {rate:,.0f} records/s from one writer thread, so tracing "
        f"every step keeps up with {rate / step_records:,.1f} steps/s of {step_records} records."
    )
    return 0


def _load(args: argparse.Namespace) -> TraceLoad:
    from dsatrace.kv.layout import named_layouts
    from dsatrace.model.config import ModelArgs
    from dsatrace.trace.estimate import TraceLoad
    from dsatrace.trace.manifest import shared_layers

    for flag in ("steps", "batch", "requests", "context", "kv_block_size", "trace_queue_steps"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: use at least 1")
    if not 0 < args.trace_sample_rate <= 1:
        raise UserError(f"--trace-sample-rate {args.trace_sample_rate}: use a share above 0, at most 1")
    if args.trace_store_scores and args.level not in (None, "full"):
        raise UserError(f"--trace-store-scores needs the positions; use --trace-level full, not {args.level}")
    try:
        model = ModelArgs.from_json(args.config, args.ignore_config_keys)
    except ValueError as error:
        raise UserError(str(error)) from error
    return TraceLoad(
        num_layers=model.n_layers,
        top_k=model.index_topk,
        context=args.context or max(1, model.max_seq_len - args.steps),
        num_steps=args.steps,
        batch_size=args.batch,
        num_requests=args.requests,
        block_size=args.kv_block_size,
        store_scores=args.trace_store_scores,
        sample_rate=args.trace_sample_rate,
        layout=named_layouts(model.kv_lora_rank, model.qk_rope_head_dim, model.index_head_dim)["demo"],
        shared_layers=shared_layers(model.source_layers),
        kind=_kind(args, model),
    )


def _kind(args: argparse.Namespace, model: ModelArgs) -> SelectionKind | None:
    """None: token positions, one set per layer, as the engine records them."""
    from dsatrace.trace.kind import Layer, SelectionKind

    for flag in ("unit_tokens", "heads"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: use at least 1")
    unit, sizes = args.unit, (args.unit_tokens, args.heads)
    if unit in ("token", "expert") and args.unit_tokens != 1:
        raise UserError(f"--unit-tokens {args.unit_tokens}: of a {unit} it is 1; give --unit entry or block")
    if unit == "expert":
        if sizes != (1, 1):
            raise UserError(f"--heads {args.heads}: experts are routed once per layer; leave it out")
        routed = model.n_layers - model.n_dense_layers
        layers = [Layer(0, heads=0)] * model.n_dense_layers + [Layer(model.n_activated_experts)] * routed
        missing = tuple(name for name in MISSING if name != "scores" or not args.trace_store_scores)
        return SelectionKind(
            tuple(layers), unit, num_ids=model.n_routed_experts, door="import", missing=missing
        )
    if (unit, *sizes) == ("token", 1, 1):
        return None
    sources = [source if source != i else None for i, source in enumerate(model.source_layers)]
    of_layers = tuple(Layer(model.index_topk, args.heads, source) for source in sources)
    return SelectionKind(of_layers, unit, args.unit_tokens, door="attach", missing=("tiers",))


def _table(load: TraceLoad, sizes: Mapping[Level, Sequence[Size]]) -> Table:
    from rich.table import Table

    from dsatrace.trace.estimate import FORMATS

    table = Table(
        title=f"Estimate: {load.num_records:,} records = {load.requests} requests x {load.num_steps} steps x "
        f"{load.num_sets} {'layers' if load.kind is None else 'sets'}, {load.context:,} tokens of context",
        title_justify="left",
    )
    for name in ("level", "format", "bytes per record", "total", "how"):
        table.add_column(name, justify="right" if name in ("bytes per record", "total") else "left")
    for level, of_level in sizes.items():
        for size in of_level:
            low, high = size.bytes_per_record
            total = " - ".join(size_text(n) for n in size.total_bytes)
            table.add_row(level, size.format, f"{low:,.0f} - {high:,.0f}", total, FORMATS[size.format])
    return table


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "estimate",
        "Say how large a trace will be, before it is run.",
        examples="""
        %(prog)s --config inference/config_671B_v3.2.json --steps 1000 --batch 4 --context 32768
        %(prog)s --config inference/config_tiny.json --steps 100 --batch 1 --level full --json
        """,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="model config, such as config_671B_v3.2.json")
    add_ignore_config_key(add)
    add("--json", action="store_true", help="print the numbers as JSON; sizes are in bytes")
    add("--steps", type=int, required=True, help="decode steps per request: new tokens but the first")
    add("--batch", type=int, required=True, help="requests at a time")
    add("--requests", type=int, help="total requests (default: one batch)")
    add("--context", type=int, help="tokens per prompt (default: what the config's max_seq_len leaves)")
    add("--trace-level", "--level", dest="level", choices=LEVELS, help="one level (default: every level)")
    add("--unit", choices=UNITS, default="token", help="what an id stands for (default: token)")
    add("--unit-tokens", type=int, default=1, metavar="N", help="tokens per entry or block (default: 1)")
    add("--heads", type=int, default=1, metavar="N", help="sets per layer: KV heads (default: 1)")
    of_trace = ("store_scores", "sample_rate", "block_size", "queue_steps")
    add_flags(add, TraceConfig, {field: FLAGS[field] for field in of_trace})
    return parser
