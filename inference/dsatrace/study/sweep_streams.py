"""Recorded block accesses as what a sweep replays: chains of the blocks of prompt and output.

A request's chain is the full blocks of its prompt, then those that its output completes, since a
later turn finds both. Only the prompt's blocks are looked up. Knows no policy and no file.

    given = CacheInput.of(accesses, block_size=32, concurrency=1)
    given.stream, given.prompt_blocks
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from dsatrace.errors import UserError
from dsatrace.kv.policies.stream import AccessStream, release_by_concurrency
from dsatrace.kv.simulation.block_trace import BlockTrace, offsets_of
from dsatrace.study.accesses import Accesses


@dataclasses.dataclass(frozen=True, eq=False)
class CacheInput:
    """R requests at one block size; `workload_names` are the stream's."""

    stream: AccessStream  # for the policies
    trace: BlockTrace  # for the block pool
    prompt_blocks: NDArray[np.int64]  # (R,) full blocks of the prompt, which begin the chain
    num_repeated: int  # blocks of outputs that occurred before in the trace

    @property
    def block_size(self) -> int:
        return self.trace.block_size

    @property
    def needed_blocks(self) -> NDArray[np.int64]:
        """(R,) blocks that a prompt takes, its last partial one included."""
        return -(-self.trace.prompt_tokens // self.block_size)

    @classmethod
    def of(cls, accesses: Accesses, block_size: int, concurrency: int = 1) -> CacheInput:
        """`block_size` must be a multiple of the recorded one, so that an id still names its prefix."""
        factor, rest = divmod(block_size, accesses.block_size)
        if rest or factor < 1:
            raise UserError(
                f"block accesses recorded at block size {accesses.block_size} cannot be replayed at "
                f"{block_size}; use a multiple, or the trace they came from"
            )
        keys, starts = _chains(accesses, factor)
        keys = np.unique(keys, return_inverse=True)[1].astype(np.int32)
        prompt_blocks = np.minimum(accesses.num_tokens // block_size, np.diff(starts))
        names = tuple(dict.fromkeys(accesses.workloads)) or ("",)
        number = {name: i for i, name in enumerate(names)}
        stream = AccessStream(
            keys,
            starts,
            accesses.arrival_s,
            np.array([number[name] for name in accesses.workloads], np.int32),
            release_by_concurrency(len(accesses), concurrency),
            names,
        )
        parents = stream.parents
        try:
            trace = BlockTrace(
                block_size=block_size,
                prompt_tokens=accesses.num_tokens,
                output_tokens=accesses.num_output_tokens,
                keys=keys,
                key_ptr=starts,
                parents=parents,
                time_s=accesses.arrival_s,
            )
        except ValueError as error:
            raise UserError(f"{error}; mend the trace") from error
        return cls(stream, trace, prompt_blocks, _num_repeated_outputs(keys, starts, prompt_blocks))


def _chains(accesses: Accesses, factor: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Keys and starts of each request's prompt and output, joined: the last id of a larger block names it."""
    num_prompt, num_output = np.diff(accesses.starts), np.diff(accesses.output_starts)
    starts = offsets_of(num_prompt + num_output)
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], np.diff(starts))
    keys = np.empty(starts[-1], np.int32)
    in_prompt = place < np.repeat(num_prompt, np.diff(starts))
    keys[in_prompt], keys[~in_prompt] = accesses.blocks, accesses.output_blocks
    return keys[place % factor == factor - 1], offsets_of(np.diff(starts) // factor)


def _num_repeated_outputs(
    keys: NDArray[np.int32], starts: NDArray[np.int64], prompt_blocks: NDArray[np.int64]
) -> int:
    place = np.arange(len(keys))
    is_output = place - np.repeat(starts[:-1] + prompt_blocks, np.diff(starts)) >= 0
    first = np.unique(keys, return_index=True)[1]
    return int(np.count_nonzero(is_output & (first[keys] != place)))
