"""A trace in memory: every request's ids in two flat arrays, so that millions of tokens stay small.

A request's ids are its tokens, or the blocks of a trace that has no tokens (`tokens_per_id`
above 1: each id then stands for that many tokens together with everything before them, and
the last one perhaps for fewer). Knows no file, tokenizer or cache.

    requests = builder.build()    # a RequestsBuilder, which the readers fill
    requests.prompt(3)            # int32 ids of request 3
    for request in requests:
        request.arrival_s, request.prompt_ids, request.num_response_tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dsatrace.errors import UserError
from dsatrace.kv.simulation.block_trace import offsets_of

Order = Literal["arrival", "conversation"]
UNKNOWN = -1


@dataclasses.dataclass(frozen=True, eq=False)
class StudyRequest:
    """One request; `conversation` and `turn` are -1 where the trace does not tell."""

    index: int
    arrival_s: float
    conversation: int
    turn: int
    workload: str
    mode: str
    num_prompt_tokens: int
    num_response_tokens: int
    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]


@dataclasses.dataclass(frozen=True, eq=False)
class StudyRequests:
    """R requests in the order of a replay; `arrival_s` never falls.

    `response_ids` of a request are as many as its response tokens, or none where the trace
    tells their number only.
    """

    arrival_s: NDArray[np.float64]  # (R,) seconds
    conversation: NDArray[np.int32]  # (R,) index into conversation_ids, or -1
    turn: NDArray[np.int32]  # (R,) from 0, or -1
    workload: NDArray[np.int32]  # (R,) index into workload_names
    mode: NDArray[np.int32]  # (R,) index into mode_names
    num_prompt_tokens: NDArray[np.int32]  # (R,)
    num_response_tokens: NDArray[np.int32]  # (R,)
    prompt_offsets: NDArray[np.int64]  # (R + 1,) where a request's ids begin in prompt_ids
    prompt_ids: NDArray[np.int32]  # (all prompts' ids,)
    response_offsets: NDArray[np.int64]  # (R + 1,)
    response_ids: NDArray[np.int32]  # (all known responses' ids,)
    conversation_ids: tuple[str, ...]
    workload_names: tuple[str, ...]
    mode_names: tuple[str, ...]
    tokens_per_id: int = 1

    def __len__(self) -> int:
        return len(self.arrival_s)

    def prompt(self, index: int) -> NDArray[np.int32]:
        """A view, not a copy."""
        return self.prompt_ids[self.prompt_offsets[index] : self.prompt_offsets[index + 1]]

    def response(self, index: int) -> NDArray[np.int32]:
        """A view, not a copy; empty where only the number of response tokens is known."""
        return self.response_ids[self.response_offsets[index] : self.response_offsets[index + 1]]

    def __iter__(self) -> Iterator[StudyRequest]:
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: int) -> StudyRequest:
        if not 0 <= index < len(self):
            raise IndexError(f"request {index} of {len(self)}")
        return StudyRequest(
            index=index,
            arrival_s=float(self.arrival_s[index]),
            conversation=int(self.conversation[index]),
            turn=int(self.turn[index]),
            workload=self.workload_names[self.workload[index]],
            mode=self.mode_names[self.mode[index]],
            num_prompt_tokens=int(self.num_prompt_tokens[index]),
            num_response_tokens=int(self.num_response_tokens[index]),
            prompt_ids=self.prompt(index),
            response_ids=self.response(index),
        )

    def take(self, rows: NDArray[np.int64]) -> StudyRequests:
        """The requests `rows`, in that order; names and conversations keep their numbers."""
        prompt_offsets, prompt_ids = _take_ragged(self.prompt_offsets, self.prompt_ids, rows)
        response_offsets, response_ids = _take_ragged(self.response_offsets, self.response_ids, rows)
        return dataclasses.replace(
            self,
            arrival_s=self.arrival_s[rows],
            conversation=self.conversation[rows],
            turn=self.turn[rows],
            workload=self.workload[rows],
            mode=self.mode[rows],
            num_prompt_tokens=self.num_prompt_tokens[rows],
            num_response_tokens=self.num_response_tokens[rows],
            prompt_offsets=prompt_offsets,
            prompt_ids=prompt_ids,
            response_offsets=response_offsets,
            response_ids=response_ids,
        )

    def ordered(self, order: Order) -> StudyRequests:
        """By `arrival` (as they are), or `conversation` by conversation, each with its turns in order.

        Conversations then follow each other by their first arrival, and requests of no known
        conversation stand alone. The arrival times are dealt out anew in that order, so that
        time still runs forwards: nothing overlaps, and a turn's delay is no longer what it was.
        """
        if order not in get_args(Order):
            raise UserError(f"unknown order {order!r}; use one of {', '.join(get_args(Order))}")
        if order == "arrival":
            return self
        group = conversation_groups(self)
        first = np.full(len(self), len(self))
        np.minimum.at(first, group, np.arange(len(self)))
        rows = np.lexsort((self.turn, first[group]))
        return dataclasses.replace(self.take(rows), arrival_s=self.arrival_s)

    def as_tokens(self) -> StudyRequests:
        """The same with an id a token: a block's id, repeated. Equal and unequal prefixes stay so.

        Takes 4 bytes a token. Sharing finer than the trace's blocks was never recorded.
        """
        if self.tokens_per_id == 1:
            return self
        num_ids = np.diff(self.prompt_offsets)
        repeats = np.full(len(self.prompt_ids), self.tokens_per_id, dtype=np.int64)
        last = self.prompt_offsets[1:] - 1
        repeats[last] = self.num_prompt_tokens - (num_ids - 1) * self.tokens_per_id
        return dataclasses.replace(
            self,
            prompt_ids=np.repeat(self.prompt_ids, repeats),
            prompt_offsets=offsets_of(self.num_prompt_tokens),
            tokens_per_id=1,
        )


def conversation_groups(requests: StudyRequests) -> NDArray[np.int64]:
    """(R,) a number below R for each request: its conversation's, or its own if it has none."""
    keys = np.where(
        requests.conversation == UNKNOWN,
        len(requests.conversation_ids) + np.arange(len(requests)),
        requests.conversation,
    )
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _take_ragged(
    offsets: NDArray[np.int64], values: NDArray[np.int32], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Offsets and values of the `rows` of a ragged array."""
    lengths = np.diff(offsets)[rows]
    taken = offsets_of(lengths)
    source = np.arange(taken[-1]) + np.repeat(offsets[rows] - taken[:-1], lengths)
    return taken, values[source]
