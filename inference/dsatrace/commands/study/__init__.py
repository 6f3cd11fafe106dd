"""`dsatrace study`: a sub-verb, and the module whose `main()` it calls.

dsatrace study compare --data-path chats.json
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "prepare": ("dsatrace.commands.study.prepare", "conversations to single-turn and multi-turn traces"),
    "run": ("dsatrace.commands.study.run", "replay one trace: sharing, hits, reuse gaps, per turn"),
    "compare": ("dsatrace.commands.study.compare", "single-turn against multi-turn, same conversations"),
    "explain": ("dsatrace.commands.study.explain", "one trace under every definition of a hit rate"),
    "sweep": ("dsatrace.commands.study.sweep", "block sizes x capacities x policies x workloads"),
    "mixed": ("dsatrace.commands.study.mixed", "several workloads in one cache, policy by policy"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Calls the sub-verb's `main`; without one, lists them. An unknown one exits 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] not in VERBS:
        print(f"error: study has no verb {argv[0]!r}; choose one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])
    return code


def _usage() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {verb:{width}}  {meaning}" for verb, (_, meaning) in VERBS.items())
    return (
        "usage: dsatrace study VERB [flags]; dsatrace study VERB --help tells a verb's flags\n\n"
        f"{rows}\n\n`python -m dsatrace.study.metrics` prints what each number means."
    )
