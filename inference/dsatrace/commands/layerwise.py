"""`dsatrace layerwise`: fixed transcripts through a checkpoint, one layer at a time, and what it selects.

dsatrace layerwise --weights DeepSeek-V3.2 --transcripts chats.jsonl --layers 0-3 --rows last:512 --out run
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsatrace.commands.arguments import add_chat_template_argument, add_ignore_config_key, check_torch
from dsatrace.commands.interrupt import ends_by_signal
from dsatrace.commands.parser import CommandParser, count
from dsatrace.commands.progress import LINE_INTERVAL_S
from dsatrace.commands.run_arguments import add_source_arguments, find_rows
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.layerwise.asked import NEAR_CHANCE, Rows, layers_of
from dsatrace.runner.settings import ModelSettings, user_errors
from dsatrace.text import counted, plain
from dsatrace.trace.config import TraceConfig
from dsatrace.units import size_text
from dsatrace.workloads.catalog import DATA_SETS
from dsatrace.workloads.data_set import DataSet

RECORDED = tuple(name for name, data_set in DATA_SETS.items() if not data_set.arrivals)
"""Data sets with recorded answers."""

if TYPE_CHECKING:
    from dsatrace.layerwise.sweep import LayerDone, SweepSettings
    from dsatrace.layerwise.transcripts import Recorded, Transcript
    from dsatrace.layerwise.weights import LayerWork
    from dsatrace.model.config import ModelArgs
    from dsatrace.workloads.chat import Chat


@exits_cleanly
@ends_by_signal
def main(argv: Sequence[str] | None = None) -> int:  # noqa: PLR0915  (checks, in order)
    """Runs the sweep; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    data_set = _data_set(argv)
    args = _parser(data_set).parse_args(argv)
    rows = Rows.of(args.rows)
    if args.out is None and not args.plan:
        raise UserError("--out is missing: name the run's folder, or use --plan")
    if not args.read_gb_per_s > 0:
        raise UserError(f"--read-gb-per-s {args.read_gb_per_s}: use a number above 0")
    config = TraceConfig(
        args.out or Path(),
        block_size=args.kv_block_size,
        format=args.trace_format,
        store_scores=args.trace_store_scores,
        keep_order=args.trace_keep_order,
    )
    if not args.weights.is_dir():
        raise UserError(f"--weights {args.weights}: no such folder; name a checkpoint in Hugging Face layout")
    settings = ModelSettings(
        ckpt_path=args.weights,
        config=args.config,
        numerics=args.numerics,
        kernel_backend=args.kernel_backend,
        ignore_config_keys=tuple(args.ignore_config_keys),
    )
    model_args = settings.model_args()
    layers = layers_of(args.layers, model_args.n_layers)
    check_torch()

    import torch

    from dsatrace.layerwise.folder import WorkFolder
    from dsatrace.layerwise.plan import measured_flops_per_s, plan_sweep, plan_text
    from dsatrace.layerwise.records import RunFacts, expert_kind, selection_kind, write_runs
    from dsatrace.layerwise.sweep import Sweep, SweepSettings
    from dsatrace.layerwise.transcripts import check_vocabulary, recorded_rows
    from dsatrace.layerwise.weights import layers_to_compute, names_of
    from dsatrace.model.kernels import get_kernels
    from dsatrace.model.layers import ModelSetup
    from dsatrace.model.parallel import ParallelGroup
    from dsatrace.model.plan import read_part
    from dsatrace.runner.setup import selections_of

    selection_kind(model_args, layers)
    if args.experts:
        expert_kind(model_args, layers)
    chat = _Chats(args)
    transcripts = _of_data_set(args, data_set, chat) if data_set else _transcripts(args, model_args, chat)
    check_vocabulary(transcripts, model_args.vocab_size)
    recorded = recorded_rows(transcripts, rows)
    device = _device(args.device)
    work = layers_to_compute(model_args, layers, args.experts)
    if len(layers) < model_args.n_layers and layers[0] in NEAR_CHANCE:
        print(
            "note: layers 0 and 1 are reported to select near chance; they do not stand for the others",
            file=sys.stderr,
        )
    made = SweepSettings(device, args.chunk_rows, config.needs_scores, args.experts)
    if args.plan:
        with user_errors():
            plan = plan_sweep(args.weights, model_args, work, recorded, made)
        for line in plan_text(plan, args.weights, measured_flops_per_s(device), args.read_gb_per_s * 1e9):
            print(plain(line))
        return 0
    with contextlib.ExitStack() as stack, user_errors():
        setup = ModelSetup(model_args, get_kernels(args.kernel_backend, device), ParallelGroup())
        open_folder = functools.partial(WorkFolder, args.out, _begun_with(args, model_args, recorded, made))
        folder = open_folder(resume=True) if args.resume else None
        left = work[folder.layers_done if folder else 0 :]
        stored = read_part(args.weights, model_args, names_of(model_args, left, len(left) == len(work)))
        folder = folder or open_folder(resume=False)
        stack.callback(folder.close)
        free = _freeing(args, work) if args.delete_shards else lambda num_done: None
        Sweep(setup, recorded, layers, work, stored, folder, made, _Progress(), free).run()
        facts = RunFacts(
            device=torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
            selections=selections_of(args.weights),
            argv=argv,
            tokenizer=chat.tokenizer,
            chat=chat.form,
            data_source=chat.source or f"transcripts {args.transcripts.name}",
            workload=_workload(recorded, rows),
        )
        write_runs(setup, facts, recorded, layers, folder, config, args.experts)
    num_rows = sum(len(one.positions) for one in recorded)
    print(f"{num_rows} rows of {len(recorded)} transcripts, layers {args.layers}")
    print(f"run: {plain(args.out)}")
    return 0


