"""What only one process may find out, told to all of them before a model is loaded.

Needs torch only where several ranks run.

    source = from_rank_0(lambda: find_source("ruler"))
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from dsatrace.engine.ranks import is_rank_0

Made = TypeVar("Made")


def from_rank_0(make: Callable[[], Made]) -> Made:
    """What rank 0 makes, on every rank of the process group; where `make` raises, rank 0 takes all down."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return make()
    import torch.distributed as dist

    made = [make() if is_rank_0() else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[return-value]
