"""Whether a run can be gone on with, and with which flags: what its manifest says of it.

Standard library only. Knows no file but the manifest; `resume.py` goes on with the others.

    argv = [*resumed_argv(folder, given), *given]      # given: what follows --resume RUN
    check_resumable(read_json("manifest.json"), manifest(run, config, "running", ...))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.trace.manifest import REDACTED
from dsatrace.trace.reader import RunReader

_MAY_DIFFER = (
    *("tool_version", "state", "error", "started_utc", "argv", "resumed_at_forward"),
    "trace.queue_steps",
)
_REMEDIES = {
    "model_config": "give the same --config",
    "cache_layout": "give the same --config",
    "tokenizer": "give the same --tokenizer",
    "chat": "give the same --chat-template",
    "data_source": "give the same data",
    "device": "resume it on the same kind of device",
    "world_size": "start as many ranks as then",
    "seed": "give the same --seed",
    "prefix_source": "leave --prefix-caching as it was",
    "tiers": "give the same tiers",
    "trace.level": "give the same --trace-level",
    "trace.block_size_tokens": "give the same --kv-block-size",
    "trace.prefix_key_id": "set DSATRACE_PREFIX_KEY as it was then, or resume as the same user",
}
_SUPERSEDED = ("--resume", "--trace-out")
"""Flags whose value is the run's folder, or another's."""


def check_resumable(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises `UserError` unless both manifests are one run's; names the first field that differs.

    What shapes a record must be the same, and so must what a step's time depends on (device,
    ranks, tiers), since the summary pools it. The version of the tool, its command line and the
    length of the queue may differ. What an older version did not write down is not asked; it
    had no tiers.
    """
    for path, was, now in _differences({"tiers": None, **old}, new):
        remedy = next((said for name, said in _REMEDIES.items() if path.startswith(name)), "give what it was")
        raise UserError(f"cannot resume: {path} was {was!r} and is {now!r} now; {remedy}, or start a new run")


def resumed_argv(folder: Path, given: Sequence[str] = ()) -> list[str]:
    """The flags the run was started with, to be parsed before those `given` at the resume.

    Without `--trace-out` and `--resume`. A flag whose value the manifest hides (a secret, a
    prompt) must be among those given: `UserError` names it.
    """
    given_flags = {argument.partition("=")[0] for argument in given if _is_flag(argument)}
    argv: list[str] = []
    for flag, arguments in _by_flag(RunReader(folder).manifest["argv"]):
        if flag in _SUPERSEDED:
            continue
        if any(REDACTED in argument for argument in arguments):
            if flag not in given_flags:
                raise UserError(
                    f"{folder}: the manifest does not keep the value of {flag}; give it again beside --resume"
                )
            continue
        argv += arguments
    return argv


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of what both name and must not differ."""
    for name in [name for name in old if name in new]:
        path, was, now = prefix + name, old[name], new[name]
        if path in _MAY_DIFFER:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differences(was, now, f"{path}.")
        elif was != now:
            yield path, was, now


def _is_flag(argument: str) -> bool:
    """As argparse sees it: what holds a space is a value."""
    return argument.startswith("--") and " " not in argument.partition("=")[0]


def _by_flag(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(flag, the flag and its values) in order; what stands before the first flag has an empty one."""
    flag, arguments = "", list[str]()
    for argument in argv:
        if _is_flag(argument):
            if arguments:
                yield flag, arguments
            flag, arguments = argument.partition("=")[0], []
        arguments.append(argument)
    if arguments:
        yield flag, arguments
