"""`dsatrace make-tiny-checkpoint`: a random checkpoint in Hugging Face layout with a byte-level tokenizer.

The weights mean nothing; they let the demo and the tests go the way the real ones go.

    dsatrace make-tiny-checkpoint --out tiny --weights bf16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain
from dsatrace.units import size_text

DEFAULT_CONFIG = (Path(__file__).parents[1] / "model" / "config_tiny.json").resolve()
"""`inference/config_tiny.json`, which the package links to; in a wheel the file itself."""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the checkpoint; returns the exit code."""
    args = _parser().parse_args(argv)

    from dsatrace.model.config import ModelArgs
    from dsatrace.model.tiny import write_checkpoint
    from dsatrace.workloads.tokenizer import write_byte_tokenizer

    try:
        model_args = ModelArgs.from_json(args.config)
        shards = write_checkpoint(args.out, model_args, args.seed, args.weights, args.num_shards)
        write_byte_tokenizer(args.out)
    except ValueError as error:
        raise UserError(str(error)) from error
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{plain(args.out)}: {len(shards)} shards, {size_text(size)} of random {args.weights} weights")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "make-tiny-checkpoint",
        "Make a small random checkpoint in Hugging Face layout. Its weights mean nothing.",
        script="make_tiny_checkpoint.py",
        examples="""
        %(prog)s --out tiny
        %(prog)s --out tiny --weights fp8 --seed 1
        """,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="model config")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--weights", choices=("bf16", "fp8", "fp32"), default="bf16", help="stored type")
    parser.add_argument("--num-shards", type=int, default=3, help="files")
    return parser
