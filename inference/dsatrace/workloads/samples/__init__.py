"""Samples of our own making, in the real formats, for runs without a file and without a network.

Written for this project or drawn from its generator (BurstGPT's); nothing in them comes from the data
sets they stand in for, and a run that uses one says `embedded`.

    ShareGPTLoader(sample_file("sharegpt"))
"""

from __future__ import annotations

from pathlib import Path

from dsatrace.errors import UserError

_FILES = {
    "sharegpt": "sharegpt_sample.json",
    "longbench_v2": "longbench_v2_sample.json",
    "burstgpt": "burstgpt_sample.csv",
}


def sample_file(name: str) -> Path:
    """The embedded file of a data set."""
    if name not in _FILES:
        raise UserError(f"no embedded sample {name!r}; there are {', '.join(_FILES)}")
    return Path(__file__).parent / _FILES[name]
