"""What a run traces, and the command-line flags that say so.

Standard library only. Knows no model and opens no file; it does check that the run's folder
is free, so that a mistake shows before a model is loaded, and makes the one that it names itself.

    add_trace_arguments(parser)
    config = trace_config_from_args(parser.parse_args(), name="generate")   # None: tracing is off

A command that writes a run in any case adds the flags with `always` and calls `run_config_from_args`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import errno
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from dsatrace.errors import UserError
from dsatrace.files import temporary_of
from dsatrace.flags import Flag, add_flags, values_of
from dsatrace.schema import LEVELS, MANIFEST_FILE, Level

_OF_EVERY_RUN = ("trace_out", "trace_on_error")  # flags that matter to a run without steps too
_USE_A_SHARE = "use a share above 0, at most 1"


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
    prefill: Literal["off", "last", "all"] = "off"  # positions of the prompt; all: not the engine's
    seed: int = 0
    compared_block_sizes: tuple[int, ...] = (16, 32, 64)  # tokens; the summary's table of touched blocks
    queue_policy: Literal["block", "drop"] = "block"  # when the queue is full: wait, or lose the step
    queue_steps: int = 8  # steps that may wait for the writer
    on_error: Literal["stop", "continue"] = "stop"  # when the writer fails: end the run, or go on untraced
    summary_interval_s: float = 5.0
    format: Literal["jsonl", "parquet"] = "jsonl"  # of the step records

    def __post_init__(self) -> None:
        for name, (holds, remedy) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                flag = FLAGS[name].names[0] if name in FLAGS else name
                raise UserError(f"{flag} {value}: {remedy}")
        if self.level != "full" and (self.store_scores or self.keep_order):
            flag = "--trace-store-scores" if self.store_scores else "--trace-keep-order"
            raise UserError(f"{flag} needs the positions; use --trace-level full, not {self.level}")

    @property
    def records_steps(self) -> bool:
        """Whether a forward may be recorded; if not, the run writes its requests only."""
        return self.sample_rate > 0 or self.prefill != "off"

    @property
    def needs_scores(self) -> bool:
        """Whether a capture must carry every selected score: to store them, or to order by them."""
        return self.store_scores or self.keep_order


FLAGS = {
    "block_size": Flag("tokens in a block", ("--kv-block-size",)),
    "level": Flag("blocks: no positions and scores; stats: no block ids either", ("--trace-level",)),
    "format": Flag(
        "what step records are written as: lines to read, or columns for long runs", ("--trace-format",)
    ),
    "sample_rate": Flag("share of the steps", ("--trace-sample-rate",)),
    "store_scores": Flag("record every selected score", ("--trace-store-scores",)),
    "keep_order": Flag("positions by score instead of ascending", ("--trace-keep-order",)),
    "prefix_key_tokens": Flag("tokens hashed into a prefix's key", ("--trace-prefix-key-tokens",)),
    "sync_cuda": Flag("do not synchronise the device every step", ("--trace-no-sync-cuda",), negated=True),
    "prefill": Flag("record the prompt's last position too", ("--trace-prefill",), choices=("off", "last")),
    "queue_policy": Flag(
        "when the writer falls behind: wait for it, or drop the step and count it", ("--trace-queue-policy",)
    ),
    "queue_steps": Flag("steps that may wait for the writer", ("--trace-queue-steps",)),
    "on_error": Flag(
        "when the trace cannot be written: end the run, or go on without", ("--trace-on-error",)
    ),
}
"""Fields of `TraceConfig` that have a flag."""


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "block_size": (lambda tokens: tokens >= 1, "use at least 1 token"),
    "level": (lambda level: level in LEVELS, f"use one of {', '.join(LEVELS)}"),
    "sample_rate": (lambda rate: 0 <= rate <= 1, _USE_A_SHARE),
    "format": (lambda name: name in ("jsonl", "parquet"), "use jsonl or parquet"),
    "prefix_key_tokens": (lambda tokens: tokens >= 1, "use at least 1"),
    "prefill": (lambda what: what in ("off", "last", "all"), "use off, last or all"),
    "compared_block_sizes": (lambda sizes: min(sizes, default=0) >= 1, "name sizes of 1 token or more"),
    "queue_policy": (lambda policy: policy in ("block", "drop"), "use block or drop"),
    "queue_steps": (lambda steps: steps >= 1, "let at least 1 step wait"),
    "on_error": (lambda reaction: reaction in ("stop", "continue"), "use stop or continue"),
    "summary_interval_s": (lambda seconds: seconds > 0, "use a time above 0"),
}
"""What a field's value must be, and the remedy for one that is not."""


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

    With `always` there is a run's folder in any case, and `--no-trace` records no step in it.
    """
    add = parser.add_argument_group("trace").add_argument
    if always:
        add("--no-trace", action="store_true", help="record no step: requests and summary only")
        add("--trace-out", metavar="DIR", help="folder of the run, new or empty")
    else:
        add("--trace-enable", action="store_true", help="record what the indexer selects")
        add("--trace-out", metavar="DIR", help="folder of the run, new or empty; implies --trace-enable")
    add_flags(add, TraceConfig, FLAGS)


def trace_config_from_args(args: argparse.Namespace, name: str | None, seed: int = 0) -> TraceConfig | None:
    """The run's config, or None when tracing is off. `name` begins the default folder's name; None: no
    folder is made, the flags are only checked.

    Raises `UserError` for a bad value, and for a folder that holds a run already.
    """
    if not (args.trace_enable or args.trace_out):
        _refuse_idle_flags(args, (), "without --trace-enable; add it")
        return None
    return _config(args, name, seed)


def run_config_from_args(args: argparse.Namespace, name: str | None, seed: int = 0) -> TraceConfig:
    """The same for flags that were added with `always`; the sample rate is 0 with `--no-trace`."""
    if not args.no_trace:
        return _config(args, name, seed)
    _refuse_idle_flags(args, _OF_EVERY_RUN, "beside --no-trace; leave one of them out")
    return dataclasses.replace(_config(args, name, seed), sample_rate=0.0)


def _config(args: argparse.Namespace, name: str | None, seed: int) -> TraceConfig:
    if not args.trace_sample_rate > 0:
        raise UserError(f"--trace-sample-rate {args.trace_sample_rate}: {_USE_A_SHARE}")
    given = Path(args.trace_out).absolute() if args.trace_out else None
    if given is not None:
        check_run_folder(given)
    config = TraceConfig(given or Path(), seed=seed, **values_of(args, FLAGS))
    return config if given or name is None else dataclasses.replace(config, out=default_run_folder(name))


def default_run_folder(name: str) -> Path:
    """Makes `<name>_<timestamp>` under the checkout's `outputs/`, or `./outputs` when installed elsewhere.

    No two runs get the same one. It is removed again if it is empty when the process ends.
    """
    checkout = Path(__file__).resolve().parents[3]
    inside = (checkout / "pyproject.toml").is_file() and (checkout / "inference" / "dsatrace").is_dir()
    outputs = (checkout if inside else Path.cwd()) / "outputs"
    stem = f"{name}_{time.strftime('%Y%m%d_%H%M%S')}"
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        folder = _new_folder(outputs / name for name in (stem, *(f"{stem}_{i}" for i in range(2, 1000))))
    except OSError as error:
        raise UserError(
            f"{outputs}: cannot make a folder there: {error.strerror}; name one with --trace-out"
        ) from error
    atexit.register(_remove_if_empty, folder)
    return folder


def _new_folder(folders: Iterable[Path]) -> Path:
    """Makes the first of them that does not exist."""
    for folder in folders:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise FileExistsError(errno.EEXIST, "all names are taken")


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_run_folder(folder: Path) -> None:
    """Raises `UserError` unless `folder` is absent, empty, or what a start left that was killed at once.

    Such a start leaves its manifest under the temporary name; the next one writes over it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name another with --trace-out")
    unfinished = temporary_of(folder / MANIFEST_FILE)
    if folder.is_dir() and any(path != unfinished for path in folder.iterdir()):
        raise UserError(
            f"{folder}: holds files already and is never overwritten; name another with --trace-out"
        )


def _refuse_idle_flags(args: argparse.Namespace, working: Sequence[str], why: str) -> None:
    """Raises `UserError` for a trace flag that was given and would have no effect."""
    parser = argparse.ArgumentParser()
    add_trace_arguments(parser, always=hasattr(args, "no_trace"))
    for dest, value in vars(parser.parse_args([])).items():
        idle = dest.startswith("trace_") and dest not in working
        if idle and getattr(args, dest) != value:
            raise UserError(f"--{dest.replace('_', '-')} does nothing {why}")
