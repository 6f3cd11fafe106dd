"""How hard the random tests try.

The suite tries what a few minutes allow, in CI the same examples every time; more of them belong on a
machine that has the night: `DSATRACE_TEST_POWER=20 python3 -m pytest` gives each test twenty times as many.
"""

from __future__ import annotations

import os

POWER = int(os.environ.get("DSATRACE_TEST_POWER", "1"))


def examples(num: int) -> int:
    """The `max_examples` of a test that has `num` of them in CI."""
    return num * POWER
