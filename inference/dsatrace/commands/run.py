"""`dsatrace run`: a data set, and the runner that serves it.

dsatrace run ruler --ckpt-path converted --limit 10
"""

from __future__ import annotations

from collections.abc import Sequence

from dsatrace.commands.dispatch import Verb, dispatch

_DATASET = "dsatrace.commands.run_dataset"
DATA_SETS = {
    "ruler": Verb(_DATASET, "needles and questions in long texts", ("--dataset", "ruler")),
    "longbenchv2": Verb(_DATASET, "multiple choice over long documents", ("--dataset", "longbenchv2")),
    "sharegpt": Verb(_DATASET, "recorded chats", ("--dataset", "sharegpt")),
    "burstgpt": Verb("dsatrace.commands.run_burstgpt", "recorded arrivals, with made-up prompts"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the data set; without one, lists them. An unknown one exits 2."""
    return dispatch("dsatrace run", DATA_SETS, argv, noun="data set")
