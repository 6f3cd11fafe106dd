"""`dsatrace attach`: runs a transformers checkpoint on the disk over prompts, and traces what it selects.

dsatrace attach checkpoints/GLM-5 --input-file prompts.txt --device-map auto --out outputs/glm5
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsatrace.commands.arguments import check_temperature, check_torch
from dsatrace.commands.generate import read_prompts
from dsatrace.commands.interrupt import ends_by_signal
from dsatrace.commands.parser import CommandParser, count
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain, plain_lines
from dsatrace.trace.config import check_run_folder, default_run_folder


@exits_cleanly
@ends_by_signal
def main(argv: Sequence[str] | None = None) -> int:
    """Answers the prompts; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    prompts = read_prompts(args.input_file)
    if args.out is not None:
        check_run_folder(args.out)
    architecture = _architecture(args.model_dir)
    check_temperature(args.temperature)
    check_torch()
    if importlib.util.find_spec("transformers") is None:
        raise UserError("transformers is not installed; install it with `pip install transformers`")

    import torch

    from dsatrace.captures.attach import attach

    torch.manual_seed(args.seed)
    model, tokenizer = _load(args, architecture)
    has_template = bool(tokenizer.chat_template) and not args.plain_text
    with attach(
        model,
        args.out or default_run_folder("attach"),
        prefill=args.prefill,
        block_size=args.kv_block_size,
        format=args.trace_format,
        argv=argv,
        seed=args.seed,
        chat="chat_template" if has_template else "plain text",
        data_source=f"file {args.input_file.name}",
    ) as trace:
        for first in range(0, len(prompts), args.batch_size):
            batch = [
                _as_chat(tokenizer, prompt) if has_template else prompt
                for prompt in prompts[first : first + args.batch_size]
            ]
            inputs = tokenizer(
                batch,
                return_tensors="pt",
                padding=len(batch) > 1,
                add_special_tokens=not has_template,
            ).to(model.device)
            sampled = {"temperature": args.temperature} if args.temperature else {}
            answers = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=args.max_new_tokens,
                do_sample=bool(args.temperature),
                **sampled,
            )
            for answer in answers[:, inputs["input_ids"].shape[1] :]:
                print(f"{plain_lines(tokenizer.decode(answer, skip_special_tokens=True))}\n")
    print(f"run: {plain(trace.tracer.config.out)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "attach",
        "Answer prompts with a transformers checkpoint that has an indexer, and trace what it selects.",
        examples="""
        %(prog)s checkpoints/GLM-5 --input-file prompts.txt --device-map auto
        %(prog)s checkpoints/tiny --input-file prompts.txt --prefill last --max-new-tokens 256
        """,
        allow_abbrev=False,  # the manifest hides the values of some flags, which it knows by name
    )
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="config, safetensors, tokenizer")
    add = parser.add_argument
    add("--input-file", type=Path, required=True, help="prompts, separated by blank lines")
    add("--out", type=Path, metavar="DIR", help="folder of the run, new or empty (default: under outputs/)")
    add("--max-new-tokens", type=count, default=200, help="new tokens per answer")
    add("--batch-size", type=count, default=1, metavar="N", help="prompts at once, padded on the left")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--seed", type=int, default=0, help="of sampling")
    add("--plain-text", action="store_true", help="do not put prompts into the model's chat template")
    add(
        "--prefill",
        choices=("off", "last", "all"),
        default="off",
        help="record rows of the prompt, too: of its last position, or of all",
    )
    add("--kv-block-size", type=count, default=16, metavar="N", help="tokens in a block")
    add("--trace-format", choices=("jsonl", "parquet"), default="jsonl", help="what records are written as")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", default="cpu", help="holds the whole model: cpu, cuda, ...")
    where.add_argument("--device-map", metavar="MAP", help="of transformers, for several devices: auto, ...")
    add("--dtype", default="auto", help="number format: auto, float32, bfloat16, ...")
    return parser


def _architecture(folder: Path) -> str:
    """The class of the model that `config.json` names; `UserError` where the folder is no checkpoint."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        [name] = config["architectures"]
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}; name a checkpoint's folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: names no model in `architectures`; save it with save_pretrained") from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: holds no .safetensors file; other weights are not loaded")
    return str(name)


def _load(args: argparse.Namespace, architecture: str) -> tuple[Any, Any]:
    """The model and its tokenizer; nothing of the folder is executed."""
    import transformers
    from safetensors import SafetensorError

    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise UserError(
            f"{args.model_dir}: transformers {transformers.__version__} knows no {plain(architecture)}; "
            "install one that does"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_dir, local_files_only=True)
        model = kind.from_pretrained(
            args.model_dir,
            dtype=args.dtype,
            device_map=args.device_map,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{args.model_dir}: cannot load it: {plain(first)}") from error
    if args.device_map is None:
        model = model.to(args.device)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _as_chat(tokenizer: Any, prompt: str) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return text


if __name__ == "__main__":
    sys.exit(main())
