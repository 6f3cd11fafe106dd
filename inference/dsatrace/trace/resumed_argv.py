"""The command line that a run is resumed with: the one it was started with, as its manifest keeps it.

argv = [*resumed_argv(folder, given), *given]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.trace.manifest import REDACTED
from dsatrace.trace.reader import RunReader

_SUPERSEDED = ("--resume", "--trace-out")  # their value is a run's folder


def resumed_argv(folder: Path, given: Sequence[str] = ()) -> list[str]:
    """The flags the run was started with, to be parsed before those `given` at the resume.

    Without `--trace-out` and `--resume`. Raises `UserError` for a flag whose value the manifest hides
    (a secret, a prompt) unless it is given again.
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


def _is_flag(argument: str) -> bool:
    """As argparse decides it: an argument with a space in it is a value."""
    return argument.startswith("--") and " " not in argument.partition("=")[0]


def _by_flag(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(flag, the flag and its values) in order; arguments before the first flag come with an empty flag."""
    flag, arguments = "", list[str]()
    for argument in argv:
        if _is_flag(argument):
            if arguments:
                yield flag, arguments
            flag, arguments = argument.partition("=")[0], []
        arguments.append(argument)
    if arguments:
        yield flag, arguments
