"""The `dsatrace` command: a verb, and the module whose `main()` it calls.

dsatrace report outputs/generate_20260101_120000
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsatrace.commands.dispatch import dispatch

VERBS = {
    "generate": ("dsatrace.commands.generate", "answer prompts, and trace what the indexer selects"),
    "report": ("dsatrace.commands.report", "tables and a picture of a traced run"),
    "export": ("dsatrace.commands.export", "a run's records to Parquet, or back to JSON lines"),
    "estimate": ("dsatrace.commands.estimate", "how large a trace will be, before it is run"),
    "verify": ("dsatrace.commands.verify", "re-derive a run's records, and name the first bad one"),
    "summarize": ("dsatrace.commands.summarize", "recompute a summary from runs' files, and merge runs"),
    "convert": ("dsatrace.commands.convert", "a Hugging Face checkpoint to one file a rank"),
    "download": ("dsatrace.commands.download", "a data set from the hub to data/"),
    "calibrate": ("dsatrace.commands.calibrate", "fit what reads from this machine's KV stores cost"),
    "needle": ("dsatrace.commands.needle", "write a needle-in-a-haystack prompt"),
    "make-tiny-checkpoint": ("dsatrace.commands.make_tiny_checkpoint", "a small random checkpoint"),
    "study": ("dsatrace.commands.study", "how much conversations share, and what a cache makes of it"),
    "sanity": ("dsatrace.commands.sanity", "synthetic records through the plain implementation"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Calls the verb's `main`; without one, lists them. An unknown verb exits 2."""
    return dispatch("dsatrace", VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
