"""`evaluate_tiny.py`: what a trained small model finds, on prompts held out from its training by seed.

Converts the checkpoint and serves it as generate.py does; writes the figures as JSON, each with
its number of prompts and a 95 % interval.

    python3 scripts/evaluate_tiny.py --model data/models/needle-2k --examples 100 --out figures.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly

TASKS = ("niah_single_1", "niah_multikey_2")
KINDS = ("sparse", "dense", "shuffled")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints one line a figure; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.examples < 1:
        raise UserError(f"--examples {args.examples}: use at least 1")

    import torch

    from dsatrace.workloads.tokenizer import load_tokenizer
    from train_needle.evaluate import HELD_OUT_SEED, measure, measure_dense
    from train_needle.export import load_exported

    if args.threads:
        torch.set_num_threads(args.threads)
    seed = HELD_OUT_SEED if args.seed is None else args.seed
    tokenizer = load_tokenizer(args.model)
    with tempfile.TemporaryDirectory() as folder:
        model = load_exported(args.model, Path(folder))
    figures = list[dict[str, Any]]()
    for length, task, kind in itertools.product(args.lengths, args.tasks, args.kinds):
        started = time.monotonic()
        if kind == "dense":
            measured = measure_dense(model, tokenizer, task, length, args.examples, seed)
        else:
            measured = measure(model, tokenizer, task, length, args.examples, kind == "shuffled", seed)
        figures.append(measured.to_json())
        print(f"{measured.line()}  ({time.monotonic() - started:.0f} s)", flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "evaluate_tiny",
        "Measure a trained small model.",
        script="evaluate_tiny.py",
        examples="""
        python3 scripts/%(prog)s --model data/models/needle-2k --examples 100 --out figures.json
        python3 scripts/%(prog)s --model outputs/tiny/model --lengths 2048 --kinds sparse
        """,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder that train_tiny.py exported")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="RULER tasks")
    parser.add_argument("--lengths", nargs="+", type=int, default=(2048, 4096, 8192), help="prompt tokens")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="attention measured")
    parser.add_argument("--examples", type=int, default=100, help="prompts per figure")
    parser.add_argument("--seed", type=int, help="seed (default: one that training never draws from)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
