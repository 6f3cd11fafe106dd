"""What an eviction policy is told of one use of one block.

Access(time=0.5, workload=1, parent=7, depth=3, from_end=2)
"""

from __future__ import annotations

from typing import NamedTuple

NO_PARENT = -1
NEVER = 2**62
"""`next_use` of a block that is not used again."""


class Access(NamedTuple):
    """One use of one block by one request; every field has a neutral default.

    `depth` counts the blocks before it in its request, `from_end` those after it;
    `next_use` is the position of its next access in the stream, for OPT alone.
    """

    time: float = 0.0  # seconds
    workload: int = 0  # the request's class
    parent: int = NO_PARENT  # the block before it in the chain
    depth: int = 0
    from_end: int = 0
    next_use: int = NEVER
