"""What a hot buffer would have missed of a run, step by step: for a timeline, where a replay has only sums.

buffers = buffers_of(RunReader("outputs/mine"), "2k")
buffers.name                      # "LRU 2k, replayed"
for one in buffers.each: ...      # a layer of a request: its missed and resident ids after each step
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dsatrace.selection_replay.policies import misses
from dsatrace.selection_replay.settings import ReplaySettings, Size, parse_sizes
from dsatrace.selection_replay.streams import Recorded, layer_steps, numbered_anew
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selections import read_selections
from dsatrace.trace.timeline import Buffered, Buffers


def buffers_of(run: RunReader, size: str) -> Buffers:
    """LRU buffers of `size` ids, one per request and layer, which the first step past top-k fills.

    Raises `UserError` for a size that is none, and for a run that cannot be replayed; `each` does for what
    is found on the way.
    """
    settings = ReplaySettings(policies=("lru",), sizes=parse_sizes(size))
    recorded = Recorded.of(run.manifest, settings, str(run.folder))
    return Buffers(f"LRU {size}, replayed", _each(run, settings.sizes[0], recorded, settings))


def _each(run: RunReader, size: Size, recorded: Recorded, settings: ReplaySettings) -> Iterator[Buffered]:
    for request in read_selections(run):
        for name, layer in request.layers.items():
            steps = layer_steps(request, name, recorded, settings)
            if not steps.num_steps:
                continue
            steps = steps if recorded.is_position else numbered_anew(steps)
            room = size.ids(recorded.selection.layers[name.layer_id].top_k, int(steps.visible[-1]))
            missed = misses(steps, "lru", room).misses
            missed[: steps.num_warm] = 0
            _, first = np.unique(steps.ids, return_index=True)
            new = np.bincount(np.searchsorted(steps.ptr, first, side="right") - 1, minlength=steps.num_steps)
            forward_idx = layer.forward_idx[len(layer) - steps.num_steps :]
            yield Buffered(name.layer_id, forward_idx, missed, np.minimum(np.cumsum(new), room))
