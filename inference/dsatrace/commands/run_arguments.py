"""The flags that the runners of data sets share, and what they make of them.

add_run_arguments(parser)
args, argv = parse_run(parser, sys.argv[1:])
run_workload(args, argv, SHAREGPT)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsatrace.commands.arguments import (
    END_FLAGS,
    add_bad_rows_argument,
    add_chat_template_argument,
    add_engine_arguments,
    check_checkpoint,
    check_temperature,
    check_torch,
    end_settings_from_args,
    refuse_tiers,
    settings_from_args,
)
from dsatrace.engine.ending import EndSettings
from dsatrace.errors import UserError, is_rank_0
from dsatrace.flags import add_flags
from dsatrace.text import plain
from dsatrace.trace.config import run_config_from_args
from dsatrace.trace.resumed_argv import resumed_argv
from dsatrace.workloads.data_set import DataSet, Source, attribute_of
from dsatrace.workloads.rows import check_limit
from dsatrace.workloads.sources import find_source


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's flags, and those that say how a run is made."""
    add_engine_arguments(parser, required=False)
    add = parser.add_argument_group("run").add_argument
    add(
        "--runner",
        choices=("model", "simulator"),
        default="model",
        help="the simulator replays recorded answers through the same scheduler",
    )
    add(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue an incomplete run, with its flags and those given here",
    )
    add_flags(add, EndSettings, END_FLAGS)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add(
        "--tokenizer",
        metavar="NAME|PATH",
        help="hub name, file or folder (default: the checkpoint's)",
    )
    add("--save-text", action="store_true", help="keep the answers' text in requests.jsonl")
    add("--save-tokens", action="store_true", help="keep all token ids in requests.jsonl, for layerwise")


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """How a data set's messages become prompts."""
    group = parser.add_argument_group("chat")
    group.add_argument(
        "--thinking", action="store_true", help="let the model think first; only what follows is judged"
    )
    add_chat_template_argument(group)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Where rows come from when no file is named, and what happens to bad ones."""
    add = parser.add_argument_group("source").add_argument
    add("--no-hub", action="store_true", help="do not ask the hub when data/<name>/ is empty")
    add("--revision", help="of the hub's data set (default: pinned)")
    add_bad_rows_argument(add)


def find_rows(args: argparse.Namespace, data_set: DataSet, repo: str | None = None) -> Source:
    """The rows that the data set's flag and those of `add_source_arguments` name."""
    return find_source(
        data_set,
        getattr(args, attribute_of(data_set.file_flag)),
        repo=repo,
        revision=args.revision,
        use_hub=not args.no_hub,
        say=lambda line: print(plain(line)),
    )


def parse_run(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags and their command line; a resumed run's own flags come first."""
    only_resume = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_resume.add_argument("--resume", type=Path)
    run, given = only_resume.parse_known_args(argv)
    if run.resume is not None:
        argv = [*resumed_argv(run.resume, given), *given]
    args = parser.parse_args(argv)
    args.resume = run.resume
    check_temperature(args.temperature)
    end_settings_from_args(args)
    check_limit("--limit", args.limit)
    if args.runner == "model" and args.ckpt_path is None:
        raise UserError("--ckpt-path is missing: name a converted checkpoint, or use --runner simulator")
    if args.runner == "simulator":
        refuse_tiers(args)
    settings_from_args(args)  # a bad value is refused here, before torch is imported
    if run.resume is None and is_rank_0():
        run_config_from_args(args, name=None)
    check_checkpoint(args.ckpt_path, has_weights=args.runner == "model")
    if args.runner == "model":
        check_torch()
    return args, argv
