"""`dsatrace study size`: hit rate against bytes of cache on one device, and the size to take.

dsatrace study size requests.jsonl.gz --kv-layout deepseek-v3.2
dsatrace study size --trace-file trace.jsonl --kv-layout model/config.json --tensor-parallel 8 --replicas 4
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from dsatrace.commands.parser import count
from dsatrace.commands.progress import counted_bar
from dsatrace.commands.study import options
from dsatrace.commands.study.sweep import num_workers
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.files import read_json
from dsatrace.flags import Flag, add_flags
from dsatrace.kv.model_layout import DTYPE_BYTES, INDEXED, MAX_LAYERS, MODELS, ModelLayout, model_layout
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.model.hf_config import indexer_types
from dsatrace.study.output_folder import OutputFolder
from dsatrace.study.requests import StudyRequests
from dsatrace.study.run import StudySettings, check_size
from dsatrace.study.size import (
    MATCH_SHARE,
    MOST_LOAD,
    Routing,
    SizeCurve,
    default_sizes,
    recommendation,
    replica_traces,
    settings_of,
    size_cells,
)
from dsatrace.study.sources import Client
from dsatrace.study.spread import Kind
from dsatrace.study.sweep import num_jobs
from dsatrace.study.sweep_cells import OVERALL, SEMANTICS
from dsatrace.text import plain

INDEXED_BLOCK, PLAIN_BLOCK = 64, 16
"""Tokens of a block in vLLM: its sparse kernels take 64 only, and 16 is the default elsewhere."""
TARGET_PERCENT = 90.0
GIB = 1 << 30


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Replays the workload at every size, prints the curve and the size to take; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    layout = layout_of(args.kv_layout, args.kv_dtype, args.tensor_parallel)
    for flag, value in (("--block-size", args.block_size), ("--concurrency", args.concurrency)):
        check_size(flag, value)
    if not 0 < args.target <= 100:
        raise UserError(f"--target {args.target:g}: a share in percent, above 0 and at most 100")
    if args.routing is not None and args.replicas == 1:
        raise UserError("--routing divides requests over replicas; give --replicas of at least 2")
    given_sizes = _bytes_of(args.gib)
    path = options.output_path(args, "size")
    routing: Routing = args.routing or "round-robin"

    def traces_of(requests: StudyRequests) -> list[BlockTrace]:
        return replica_traces(requests, block_size, args.replicas, routing)

    with options.open_client(args) as client:
        requests = client.requests()
    seeds = options.seeds_of(args, client)
    kind: Kind = "seeds" if client.source.is_seeded else "conversations"
    own = requests.tokens_per_id if requests.tokens_per_id > 1 else None
    block_size = args.block_size or own or (INDEXED_BLOCK if layout.has_index else PLAIN_BLOCK)
    block_bytes = block_size * layout.bytes_per_token
    traces = traces_of(requests)
    if not any(len(trace.keys) for trace in traces):
        raise UserError(f"no prompt fills a block of {block_size} tokens; name a smaller --block-size")
    sizes = given_sizes or default_sizes(traces, block_bytes)
    settings = settings_of(sizes, block_bytes, args.concurrency, kind == "conversations")
    inputs = {(OVERALL, block_size): max(traces, key=lambda trace: len(trace.keys))}
    workers = num_workers(args.workers, inputs, settings)
    about = {
        "layout": layout.describe(),
        "block_bytes": block_bytes,
        "replicas": args.replicas,
        "routing": routing if args.replicas > 1 else None,
        "requests_of_replicas": [trace.num_requests for trace in traces],
        "settings": dataclasses.asdict(settings),
        "semantics": SEMANTICS,
        "intervals": {"over": kind, "seeds": seeds},
    }
    with options.study_folder(path, "size", argv, client, about) as folder:
        jobs = num_jobs(inputs, settings) * len(traces) * len(seeds)
        with counted_bar("size", jobs, "replays") as advance:
            of_seeds = [size_cells(traces, settings, workers, lambda: advance(1))]
            for seed in seeds[1:]:
                others = traces_of(client.reseeded(seed).requests())
                of_seeds.append(size_cells(others, settings, workers, lambda: advance(1)))
        curve = SizeCurve.of(block_bytes, sizes, of_seeds, kind)
        result = _write(folder, args, client, curve, about)

    from dsatrace.report.study_tables import size_grid

    options.show_of(client, [size_grid(result["curve"])], args.markdown)
    print(f"cache: {plain(layout.text())}; blocks of {block_size} tokens")
    if args.replicas > 1:
        print(f"replicas: {args.replicas}, {routing}; requests of each: {about['requests_of_replicas']}")
    print(f"intervals: 95 %, over {options.spread_over(seeds, [requests], kind)}")
    print(f"recommendation: {result['recommendation']['text']}")
    print(f"files: {plain(path)}")
    return 0


def _write(
    folder: OutputFolder, args: argparse.Namespace, client: Client, curve: SizeCurve, about: dict[str, Any]
) -> dict[str, Any]:
    """The curve as CSV and picture, and with the recommendation as JSON; returns those two."""
    advice = recommendation(curve, args.target / 100)
    text = advice.text("per device" if args.replicas == 1 else f"per device and replica ({args.replicas})")
    if client.vocabulary.label.get("unit") == "word":
        text += " A token is a word here; --tokenizer counts real ones."
    rows = curve.rows()
    result = {"recommendation": {**dataclasses.asdict(advice), "text": text}, "curve": rows}
    record = client.describe() | about | result
    folder.write_chosen(args.output_file, "size.json", record)
    folder.write_counts("size.csv", rows)
    if not args.skip_visualization:
        from dsatrace.report.study_figures import draw_size

        draw_size(folder.file("size.png"), options.title_of(client, None, record["intervals"]), record)
    return result


def layout_of(spec: str, dtype: str | None, tensor_parallel: int) -> ModelLayout:
    """Of a model's name, its `config.json`, or the folder of that. Raises a `UserError` of one line."""
    path, num_index_layers = Path(spec), None
    if spec in MODELS:
        values = MODELS[spec]
    else:
        path = path / "config.json" if path.is_dir() else path
        name = f"--kv-layout {spec}"
        values = read_json(path, name, unreadable=f"; use {', '.join(MODELS)} or a model's config.json")
        if not isinstance(values, dict):
            raise UserError(f"{name}: not a JSON object; give a model's config.json")
        if "dim" in values:  # the demo's spelling
            values = {**values, "model_type": "deepseek_v32", "num_hidden_layers": values.get("n_layers")}
    layers = values.get("num_hidden_layers")
    if values.get("model_type") in INDEXED and type(layers) is int and layers <= MAX_LAYERS:
        try:
            kinds = indexer_types(values) or ["full"] * layers
        except ValueError as error:
            raise UserError(f"--kv-layout {spec}: {error}") from error
        if len(kinds) != layers or not {"full", "shared"}.issuperset(map(str, kinds)):
            raise UserError(f"--kv-layout {spec}: indexer_types: name {layers} layers, each full or shared")
        num_index_layers = kinds.count("full")
    return model_layout(spec, values, dtype, tensor_parallel, num_index_layers)


