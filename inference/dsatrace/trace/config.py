"""What a run traces, and the command-line flags that say so.

Standard library only. Knows no model and opens no file; it does look whether the
run's folder is free, so that a mistake shows before a model is loaded.

    add_trace_arguments(parser)
    config = trace_config_from_args(parser.parse_args(), name="generate")   # None: tracing is off

A command that always writes a run says so to both: `always=True`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

from dsatrace.errors import UserError
from dsatrace.flags import Flag, add_flags, values_of
from dsatrace.schema import LEVELS, Level

PREFILL_CHOICES = ("off", "last")
QUEUE_POLICIES = ("block", "drop")
ON_ERROR_CHOICES = ("stop", "continue")
_OF_EVERY_RUN = ("trace_out", "trace_on_error")  # flags that matter to a run without steps too


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """How to trace a run; every mistake raises `UserError` naming the flag."""

    out: Path  # the run's folder, new or empty
    block_size: int = 16  # tokens
    level: Level = "full"
    sample_rate: float = 1.0  # share of the decode steps; 0: none
    store_scores: bool = False
    keep_order: bool = False  # positions by score instead of ascending
    prefix_key_tokens: int = 256
    sync_cuda: bool = True
    prefill: Literal["off", "last"] = "off"
    seed: int = 0
    compared_block_sizes: tuple[int, ...] = (16, 32, 64)  # tokens; the summary's table of touched blocks
    queue_policy: Literal["block", "drop"] = "block"  # when the queue is full: wait, or lose the step
    queue_steps: int = 8  # steps that may wait for the writer
    on_error: Literal["stop", "continue"] = "stop"  # when the writer fails: end the run, or go on untraced
    summary_interval_s: float = 5.0

    def __post_init__(self) -> None:
        _require(self.block_size >= 1, "--kv-block-size", self.block_size, "use at least 1 token")
        _require(self.level in LEVELS, "--trace-level", self.level, f"use one of {', '.join(LEVELS)}")
        _require(
            0 <= self.sample_rate <= 1,
            "--trace-sample-rate",
            self.sample_rate,
            "use a share above 0, at most 1",
        )
        _require(
            self.prefix_key_tokens >= 1, "--trace-prefix-key-tokens", self.prefix_key_tokens, "use at least 1"
        )
        _require(self.prefill in PREFILL_CHOICES, "--trace-prefill", self.prefill, "use off or last")
        _require(
            len(self.compared_block_sizes) > 0 and min(self.compared_block_sizes) >= 1,
            "compared_block_sizes",
            self.compared_block_sizes,
            "name at least one block size of 1 token or more",
        )
        _require(
            self.queue_policy in QUEUE_POLICIES,
            "--trace-queue-policy",
            self.queue_policy,
            "use block or drop",
        )
        _require(self.queue_steps >= 1, "--trace-queue-steps", self.queue_steps, "let at least 1 step wait")
        _require(self.on_error in ON_ERROR_CHOICES, "--trace-on-error", self.on_error, "use stop or continue")
        _require(
            self.summary_interval_s > 0, "summary_interval_s", self.summary_interval_s, "use a time above 0"
        )
        if self.level != "full" and (self.store_scores or self.keep_order):
            flag = "--trace-store-scores" if self.store_scores else "--trace-keep-order"
            raise UserError(f"{flag} needs the positions; use --trace-level full, not {self.level}")

    @property
    def records_steps(self) -> bool:
        """Some forward may be recorded; otherwise a run writes its requests and nothing else."""
        return self.sample_rate > 0 or self.prefill != "off"

    @property
    def needs_scores(self) -> bool:
        """The capture must carry every selected score: to store them, or to order by them."""
        return self.store_scores or self.keep_order


FLAGS = {
    "block_size": Flag("tokens in a block", ("--kv-block-size",)),
    "level": Flag("what a record holds", ("--trace-level",)),
    "sample_rate": Flag("share of the steps", ("--trace-sample-rate",)),
    "store_scores": Flag("record every selected score", ("--trace-store-scores",)),
    "keep_order": Flag("positions by score instead of ascending", ("--trace-keep-order",)),
    "prefix_key_tokens": Flag("tokens hashed into a prefix's key", ("--trace-prefix-key-tokens",)),
    "sync_cuda": Flag("do not synchronise the device once a step", ("--trace-no-sync-cuda",), negated=True),
    "prefill": Flag("record the prompt's last position too", ("--trace-prefill",)),
    "queue_policy": Flag(
        "when the writer falls behind: wait for it, or drop the step and count it", ("--trace-queue-policy",)
    ),
    "queue_steps": Flag("steps that may wait for the writer", ("--trace-queue-steps",)),
    "on_error": Flag(
        "when the trace cannot be written: end the run, or go on without", ("--trace-on-error",)
    ),
}
"""The fields of `TraceConfig` that have a flag of a value."""


def is_sampled(step_number: int, rate: float, seed: int) -> bool:
    """Whether a step of the run is recorded: the same answer for the same seed, in any order."""
    if rate >= 1:
        return True
    mask = (1 << 64) - 1
    # splitmix64: neighbouring steps get unrelated numbers.
    z = (seed * 0x9E3779B97F4A7C15 + (step_number + 1) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) < rate * 2**64


def add_trace_arguments(parser: argparse.ArgumentParser, always: bool = False) -> None:
    """Adds the trace flags; defaults come from `TraceConfig`.

    With `always` a run has a folder whatever the flags say, and `--no-trace` records no step in it.
    """
    add = parser.add_argument_group("trace").add_argument
    if always:
        add("--no-trace", action="store_true", help="record no step: requests and summary only")
        add("--trace-out", metavar="DIR", help="folder of the run, new or empty")
    else:
        add("--trace-enable", action="store_true", help="record what the indexer selects")
        add("--trace-out", metavar="DIR", help="folder of the run, new or empty; implies --trace-enable")
    add_flags(add, TraceConfig, FLAGS)


@overload
def trace_config_from_args(
    args: argparse.Namespace, name: str, seed: int = 0, always: Literal[False] = False
) -> TraceConfig | None: ...
@overload
def trace_config_from_args(
    args: argparse.Namespace, name: str, seed: int = 0, *, always: Literal[True]
) -> TraceConfig: ...
def trace_config_from_args(
    args: argparse.Namespace, name: str, seed: int = 0, always: bool = False
) -> TraceConfig | None:
    """The run's config, or None when tracing is off. `name` begins the default folder's name.

    `always` as it was for `add_trace_arguments`: there is a config then, of sample rate 0
    with `--no-trace`. Raises `UserError` for a bad value, and for a folder that holds a run already.
    """
    if always and args.no_trace:
        _refuse_idle_flags(args, _OF_EVERY_RUN, "beside --no-trace; leave one of them out")
    elif not always and not (args.trace_enable or args.trace_out):
        _refuse_idle_flags(args, (), "without --trace-enable; add it")
        return None
    if not args.trace_sample_rate > 0:
        raise UserError(f"--trace-sample-rate {args.trace_sample_rate}: use a share above 0, at most 1")
    out = Path(args.trace_out).absolute() if args.trace_out else default_run_folder(name)
    check_run_folder(out)
    values = values_of(args, FLAGS)
    if always and args.no_trace:
        values["sample_rate"] = 0.0
    return TraceConfig(out, seed=seed, **values)


def default_run_folder(name: str) -> Path:
    """`<name>_<timestamp>` under the checkout's `outputs/`, or `./outputs` when installed elsewhere."""
    checkout = Path(__file__).resolve().parents[3]
    inside = (checkout / "pyproject.toml").is_file() and (checkout / "inference" / "dsatrace").is_dir()
    outputs = (checkout if inside else Path.cwd()) / "outputs"
    stem = f"{name}_{time.strftime('%Y%m%d_%H%M%S')}"
    folder, again = outputs / stem, 2
    while folder.exists():
        folder, again = outputs / f"{stem}_{again}", again + 1
    return folder


def check_run_folder(folder: Path) -> None:
    """Raises `UserError` unless `folder` is absent or empty."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name another with --trace-out")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: holds files already and is never overwritten; name another with --trace-out"
        )


def _require(holds: bool, flag: str, value: object, remedy: str) -> None:
    if not holds:
        raise UserError(f"{flag} {value}: {remedy}")


def _refuse_idle_flags(args: argparse.Namespace, working: Sequence[str], why: str) -> None:
    """A trace flag without tracing is a mistake worth a word: no trace would come of it."""
    parser = argparse.ArgumentParser()
    add_trace_arguments(parser, always=hasattr(args, "no_trace"))
    for dest, value in vars(parser.parse_args([])).items():
        idle = dest.startswith("trace_") and dest not in working
        if idle and getattr(args, dest) != value:
            raise UserError(f"--{dest.replace('_', '-')} does nothing {why}")
