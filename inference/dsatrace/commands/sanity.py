"""The trace's files with nothing installed: made-up selections through the plain implementation.

Standard library only, for a first look at the format on any machine. The selections are
synthetic: they show what a record is, and nothing about what a model reads.

    python3 -S inference/sanity_trace_no_torch.py
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsatrace.commands.parser import CommandParser
from dsatrace.commands.verify import verify_run
from dsatrace.errors import exits_cleanly
from dsatrace.files import digest_of, write_json
from dsatrace.kv.layout import CacheLayout
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE, encode
from dsatrace.text import plain
from dsatrace.trace.config import TraceConfig, check_run_folder, default_run_folder
from dsatrace.trace.manifest import RunInfo, manifest
from dsatrace.trace.request_facts import RequestFacts, request_line
from dsatrace.verify.plain_record import PlainSelection, step_record
from dsatrace.verify.plain_summary import summarize
from dsatrace.workloads.request import Request

TOP_K = 64
NUM_LAYERS = 4
NUM_STEPS = 8
PROMPT_TOKENS = {"r0": 40, "r1": 480, "r2": 512}  # r0 stays dense; r2 begins like r1
SHARED_TOKENS = {"r0": 0, "r1": 0, "r2": 320}
LAYOUT = CacheLayout("demo", latent_bytes_per_token=1152, index_bytes_per_token=132)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    out = Path(args.trace_out).absolute() if args.trace_out else default_run_folder("sanity_no_torch")
    check_run_folder(out)
    config = TraceConfig(out=out, seed=args.seed)
    num_records = write_run(config)
    print(f"wrote {num_records} records of synthetic selections: {plain(out)}")
    print("they show the format; being made up, they say nothing about what a model selects")
    return verify_run(out)


def write_run(config: TraceConfig) -> int:
    """Writes the four files; returns how many step records there are."""
    run = RunInfo(
        model_config={"n_layers": NUM_LAYERS, "index_topk": TOP_K},
        layouts=(LAYOUT,),
        device="none",
        argv=sys.argv,
        data_source="embedded",
        seed=config.seed,
        selections="synthetic",
    )
    config.out.mkdir(parents=True, exist_ok=True)
    key_id = hashlib.sha256(b"synthetic prompts need no secret").hexdigest()[:8]
    write_json(config.out / MANIFEST_FILE, manifest(run, config, "running", key_id=key_id))
    records = [
        step_record(
            selection,
            block_size=config.block_size,
            latent_bytes=LAYOUT.latent_bytes_per_token,
            index_bytes=LAYOUT.index_bytes_per_token,
        )
        for selection in synthetic_selections(config)
    ]
    _write_lines(config.out / STEPS_FILE, records)
    requests = [_request_line(name) for name in PROMPT_TOKENS]
    _write_lines(config.out / REQUESTS_FILE, requests)
    summary = summarize(
        records,
        requests=requests,
        top_k=TOP_K,
        block_sizes=config.compared_block_sizes,
    )
    write_json(config.out / SUMMARY_FILE, summary)
    files = {name: digest_of(config.out / name) for name in (STEPS_FILE, REQUESTS_FILE, SUMMARY_FILE)}
    write_json(config.out / MANIFEST_FILE, manifest(run, config, "complete", key_id=key_id, files=files))
    return len(records)


def synthetic_selections(config: TraceConfig) -> Iterator[PlainSelection]:
    """Made to look like attention: sinks, recent tokens and clusters that stay."""
    rng = random.Random(config.seed)
    centres = {(name, layer): rng.random() for name in PROMPT_TOKENS for layer in range(NUM_LAYERS)}
    for step in range(NUM_STEPS):
        wall_us = round(rng.uniform(900, 1100), 3)
        for name, prompt_tokens in PROMPT_TOKENS.items():
            for layer in range(NUM_LAYERS):
                seq_len = prompt_tokens + step + 1
                weights = _clustered_scores(rng, seq_len, centres[name, layer])
                ranked = sorted(range(seq_len), key=lambda p: (-weights[p], p))
                chosen = ranked[:TOP_K]
                scores = [weights[position] for position in chosen]
                margin = scores[-1] - weights[ranked[TOP_K]] if seq_len > TOP_K else 0.0
                yield PlainSelection(
                    request_id=name,
                    layer_id=layer,
                    step_idx=step,
                    seq_len=seq_len,
                    top_k=TOP_K,
                    positions=chosen,
                    scores=scores,
                    score_stats=(scores[-1], sum(scores) / len(scores), scores[0], margin),
                    num_cached_blocks=SHARED_TOKENS[name] // config.block_size,
                    prefix_key=_prefix_key(name),
                    batch_size=len(PROMPT_TOKENS),
                    phase="decode",
                    forward_idx=step,
                    step_wall_us=wall_us,
                    step_synced=True,
                )


def _clustered_scores(rng: random.Random, seq_len: int, centre: float) -> list[float]:
    middle = int(centre * seq_len)
    near = (4.0 * (p < 4) + 3.0 * (p > seq_len - 16) + 2.0 * (abs(p - middle) < 40) for p in range(seq_len))
    return [round(bonus + rng.random(), 4) for bonus in near]


def _prefix_key(name: str) -> str:
    """r1 and r2 begin alike, so their keys are equal."""
    return hashlib.blake2b(b"a" if name == "r0" else b"b", digest_size=8).hexdigest()


def _request_line(name: str) -> dict[str, Any]:
    request = Request(name, (0,) * PROMPT_TOKENS[name], NUM_STEPS + 1)
    facts = RequestFacts(num_output_tokens=NUM_STEPS + 1, state="length")
    return request_line(request, facts, has_prefix_cache=False, has_tiers=False)


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(encode(record) + "\n" for record in records), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "sanity",
        "Write and verify a small run of made-up selections, with nothing installed.",
        script="sanity_trace_no_torch.py",
        examples="""
        %(prog)s
        %(prog)s --trace-out outputs/sanity --seed 1
        """,
    )
    parser.add_argument("--trace-out", metavar="DIR", help="folder of the run, new or empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the selections")
    return parser
