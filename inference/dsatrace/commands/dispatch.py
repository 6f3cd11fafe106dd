"""A command of several verbs: each is a module whose `main()` is imported when it is called.

return dispatch("dsatrace", {"report": ("dsatrace.commands.report", "tables and a picture")}, argv)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

Verbs = Mapping[str, tuple[str, str]]
"""Verb to module and meaning."""


def dispatch(program: str, verbs: Verbs, argv: Sequence[str] | None, note: str = "") -> int:
    """Calls the verb's `main`; without one, lists them and the note. An unknown verb exits 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(program, verbs) + note)
        return 0
    if argv[0] not in verbs:
        print(f"error: {program} has no verb {argv[0]!r}; choose one of {', '.join(verbs)}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(verbs[argv[0]][0]).main(argv[1:])
    return code


def _usage(program: str, verbs: Verbs) -> str:
    width = max(map(len, verbs))
    rows = "\n".join(f"  {verb:{width}}  {meaning}" for verb, (_, meaning) in verbs.items())
    return f"usage: {program} VERB [flags]; {program} VERB --help tells a verb's flags\n\n{rows}"
