"""`convert.py`: a Hugging Face checkpoint to one safetensors file a rank.

Parses flags and shows progress; `dsatrace.model.convert` does the work.

    python3 convert.py --hf-ckpt-path DeepSeek-V3.2 --save-path converted --model-parallel 8
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.arguments import add_ignore_config_key
from dsatrace.commands.parser import CommandParser
from dsatrace.commands.progress import totals_bar
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain
from dsatrace.units import size_text


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code. A terminated conversion cleans up like an interrupted one."""
    args = _parser().parse_args(argv)
    if args.model_parallel < 1:
        raise UserError(f"--model-parallel {args.model_parallel}: use at least 1")
    if not args.hf_ckpt_path.is_dir():
        raise UserError(f"--hf-ckpt-path {args.hf_ckpt_path}: no such folder; name the checkpoint's")
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from dsatrace.model.convert import convert_checkpoint
    from dsatrace.model.shards import CheckpointError

    try:
        with totals_bar("convert") as progress:
            files = convert_checkpoint(
                args.hf_ckpt_path,
                args.save_path,
                args.n_experts,
                args.model_parallel,
                progress,
                ignore_keys=args.ignore_config_keys,
            )
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        raise UserError(f"interrupted; nothing was written to {args.save_path}") from None
    for file in files:
        print(f"{plain(file)}  {size_text(file.stat().st_size)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "convert",
        "Convert a Hugging Face checkpoint to one safetensors file per rank.",
        script="convert.py",
        examples="""
        %(prog)s --hf-ckpt-path DeepSeek-V3.2 --save-path converted --n-experts 256 --model-parallel 8
        %(prog)s --hf-ckpt-path data/models/needle-2k --save-path converted --model-parallel 1
        """,
    )
    parser.add_argument("--hf-ckpt-path", type=Path, required=True, help="folder of the safetensors files")
    parser.add_argument("--save-path", type=Path, required=True, help="folder to write into")
    parser.add_argument("--n-experts", type=int, help="routed experts per layer (default: the config's)")
    parser.add_argument("--model-parallel", type=int, required=True, help="ranks the model will run on")
    add_ignore_config_key(parser.add_argument)
    return parser
