"""`dsatrace run`: a data set, and the runner that serves it.

dsatrace run ruler --ckpt-path converted --limit 10
"""

from __future__ import annotations

from collections.abc import Sequence

from dsatrace.commands.dispatch import Verb, dispatch
from dsatrace.workloads.catalog import DATA_SETS
from dsatrace.workloads.data_set import DataSet


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the data set; without one, lists them. An unknown one exits 2."""
    verbs = {name: _verb(data_set) for name, data_set in DATA_SETS.items()}
    return dispatch("dsatrace run", verbs, argv, noun="data set")


def _verb(data_set: DataSet) -> Verb:
    if data_set.arrivals:
        return Verb("dsatrace.commands.run_burstgpt", data_set.help)
    return Verb("dsatrace.commands.run_dataset", data_set.help, ("--dataset", data_set.name))
