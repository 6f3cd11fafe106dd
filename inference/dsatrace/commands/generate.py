"""`generate.py`: answers prompts from a file or a person, and traces what the indexer selects.

python3 generate.py --ckpt-path converted --config config_tiny.json --input-file prompts.txt --trace-enable
torchrun --nproc-per-node 8 generate.py --ckpt-path ... --config config_671B_v3.2.json --interactive
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dsatrace.commands.arguments import (
    END_FLAGS,
    add_chat_template_argument,
    add_engine_arguments,
    check_checkpoint,
    check_temperature,
    check_torch,
    end_settings_from_args,
    settings_from_args,
)
from dsatrace.commands.interrupt import ends_by_signal
from dsatrace.commands.parser import CommandParser
from dsatrace.engine.ending import EndSettings
from dsatrace.errors import UserError, exits_cleanly, is_rank_0
from dsatrace.flags import add_flags
from dsatrace.trace.config import add_trace_arguments, trace_config_from_args


@exits_cleanly
@ends_by_signal
def main(argv: Sequence[str] | None = None) -> int:
    """Serves the prompts; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    settings = settings_from_args(args)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: use at least 1")
    end = end_settings_from_args(args)
    check_temperature(args.temperature)
    prompts = [] if args.interactive else read_prompts(args.input_file)
    trace_config_from_args(args, name=None)
    check_checkpoint(args.ckpt_path)
    check_torch()

    from dsatrace.commands.chat import chat as converse
    from dsatrace.commands.serving import Serving, answer_prompts, load_model_shown
    from dsatrace.engine.settings import RunSettings
    from dsatrace.runner.distributed import process_group
    from dsatrace.trace.manifest import RunInfo
    from dsatrace.workloads.chat import PLAIN_TEXT, SAID_OF_PLAIN_TEXT, choose_chat
    from dsatrace.workloads.tokenizer import check_vocabulary, load_tokenizer

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    tokenizer = load_tokenizer(args.tokenizer or args.ckpt_path)
    chat = choose_chat(tokenizer, args.ckpt_path, template=args.chat_template, thinking=args.thinking)
    check_vocabulary(tokenizer, settings.model_args().vocab_size)
    with process_group(settings.device) as device:
        # Rank 0 alone owns the run's folder; the others only compare digests.
        trace = trace_config_from_args(args, "generate", settings.seed) if is_rank_0() else None
        if is_rank_0() and chat.form.name == PLAIN_TEXT:
            print(SAID_OF_PLAIN_TEXT, file=sys.stderr)
        run = RunSettings(
            stop_tokens=chat.stop_tokens,
            end=end,
            answer_text=chat.text if args.save_text else None,
            save_tokens=args.save_tokens,
            trace=trace,
            traced=bool(args.trace_enable or args.trace_out),
            info=partial(
                RunInfo,
                argv=argv,
                tokenizer=f"sha256:{tokenizer.digest}",
                chat=chat.form.name,
                data_source="interactive" if args.interactive else f"file {args.input_file.name}",
            ),
        )
        model = load_model_shown(settings, device)
        serving = Serving(
            *(model, settings, device, chat),
            *(args.max_new_tokens, args.temperature, args.system_prompt),
            run,
        )
        if args.interactive:
            return converse(serving)
        return answer_prompts(serving, prompts)


def read_prompts(path: Path) -> list[str]:
    """The file's prompts, separated by blank lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the prompts: {error.strerror}; check --input-file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the prompts as UTF-8 text") from error
    prompts = [paragraph.strip() for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one or more, separated by blank lines")
    return prompts


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "generate",
        "Answer prompts, and trace what DeepSeek Sparse Attention reads.",
        script="generate.py",
        examples="""
        %(prog)s --ckpt-path converted --input-file prompts.txt --trace-enable
        %(prog)s --ckpt-path converted --interactive --trace-out outputs/chat
        torchrun --nproc-per-node 8 generate.py --ckpt-path converted --interactive
        """,
        allow_abbrev=False,  # the manifest hides the values of some flags, which it knows by name
    )
    add_engine_arguments(parser)
    group = parser.add_argument_group("generation")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--input-file", type=Path, help="prompts, separated by blank lines")
    source.add_argument("--interactive", action="store_true", help="chat; /help lists its commands")
    group.add_argument("--max-new-tokens", type=int, default=200, help="new tokens per answer")
    add_flags(group.add_argument, EndSettings, END_FLAGS)
    group.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    group.add_argument("--thinking", action="store_true", help="let the model think before it answers")
    group.add_argument("--system-prompt", default="", help="text before the first turn")
    group.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (default: --ckpt-path)")
    add_chat_template_argument(group)
    group.add_argument("--save-text", action="store_true", help="keep the answers' text in requests.jsonl")
    group.add_argument("--save-tokens", action="store_true", help="keep all token ids in requests.jsonl")
    add_trace_arguments(parser)
    return parser
