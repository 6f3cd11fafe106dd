"""A command of several verbs: each is a module whose `main()` is imported when it is called.

return dispatch("dsatrace", {"report": Verb("dsatrace.commands.report", "tables and a picture")}, argv)
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Verb(NamedTuple):
    """A verb's module, what it does, and the flags that the verb itself stands for."""

    module: str
    meaning: str
    flags: tuple[str, ...] = ()


def dispatch(
    program: str, verbs: Mapping[str, Verb], argv: Sequence[str] | None, note: str = "", noun: str = "verb"
) -> int:
    """Calls the verb's `main`; without one, lists them and the note. An unknown verb exits 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(program, verbs, noun) + note)
        return 0
    if argv[0] not in verbs:
        close = difflib.get_close_matches(argv[0], verbs, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(verbs)};"
        print(f"error: {program} has no {noun} {argv[0]!r}; {remedy} see {program} --help", file=sys.stderr)
        return 2
    verb = verbs[argv[0]]
    code: int = importlib.import_module(verb.module).main([*verb.flags, *argv[1:]])
    return code


def _usage(program: str, verbs: Mapping[str, Verb], noun: str) -> str:
    word, width = noun.replace(" ", "").upper(), max(map(len, verbs))
    rows = "\n".join(f"  {name:{width}}  {verb.meaning}" for name, verb in verbs.items())
    return f"usage: {program} {word} [flags]; {program} {word} --help explains the flags\n\n{rows}"