def _bytes_of(gib: Sequence[float] | None) -> list[int] | None:
    if gib is None:
        return None
    if not all(0 < size < float("inf") for size in gib) or len(set(gib)) != len(gib):
        raise UserError(f"--gib: different sizes above 0: {' '.join(f'{size:g}' for size in gib)}")
    return sorted(round(size * GIB) for size in gib)


def _parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        "size",
        "How many GiB of cache a workload is worth: hit rates of LRU, vLLM's pool and OPT by size.",
        """
        %(prog)s requests.jsonl.gz --tokenizer deepseek-ai/DeepSeek-V3.2 --kv-layout deepseek-v3.2
        %(prog)s --trace-file conversation_trace.jsonl --kv-layout glm-5 --gib 8 16 32 64
        %(prog)s --workloads qa chat_multi --kv-layout Qwen3-8B/config.json --tensor-parallel 2
        """,
    )
    options.add_request_arguments(parser)
    add = parser.add_argument_group("cache").add_argument
    add(
        "--kv-layout",
        required=True,
        metavar="MODEL",
        help=f"{', '.join(MODELS)}, a model's config.json, or its folder: says the bytes of a token",
    )
    add(
        "--kv-dtype",
        choices=DTYPE_BYTES,
        help="number format of the cache (default: the model's; fp8 with an indexer)",
    )
    add(
        "--tensor-parallel",
        type=count,
        default=1,
        metavar="N",
        help="ranks that serve one model: they divide KV heads; latents stand on each (default: 1)",
    )
    add(
        "--block-size",
        type=int,
        metavar="TOKENS",
        help=f"tokens per block (default: a trace's, {INDEXED_BLOCK} with an indexer, else {PLAIN_BLOCK})",
    )
    add(
        "--gib",
        nargs="+",
        type=float,
        metavar="GIB",
        help="sizes of the cache on one device (default: powers of two up to what holds the whole workload)",
    )
    add(
        "--target",
        type=float,
        default=TARGET_PERCENT,
        metavar="PERCENT",
        help="share of what any size could serve (default: 90)",
    )
    add(
        "--replicas",
        type=count,
        default=1,
        metavar="N",
        help="copies of the model, each with such a cache (default: 1)",
    )
    add(
        "--routing",
        choices=get_args(Routing),
        help="prefix-affine: the replica that served the longest known prefix last, if that is at least "
        f"{MATCH_SHARE:g} of the prompt and it has at most {MOST_LOAD:g} times an even share of the tokens; "
        "else the one given the fewest (default: round-robin)",
    )
    add_flags(add, StudySettings, {"concurrency": Flag("requests in flight, which hold their blocks")})
    options.add_seeds_argument(add)
    add("--workers", type=count, help="processes (default: as many as pay, at most one per core)")
    options.add_output_arguments(parser, "the result")
    return parser