def _freeing(args: argparse.Namespace, work: Sequence[LayerWork]) -> Callable[[int], None]:
    """Asks, and returns what deletes the shards that are of no more use once so many layers are done."""
    from dsatrace.layerwise.shards import freed_after

    shards = freed_after(args.weights, work)
    size = size_text(sum(path.stat().st_size for paths in shards.values() for path in paths))
    count = sum(map(len, shards.values()))
    print(f"{count} shards in {plain(args.weights)}, {size}, will be deleted as their layers are done.")
    print("Type yes to go on: ", end="", flush=True)
    if sys.stdin.readline().strip() != "yes":
        raise UserError("--delete-shards: not confirmed, nothing was deleted; leave the flag out or type yes")

    def free(num_done: int) -> None:
        for path in shards.get(num_done, ()):
            path.unlink()

    return free


def _begun_with(
    args: argparse.Namespace, model_args: ModelArgs, recorded: Sequence[Recorded], made: SweepSettings
) -> dict[str, Any]:
    """What a resume must have in common with the start: all that has an effect on a number."""
    import torch

    from dsatrace.layerwise.transcripts import digest
    from dsatrace.trace.manifest import config_digest

    return {
        "model_config_digest": config_digest(dataclasses.asdict(model_args)),
        "transcripts": digest(recorded),
        "layers": args.layers,
        **dataclasses.asdict(made),
        "kernel_backend": args.kernel_backend,
        "num_threads": torch.get_num_threads() if made.device == "cpu" else 0,
    }


