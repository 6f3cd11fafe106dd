"""Samples of our own making, in the real formats, for runs without a file and without a network.

Written for this project or drawn from its generator; nothing in them comes from the data
sets they stand in for, and a run that uses one says `embedded`.

    ShareGPTLoader(sample_file("sharegpt"))
"""

from __future__ import annotations

from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.workloads.burstgpt_synthetic import BurstSettings

# The BurstGPT sample is what the generator gives for these, lengths kept small for a laptop.
BURSTGPT_SETTINGS = BurstSettings(
    num_rows=40,
    seed=17,
    max_request_tokens=512,
    max_response_tokens=64,
    num_open_sessions=4,
    api_share=0.25,
)


def sample_file(name: str) -> Path:
    """The embedded file of a data set, `<name>_sample.*`."""
    found = {path.name.partition("_sample.")[0]: path for path in Path(__file__).parent.glob("*_sample.*")}
    if name not in found:
        raise UserError(f"no embedded sample {name!r}; there are {', '.join(sorted(found))}")
    return found[name]
