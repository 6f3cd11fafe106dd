"""Requests in memory, in flat arrays, so that millions of tokens stay small; and their blocks.

A request's ids are its tokens, or the blocks of a file that has no tokens (`tokens_per_id`
above 1: each id then stands for that many tokens together with everything before them). The
last id of a prompt may stand for fewer, unless the response has ids too: those of the blocks that
it completes. Knows no file, tokenizer or cache.

    builder = RequestsBuilder()
    builder.add(0.5, prompt_ids=[5, 6, 7], response_ids=[8], conversation=("c0",), turn=0)
    requests = builder.build()
    requests.prompt(0)                          # int32 ids of request 0
    block_trace(requests, block_size=16).keys_of(0)
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from dsatrace.errors import UserError
from dsatrace.kv.simulation.block_trace import BlockTrace, offsets_of

Order = Literal["arrival", "conversation"]
Progress = Callable[[int, int], None]
"""Called with the numbers of requests and of prompt ids so far."""
PROGRESS_EVERY_REQUESTS = 100
UNKNOWN = -1
MAX_ID = 2**31 - 1
COLUMNS = ("conversation", "turn", "workload", "mode", "num_prompt_tokens", "num_response_tokens")
"""The whole numbers of each request."""


@dataclasses.dataclass(frozen=True, eq=False)
class StudyRequest:
    """One request; `conversation` and `turn` are -1 if unknown."""

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

    A request has a response id per response token, or per block that its response completes, or
    none if only the number of tokens is known.
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
    times_recorded: bool = False  # whether somebody recorded when each arrived

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
        """The requests `rows` in that order; names and conversations keep their numbers."""
        if np.array_equal(rows, np.arange(len(self))):
            return self
        prompt_offsets, prompt_ids = _take_ragged(self.prompt_offsets, self.prompt_ids, rows)
        response_offsets, response_ids = _take_ragged(self.response_offsets, self.response_ids, rows)
        return dataclasses.replace(
            self,
            arrival_s=self.arrival_s[rows],
            **{name: getattr(self, name)[rows] for name in COLUMNS},
            prompt_offsets=prompt_offsets,
            prompt_ids=prompt_ids,
            response_offsets=response_offsets,
            response_ids=response_ids,
        )

    def ordered(self, order: Order) -> StudyRequests:
        """By `arrival` (unchanged), or `conversation` by conversation, each with its turns in order.

        Conversations follow each other by their first arrival; a request of no known conversation
        stands alone. The same arrival times are then assigned in the new order: conversations no
        longer overlap, and the delay between turns is lost.
        """
        if order not in get_args(Order):
            raise UserError(f"unknown order {order!r}; use one of {', '.join(get_args(Order))}")
        if order == "arrival":
            return self
        group = conversation_groups(self.conversation)
        first = np.full(len(self), len(self))
        np.minimum.at(first, group, np.arange(len(self)))
        rows = np.lexsort((self.turn, first[group]))
        return dataclasses.replace(self.take(rows), arrival_s=self.arrival_s)

    def as_tokens(self) -> StudyRequests:
        """The same requests with one id per token: a block's id is repeated, so equal prefixes stay equal.

        Takes 4 bytes per token. Sharing finer than the blocks of the file was never recorded. Tokens
        whose block has no id get one of their own request.
        """
        if self.tokens_per_id == 1:
            return self
        prompts, responses = [], []
        lengths = zip(self.num_prompt_tokens.tolist(), self.num_response_tokens.tolist(), strict=True)
        for i, (num_prompt, num_response) in enumerate(lengths):
            known = np.concatenate((self.prompt(i), self.response(i)))
            total = num_prompt + (num_response if len(self.response(i)) else 0)
            tokens = np.full(total, -2 - i, np.int32)
            repeated = np.repeat(known, self.tokens_per_id)[:total]
            tokens[: len(repeated)] = repeated
            prompts.append(tokens[:num_prompt])
            responses.append(tokens[num_prompt:])
        none = [np.zeros(0, np.int32)]
        return dataclasses.replace(
            self,
            prompt_ids=np.concatenate(none + prompts),
            prompt_offsets=offsets_of(self.num_prompt_tokens),
            response_ids=np.concatenate(none + responses),
            response_offsets=offsets_of(np.array([len(ids) for ids in responses], np.int64)),
            tokens_per_id=1,
        )


class RequestsBuilder:
    """Collects requests one by one, in order of arrival, and packs them; 4 bytes per id (8 for block ids)."""

    def __init__(self, tokens_per_id: int = 1, progress: Progress | None = None) -> None:
        self._tokens_per_id, self._progress = tokens_per_id, progress
        self._arrival_s = array("d")
        self._columns = {name: array("i") for name in COLUMNS}
        self._num_prompt_ids, self._num_response_ids = array("q"), array("q")
        self._prompt_ids, self._response_ids = array("i" if tokens_per_id == 1 else "q"), array("i")
        self._conversations: dict[tuple[str, ...], int] = {}
        self._workloads: dict[str, int] = {}
        self._modes: dict[str, int] = {}
        self._recorded = True

    def __len__(self) -> int:
        return len(self._arrival_s)

    def add(
        self,
        arrival_s: float,
        prompt_ids: array[int] | Sequence[int],
        response_ids: array[int] | Sequence[int] = (),
        *,
        num_prompt_tokens: int | None = None,
        num_response_tokens: int | None = None,
        conversation: tuple[str, ...] = (),
        turn: int = UNKNOWN,
        workload: str = "",
        mode: str = "",
        recorded: bool = False,
    ) -> None:
        """Numbers of tokens are by default the numbers of ids. `recorded` is of the arrival; times count
        as recorded if all were.

        `conversation` is a key that ends with the conversation's name, or empty if unknown.
        Raises a `UserError` for an empty prompt, or an arrival before that of the last request.
        """
        if num_prompt_tokens == 0 or not (len(prompt_ids) or num_prompt_tokens):
            raise UserError(f"request {len(self)} has an empty prompt; leave it out of the trace")
        if self._arrival_s and arrival_s < self._arrival_s[-1]:
            raise UserError(f"request {len(self)} arrives before the one above it; sort the trace by time")
        number = UNKNOWN
        if conversation:
            number = self._conversations.setdefault(conversation, len(self._conversations))
        self._recorded &= recorded
        self._arrival_s.append(arrival_s)
        self._num_prompt_ids.append(len(prompt_ids))
        self._num_response_ids.append(len(response_ids))
        self._prompt_ids.extend(prompt_ids)
        self._response_ids.extend(response_ids)
        row = (
            number,
            turn,
            self._workloads.setdefault(workload, len(self._workloads)),
            self._modes.setdefault(mode, len(self._modes)),
            len(prompt_ids) if num_prompt_tokens is None else num_prompt_tokens,
            len(response_ids) if num_response_tokens is None else num_response_tokens,
        )
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)
        if self._progress and len(self) % PROGRESS_EVERY_REQUESTS == 0:
            self._progress(len(self), len(self._prompt_ids))

    def build(self) -> StudyRequests:
        if self._progress:
            self._progress(len(self), len(self._prompt_ids))
        return StudyRequests(
            arrival_s=np.array(self._arrival_s, dtype=np.float64),
            prompt_offsets=offsets_of(np.array(self._num_prompt_ids, dtype=np.int64)),
            prompt_ids=_narrow(np.array(self._prompt_ids)),
            response_offsets=offsets_of(np.array(self._num_response_ids, dtype=np.int64)),
            response_ids=np.array(self._response_ids, dtype=np.int32),
            conversation_ids=tuple(key[-1] for key in self._conversations),
            workload_names=tuple(self._workloads),
            mode_names=tuple(self._modes),
            tokens_per_id=self._tokens_per_id,
            times_recorded=self._recorded and bool(self._arrival_s),
            **{name: np.array(column, dtype=np.int32) for name, column in self._columns.items()},
        )


def block_trace(requests: StudyRequests, block_size: int) -> BlockTrace:
    """Prompts, and responses if their ids are known, in blocks of `block_size` tokens.

    Block ids are used as they are at their own block size and its multiples. For another size they
    are expanded to tokens, and sharing finer than their blocks stays unseen. Workloads without a
    request are left out. Raises a `UserError` for a block size below 1, and for block ids that do
    not stand for a block and all before it.
    """
    if block_size < 1:
        raise UserError(f"a block holds at least 1 token, not {block_size}")
    every = range(len(requests))
    if requests.tokens_per_id != 1 and block_size % requests.tokens_per_id == 0:
        try:
            trace = BlockTrace.from_block_ids(
                cast(Sequence[Sequence[int]], [requests.prompt(i) for i in every]),
                requests.num_prompt_tokens.tolist(),
                requests.num_response_tokens.tolist(),
                block_size=block_size,
                output_ids=cast(Sequence[Sequence[int]], [requests.response(i) for i in every]),
                tokens_per_id=requests.tokens_per_id,
            )
        except ValueError as error:
            raise UserError(f"{error}; give ids that stand for a block and all before it") from error
    else:
        tokens = requests.as_tokens()
        trace = BlockTrace.from_tokens(
            [tokens.prompt(i) for i in every], [tokens.response(i) for i in every], block_size=block_size
        )
    workloads, numbers = np.unique(requests.workload, return_inverse=True)
    return dataclasses.replace(
        trace,
        output_tokens=requests.num_response_tokens.astype(np.int64),
        time_s=requests.arrival_s,
        conversation=requests.conversation,
        workload=numbers.astype(np.int32),
        workload_names=tuple(requests.workload_names[i] for i in workloads) or ("",),
    )


def by_workload(requests: StudyRequests, unnamed: str) -> dict[str, StudyRequests]:
    """Each workload's requests, by its name; those of the workload "" under the name `unnamed`."""
    present = np.unique(requests.workload).tolist()
    return {
        requests.workload_names[i] or unnamed: requests.take(np.flatnonzero(requests.workload == i))
        for i in present
    }


def conversation_groups(conversation: NDArray[np.integer]) -> NDArray[np.int64]:
    """(R,) for each request the number of its conversation, below R; without one, a number of its own."""
    own = conversation.max(initial=0) + 1 + np.arange(len(conversation))
    keys = np.where(conversation == UNKNOWN, own, conversation)
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _take_ragged(
    offsets: NDArray[np.int64], values: NDArray[np.int32], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Offsets and values of the `rows` of a ragged array."""
    taken = offsets_of(np.diff(offsets)[rows])
    pieces = [values[offsets[row] : offsets[row + 1]] for row in rows]
    return taken, np.concatenate([values[:0], *pieces])


def _narrow(ids: NDArray[np.integer]) -> NDArray[np.int32]:
    """The same ids, or their ranks if one is not of 31 bits: a cache only asks which are equal."""
    if len(ids) and not 0 <= ids.min() <= ids.max() <= MAX_ID:
        ids = np.unique(ids, return_inverse=True)[1]
    return ids.astype(np.int32, copy=False)
