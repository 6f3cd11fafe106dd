"""`dsatrace study prepare`: conversations to a single-turn and a multi-turn trace.

dsatrace study prepare --data-path chats.json --tokenizer converted --output-dir outputs/traces
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dsatrace.commands.study import options
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.study.output_folder import OutputFolder
from dsatrace.study.sources import Client
from dsatrace.text import counted, plain
from dsatrace.workloads.id_logs import FORMATS
from dsatrace.workloads.trace_rows import MULTI_TURN, write_trace_rows

BOTH = "both"


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the traces; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    modes = list(options.TURNS) if args.mode in (None, BOTH) else [args.mode]
    if args.output_file and len(modes) > 1:
        raise UserError("--output-file names one trace; choose it with --mode single_turn or multi_turn")
    path = options.output_path(args, "prepare")
    with options.open_client(args) as client:
        if not client.has_text and args.hash_ids is None:
            raise UserError(
                f"a {client.source.kind} is a trace already; say what to make of it with --hash-ids"
            )
        if client.has_text:
            client.rows(modes[0])
        else:
            client.requests()
            modes = [MULTI_TURN]
        with options.study_folder(path, "prepare", argv, client, {}) as folder:
            options.say_what_was_read(client)
            for mode in modes:
                _write(folder, client, mode, args)
    return 0


def _write(folder: OutputFolder, client: Client, mode: str, args: argparse.Namespace) -> None:
    if client.has_text:
        file = folder.file(args.output_file or f"{mode}_trace.jsonl")
        num_rows = write_trace_rows(file, client.rows(mode))
        print(f"{plain(file)}: {counted(num_rows, 'request')}; it holds text, so only you can read it")
    if args.hash_ids is not None:
        from dsatrace.study.request_files import hash_id_rows
        from dsatrace.workloads.id_logs import write_hash_ids

        layout = FORMATS[args.hash_ids]
        file = folder.file(f"{mode}_{layout.name}.jsonl")
        num_rows = write_hash_ids(file, hash_id_rows(client.requests(mode), layout), layout)
        print(f"{plain(file)}: {counted(num_rows, 'request')} as block ids, without text")


def _parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        "prepare",
        "Make request traces of conversations.",
        """
        %(prog)s --data-path chats.json --tokenizer converted --output-dir outputs/traces
        %(prog)s --workload qa --max-conversations 100
        """,
    )
    options.add_request_arguments(parser, modes=(BOTH, *options.TURNS))
    options.add_output_arguments(parser, "the trace, with --mode", pictures=False)
    parser.add_argument("--hash-ids", choices=FORMATS, help="write block ids too: what can be published")
    return parser
