"""What a pool in host memory would have served: evicted blocks go there, and can be loaded back.

Read off a finished replay. A block loaded from the host takes the same place in the device's
cache as one that is computed, so what the device holds is the same either way, and the
device's own hits stand. The host pool forgets the block that it was least recently given or
asked for; one that is loaded back stays there too. Knows no bytes and no time.

    host_hit_blocks(trace, result, num_blocks=4096)        # (R,) blocks, beside the device's hits
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from dsatrace.errors import UserError
from dsatrace.kv.blocks import EVICT, MISS
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay import ReplayResult


def host_hit_blocks(trace: BlockTrace, result: ReplayResult, num_blocks: int) -> NDArray[np.int64]:
    """Blocks that each request found in a host pool of `num_blocks`, when it was first prefilled, (R,).

    The chain goes on where the device's prefix ends, through blocks of the host pool; one that
    the device still holds continues it and is not counted. The last token is always computed.
    Needs a result with events.
    """
    if num_blocks < 1:
        raise UserError(f"a host pool holds at least 1 block, not {num_blocks}")
    assert result.events is not None, "the host tier is read off a replay that records events"
    hits = np.zeros(trace.num_requests, np.int64)
    seen = np.zeros(trace.num_requests, bool)
    copies = [0] * trace.num_keys  # of each block, in the device's cache
    host: OrderedDict[int, None] = OrderedDict()
    events = result.events
    kinds, keys, requests = (events[name].tolist() for name in ("kind", "key", "request"))
    for kind, key, request in zip(kinds, keys, requests, strict=True):
        if not seen[request]:  # its first event follows its lookup at once
            seen[request] = True
            hits[request] = _lookup(trace, result, request, copies, host)
        if kind == EVICT:
            copies[key] -= 1
            host[key] = None
            host.move_to_end(key)
            if len(host) > num_blocks:
                host.popitem(last=False)
        elif kind == MISS:
            copies[key] += 1
    return hits


def _lookup(
    trace: BlockTrace, result: ReplayResult, request: int, copies: list[int], host: OrderedDict[int, None]
) -> int:
    most = int(trace.prompt_tokens[request] - 1) // trace.block_size
    num_hits = 0
    for key in trace.keys_of(request)[int(result.hit_tokens[request]) // trace.block_size : most]:
        if key in host and not copies[key]:
            host.move_to_end(key)
            num_hits += 1
        elif not copies[key]:
            break
    return num_hits
