"""BurstGPT as requests: logged arrivals and lengths, with prompts made up to those lengths.

    workload = BurstGPTWorkload(Replay(read_burstgpt("BurstGPT_1.csv")), SyntheticPrompts(3, 256), bad_rows)

A request asks for as many tokens as the log's response had (at most `max_new_tokens`), and
runs to that length: the load is the log's, whatever the model says.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsatrace.workloads.burstgpt import Replay, read_burstgpt
from dsatrace.workloads.burstgpt_synthetic import BurstSettings, SyntheticPrompts, generate_burstgpt
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import DataSet, Find, Flag
from dsatrace.workloads.exports import WholeFile, write_lines
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows, check_limit, open_source
from dsatrace.workloads.served.workload import Opened


class BurstGPTWorkload:
    name = "burstgpt"
    metric = None

    def __init__(
        self,
        replay: Replay,
        prompts: SyntheticPrompts,
        bad_rows: BadRows,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
    ) -> None:
        check_limit("--max-new-tokens-cap", max_new_tokens)
        self._replay = replay
        self._prompts = prompts
        self._bad_rows = bad_rows
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._num_capped = 0

    def requests(self) -> Iterator[Request]:
        for arrival in self._replay:
            wanted = max(1, arrival.row.response_tokens)  # a failure, if kept, asks for one token
            granted = min(wanted, self._max_new_tokens or wanted)
            self._num_capped += granted < wanted
            yield Request(
                request_id=f"row{arrival.row.source_row}",
                prompt_token_ids=self._prompts.token_ids(arrival.row),
                max_new_tokens=granted,
                temperature=self._temperature,
                arrival_s=arrival.arrival_s,
                source_row=arrival.row.source_row,
                stop_at_eos=False,
            )

    def judge(self, request_id: str, answer: str) -> None:
        return None

    def recorded(self, request: Request) -> tuple[int, ...]:
        """The log has lengths only: as many tokens, all of one id that means nothing."""
        return (self._prompts.first_token_id,) * request.max_new_tokens

    def forget(self, request_id: str) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": self.metric,
            "prompts": "synthetic: random tokens of the logged lengths",
            "shared_prefix_share": self._prompts.shared_share,
            "time_scale": self._replay.time_scale,
            "counts": {**self._replay.summary(), "answers_capped": self._num_capped},
            "bad_rows": self._bad_rows.summary(),
        }


def open_burstgpt(args: argparse.Namespace, chat: Chat, find: Find) -> Opened:
    """The log's arrivals, or generated ones, with prompts made up to their lengths."""
    bad_rows = BadRows(args.bad_rows)
    if args.burstgpt_generate:
        settings = _settings(args)
        rows, description = generate_burstgpt(settings), f"generator: {settings.text()}"
        said = f"BurstGPT-like arrivals from the {description}"
    else:
        source = find()
        rows, description, said = read_burstgpt(source.file, bad_rows), source.description, source.text()
    ordinary = chat.tokenizer.ordinary_ids
    workload = BurstGPTWorkload(
        Replay(rows, args.limit, keep_failures=args.keep_failures, time_scale=args.time_scale),
        SyntheticPrompts(ordinary.start, len(ordinary), args.shared_prefix_share, args.seed),
        bad_rows,
        args.max_new_tokens_cap,
        args.temperature,
    )
    return Opened(workload, description, said, args.limit)


def _settings(args: argparse.Namespace) -> BurstSettings:
    num_rows = {} if args.limit is None else {"num_rows": args.limit}
    drawn = {flag.attribute: getattr(args, flag.attribute) for flag in _GENERATOR_FLAGS}
    return BurstSettings(seed=args.seed, **num_rows, **drawn)


def _write_csv(source: Path, target: Path, limit: int | None) -> int:
    """The lines as they stand, each looked at by the reader."""
    with open_source(source) as file:
        lines = (line for line in file if line.strip())
        header = next(lines, b"")
        rows = zip(read_burstgpt(source, WholeFile()), lines, strict=True)
        wanted = itertools.islice(rows, limit)
        return write_lines(target, itertools.chain([header], (line for _, line in wanted))) - 1


def _generator_flag(name: str, help: str, default: float | None = None) -> Flag:
    """The flag of one of `BurstSettings`' fields."""
    fields = {field.name: field.default for field in dataclasses.fields(BurstSettings)}
    value: Any = fields[name] if default is None else default
    return Flag(f"--{name.replace('_', '-')}", f"generated arrivals: {help}", type=type(value), default=value)


_GENERATOR_FLAGS = (
    _generator_flag("gap_shape", "shape of the Gamma distributed gaps; below 1 makes bursts"),
    _generator_flag("gap_scale_s", "scale of the gaps, s; their mean is shape x scale"),
    _generator_flag("zipf_exponent", "exponent of the lengths' law"),
    _generator_flag("max_request_tokens", "longest prompt"),
    _generator_flag("max_response_tokens", "longest answer"),
    _generator_flag("api_share", "share of rows without a session"),
    _generator_flag(  # 0, so that --limit is what is served
        "failure_share", "share of rows without a response; served with --keep-failures only", 0.0
    ),
)

BURSTGPT = DataSet(
    name="burstgpt",
    title="BurstGPT",
    help="logged arrivals and lengths; the prompts are made up",
    # No revision of the mirror is known to be kept; the bytes are pinned as the v2.0 release's.
    hub=HubFile(
        repo="lzzmm/BurstGPT",
        file="data/BurstGPT_1.csv",
        sha256="4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122",
    ),
    licence="CC-BY-4.0 (HPMLL/BurstGPT, arXiv:2401.17644)",
    flags=(
        Flag("--burstgpt-csv", "a BurstGPT file, of either layout", type=Path),
        Flag(
            "--max-new-tokens-cap",
            "most tokens of an answer (default: as many as the log's)",
            type=int,
        ),
        Flag("--keep-failures", "serve logged failures too, for one token", action="store_true"),
        Flag("--time-scale", "multiplies every gap; 0 sends all at once", type=float, default=1.0),
        Flag(
            "--shared-prefix-share",
            "share of a prompt that its session has in common",
            type=float,
            default=0.5,
        ),
        Flag(
            "--burstgpt-generate",
            f"generate --limit arrivals (default: {BurstSettings.num_rows})",
            action="store_true",
        ),
        *_GENERATOR_FLAGS,
    ),
    file_flag="--burstgpt-csv",
    open=open_burstgpt,
    write=_write_csv,
    export="burstgpt_train{}.csv",
    patterns=("*.csv",),
    sample="burstgpt",
    arrivals=True,
    download_limit=2000,
    variable="BURSTGPT_CSV",
)
