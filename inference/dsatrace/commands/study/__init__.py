"""`dsatrace study`: a sub-verb, and the module whose `main()` it calls.

dsatrace study compare --data-path chats.json
"""

from __future__ import annotations

from collections.abc import Sequence

from dsatrace.commands.dispatch import Verb, dispatch

VERBS = {
    "prepare": Verb("dsatrace.commands.study.prepare", "conversations to single-turn and multi-turn traces"),
    "run": Verb("dsatrace.commands.study.run", "replay one trace: sharing, hits, reuse gaps, per turn"),
    "compare": Verb("dsatrace.commands.study.compare", "single-turn against multi-turn, same conversations"),
    "explain": Verb("dsatrace.commands.study.explain", "one trace under every definition of a hit rate"),
    "sweep": Verb("dsatrace.commands.study.sweep", "block sizes x capacities x policies x workloads"),
    "mixed": Verb(
        "dsatrace.commands.study.sweep", "several workloads in one cache, policy by policy", ("--together",)
    ),
    "size": Verb(
        "dsatrace.commands.study.size", "GiB of cache a workload is worth: one curve, one recommendation"
    ),
    "report": Verb("dsatrace.commands.study.report", "tables and pictures of finished studies again"),
    "three-turns": Verb("dsatrace.commands.study.three_turns", "one conversation of three turns by hand"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Calls the sub-verb's `main`; without one, lists them. An unknown one exits 2."""
    note = "\n\n`python -m dsatrace.study.metrics` prints what each number means."
    return dispatch("dsatrace study", VERBS, argv, note)
