"""`train_tiny.py`: trains the small model that finds needles, and exports it for convert.py.

Stopped at any moment, it goes on from its last save when started again with the same --out.

    python3 scripts/train_tiny.py --out outputs/tiny --minutes 30
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

from dsatrace.commands.parser import CommandParser
from dsatrace.errors import UserError, exits_cleanly

if TYPE_CHECKING:
    from train_needle.recipe import Phase

EXPORT = "model"
"""Folder of the exported checkpoint, within --out."""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Trains and exports; returns the exit code."""
    args = _parser().parse_args(argv)
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes}: use a number above 0")

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from train_needle.export import export_model, write_checksums
    from train_needle.recipe import TINY, Recipe
    from train_needle.tokenizer import word_tokenizer, word_tokenizer_json
    from train_needle.trainer import Trainer

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device was found; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = Recipe.tiny(args.seed)
    trainer = Trainer(TINY, recipe, word_tokenizer(), args.out, args.device)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bars = {phase.name: progress.add_task(phase.name, total=phase.num_steps) for phase in recipe.phases}

        def report(phase: Phase, step: int, line: dict[str, Any]) -> None:
            text = f"{phase.name}  loss {line['loss']:.3f}  right {line['running']:.3f}"
            progress.update(bars[phase.name], completed=step, description=text)
            if not console.is_terminal:
                print(f"{line['seconds']:8.0f} s  step {step:5}  {text}", flush=True)

        finished = trainer.run(args.minutes, report)
    export_model(trainer.model, word_tokenizer_json(), args.out / EXPORT)
    write_checksums(args.out / EXPORT)
    for name, seconds in trainer.seconds.items():
        print(f"{name:16} {seconds:8.0f} s")
    state = "finished" if finished else "out of time; start again with the same --out to go on"
    print(f"{args.out / EXPORT}: {state}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "train_tiny",
        "Train the small needle model.",
        script="train_tiny.py",
        examples="""
        python3 scripts/%(prog)s --out outputs/tiny
        python3 scripts/%(prog)s --out outputs/tiny --minutes 30 --threads 1
        """,
    )
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; resumed if it holds one")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this (default: never)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it trains")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
