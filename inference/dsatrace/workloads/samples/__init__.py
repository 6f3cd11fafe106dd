"""Samples of our own making, in the real formats, for runs without a file and without a network.

Written for this project, or drawn from its generator (BurstGPT's); nothing in them comes from the real
data sets. A run that uses one says `embedded`. In ShareGPT's and BurstGPT's, prompts are longer than the
192 tokens that needle-2k selects, and two share their beginning, so that an offline run has something
sparse and a prefix hit to show.

    ShareGPTLoader(sample_file("sharegpt"))
"""

from __future__ import annotations

from pathlib import Path

from dsatrace.errors import UserError


def sample_file(name: str) -> Path:
    """The embedded file of a data set, `<name>_sample.*`."""
    found = {path.name.partition("_sample.")[0]: path for path in Path(__file__).parent.glob("*_sample.*")}
    if name not in found:
        raise UserError(f"no embedded sample {name!r}; there are {', '.join(sorted(found))}")
    return found[name]