def _data_set(argv: Sequence[str]) -> DataSet | None:
    """The data set that `--transcripts` names; None where it names a file, or nothing."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--transcripts", default="")
    name = only.parse_known_args(argv)[0].transcripts
    return None if Path(name).exists() or name not in RECORDED else DATA_SETS[name]


def _parser(data_set: DataSet | None = None) -> argparse.ArgumentParser:
    """With the flags of a data set, if the transcripts are one's."""
    parser = CommandParser(
        "layerwise",
        "Run fixed transcripts through a checkpoint, one layer at a time, and trace what it selects.",
        examples="""
        %(prog)s --weights V3.2 --transcripts chats.jsonl --layers 0-3 --rows last:512 --plan
        %(prog)s --weights V3.2 --transcripts chats.jsonl --layers 0-60 --rows answer --out v32
        %(prog)s --weights V3.2 --transcripts chats.jsonl --layers 0-60 --rows answer --out v32 --resume
        """,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="DIR", help="checkpoint in Hugging Face layout")
    add(
        "--transcripts",
        type=Path,
        required=True,
        metavar="FILE|RUN|NAME",
        help="lines of tokens, text or messages (docs/layerwise.md), a run recorded with --save-tokens, or "
        f"{', '.join(RECORDED)}: a data set with its recorded answers",
    )
    add("--layers", metavar="A-B", required=True, help="layers to record; what lies below them is computed")
    add(
        "--rows",
        required=True,
        metavar="ROWS",
        help="rows to record: answer, last:N or range:A-B (positions, both included)",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the run, new or empty (required without --plan)")
    add(
        "--plan",
        action="store_true",
        help="say what it needs, and which shards are missing; run nothing",
    )
    add("--read-gb-per-s", type=float, default=1.0, metavar="X", help="of the weights' disk, for --plan")
    add("--resume", action="store_true", help="go on with the sweep that was begun in --out")
    add(
        "--delete-shards",
        action="store_true",
        help="delete each shard of --weights once all its layers are computed; asks once",
    )
    add("--experts", action="store_true", help="record the rows' routed experts too, in a run in experts/")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    add("--kernel-backend", choices=("torch", "tilelang"), default="torch", help="as in the runners")
    add("--config", type=Path, help="config with other number formats (default: the checkpoint's)")
    add(
        "--numerics",
        choices=("released", "plain"),
        default="released",
        help="plain: no fp8 indexer keys, Hadamard and fp8-rounded latents",
    )
    add_ignore_config_key(add)
    add("--tokenizer", metavar="NAME|PATH", help="of text and messages (default: the checkpoint's)")
    add_chat_template_argument(group)
    add(
        "--chunk-rows",
        type=count,
        metavar="N",
        help="rows that attend at a time (default: 256 on a CPU, 2048 on a GPU)",
    )
    add = parser.add_argument_group("trace").add_argument
    add("--trace-format", choices=("parquet", "jsonl"), default="parquet", help="what records are written as")
    add("--kv-block-size", type=count, default=16, metavar="N", help="tokens in a block")
    add("--trace-store-scores", action="store_true", help="record every selected score")
    add("--trace-keep-order", action="store_true", help="positions by score instead of ascending")
    if data_set is not None:
        data_set.add_flags(parser)
        add = parser.add_argument_group("data set").add_argument
        add("--limit", type=count, help="transcripts in all (default: all)")
        add("--seed", type=int, default=0, help="of what is generated")
        add_source_arguments(parser)
        answers = {"min_new_tokens": 0, "max_new_tokens": None, "temperature": 0.0, "max_prompt_tokens": None}
        flags = {action.dest for action in parser._actions}
        parser.set_defaults(**{name: value for name, value in answers.items() if name not in flags})
    return parser


class _Chats:
    """The checkpoint's chat form, made once there is text to encode."""

    tokenizer: str | None = None
    form: str | None = None
    source: str | None = None  # of the data set, where there is one

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    @functools.cached_property
    def _chat(self) -> Chat:
        from dsatrace.workloads.chat import choose_chat
        from dsatrace.workloads.tokenizer import choose_tokenizer

        args = self._args
        tokenizer = choose_tokenizer(args.tokenizer, args.weights)
        chat = choose_chat(tokenizer, args.weights, template=args.chat_template)
        self.tokenizer, self.form = tokenizer.name, chat.form.name
        return chat

    def __call__(self) -> Chat:
        return self._chat


def _transcripts(args: argparse.Namespace, model_args: ModelArgs, chat: _Chats) -> list[Transcript]:
    from dsatrace.layerwise.reading import is_of_model, read_transcripts
    from dsatrace.layerwise.transcripts import OWN

    transcripts = read_transcripts(args.transcripts, chat)
    if is_of_model(args.transcripts, model_args):
        return [dataclasses.replace(one, written_by=OWN) for one in transcripts]
    return transcripts


def _of_data_set(args: argparse.Namespace, data_set: DataSet, chats: _Chats) -> list[Transcript]:
    """Prompts with their recorded answers; one without an answer is left out, and said."""
    import numpy as np

    from dsatrace.layerwise.transcripts import Transcript

    opened = data_set.open(args, chats(), functools.partial(find_rows, args, data_set))
    print(plain(opened.terminal_line))
    chats.source, chats.form = opened.description, opened.chat_form
    found, num_without = [], 0
    for request in opened.workload.requests():
        answer = opened.workload.recorded(request)
        opened.workload.forget(request.request_id)
        if not answer:
            num_without += 1
            continue
        ids = np.array([*request.prompt_token_ids, *answer], dtype=np.int64)
        found.append(
            Transcript(
                request.request_id,
                ids,
                len(request.prompt_token_ids),
                source_row=request.source_row,
                labels=request.labels,
                needle_positions=request.needle_positions,
            )
        )
    if num_without:
        print(f"left out: {counted(num_without, 'request')} without a recorded answer", file=sys.stderr)
    if not found:
        raise UserError(f"--transcripts {data_set.name}: none of its requests has a recorded answer")
    return found


def _device(asked: str) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise UserError("--device cuda: no CUDA device was found; use cpu")
    return "cuda" if has_gpu and asked != "cpu" else "cpu"


def _workload(recorded: Sequence[Recorded], rows: Rows) -> dict[str, Any]:
    """The summary's `workload`, beside its name."""
    foreign = sum(one.transcript.written_by != "own" for one in recorded)
    return {
        "rows": rows.text,
        "counts": {
            "transcripts": len(recorded),
            "foreign_transcripts": foreign,
            "tokens": sum(one.num_rows for one in recorded),
            "rows": sum(len(one.positions) for one in recorded),
        },
    }


class _Progress:
    """A line on stderr after each layer, and now and then within one."""

    def __init__(self) -> None:
        self._said = time.monotonic()
        self._before = 0

    def __call__(self, done: LayerDone) -> None:
        now = time.monotonic()
        if done.unit < done.num_units and now < self._said + LINE_INTERVAL_S:
            return
        self._said = now
        read = max(done.bytes_read - self._before, 1)
        left_s = done.seconds * done.bytes_left / read
        print(
            f"layer {done.layer}: {done.unit} of {done.num_units} parts, {done.num_done} of "
            f"{done.num_layers} layers done; {size_text(done.bytes_read)} read, "
            f"{size_text(done.bytes_left)} left, about {left_s / 60:.1f} minutes",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
