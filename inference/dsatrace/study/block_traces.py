"""Requests in memory to what the cache replays: blocks of a given size with exact prefix ids.

trace = block_trace(requests, block_size=16)
trace.keys_of(0)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.study.requests import StudyRequests


def block_trace(requests: StudyRequests, block_size: int) -> BlockTrace:
    """Prompts and, as far as their ids are known, responses in blocks of `block_size` tokens.

    A trace of block ids keeps them at its own block size; at another one they are expanded to
    tokens, and sharing finer than its blocks stays unseen. Raises a `UserError` for a block
    size below 1, and for block ids that do not name their prefix.
    """
    if block_size < 1:
        raise UserError(f"block_size must be at least 1, not {block_size}")
    if requests.tokens_per_id == block_size != 1:
        try:
            return BlockTrace.from_block_ids(
                cast(Sequence[Sequence[int]], [requests.prompt(i) for i in range(len(requests))]),
                requests.num_prompt_tokens.tolist(),
                requests.num_response_tokens.tolist(),
                block_size=block_size,
                time_s=requests.arrival_s.tolist(),
            )
        except ValueError as error:
            raise UserError(f"{error}; give ids that stand for a block and all before it") from error
    tokens = requests.as_tokens()
    trace = BlockTrace.from_tokens(
        [tokens.prompt(i) for i in range(len(tokens))],
        [tokens.response(i) for i in range(len(tokens))],
        block_size=block_size,
        time_s=tokens.arrival_s.tolist(),
    )
    return dataclasses.replace(trace, output_tokens=tokens.num_response_tokens.astype(np.int64))
