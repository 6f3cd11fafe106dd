"""The sequence of sets that one hot buffer is asked for.

A step asks for a set of ids, and all of them are resident together. An id is whatever the run's unit
is: a token, a compressed entry, a block of tokens, an expert. Knows no run, no layer and no policy.

    steps = Steps.of([[0, 1, 2], [1, 2, 7]])
    steps.of_step(1)          # array([1, 2, 7], dtype=int32)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.selection_replay.bits import ONE, lowest_bit

NO_ID = -1

Start = Literal["empty", "first-b"]
"""What a buffer of B ids holds before the first step: nothing, or the ids 0 to B - 1."""


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """T steps of N ids in all. An id stands at most once per step."""

    ids: np.ndarray  # (N,) int32, from 0 to num_ids - 1; within a step in the order they were recorded
    ptr: np.ndarray  # (T + 1,) int64: step t asks for ids[ptr[t] : ptr[t + 1]]
    newest: np.ndarray  # (T,) int32, the id of the query's own token; NO_ID where there is none
    visible: np.ndarray  # (T,) int64, ids that the step could choose from (N of k / N)
    num_ids: int
    num_warm: int = 0  # the first steps only warm the buffer up and are not counted
    when: np.ndarray | None = None  # (T,) int64, the forward pass of each step, where somebody asks
    is_counted: np.ndarray | None = None  # (T,) bool, where several streams with own warm-ups are one

    @property
    def num_steps(self) -> int:
        return len(self.ptr) - 1

    @property
    def counted(self) -> np.ndarray:
        """(T,) bool, whether the step's misses count."""
        if self.is_counted is not None:
            return self.is_counted
        return np.arange(self.num_steps) >= self.num_warm

    @property
    def sizes(self) -> np.ndarray:
        """(T,) int64, ids per step."""
        return np.diff(self.ptr)

    def of_step(self, step: int) -> np.ndarray:
        return self.ids[self.ptr[step] : self.ptr[step + 1]]

    def ascending(self) -> Steps:
        """The same with each step's ids ascending; itself if they are."""
        ids, ptr = self.arrays()
        if _is_ascending(ids, ptr):
            return self
        ids = ids.copy()
        _sort_rows(ids, ptr, np.zeros((self.num_ids >> 6) + 1, np.uint64))
        return dataclasses.replace(self, ids=ids)

    def without_newest(self) -> Steps:
        """The same without each step's newest id; itself if no step asks for it."""
        at = np.flatnonzero(self.ids == np.repeat(self.newest, self.sizes))
        if not len(at):
            return self
        return dataclasses.replace(
            self, ids=np.delete(self.ids, at), ptr=self.ptr - np.searchsorted(at, self.ptr)
        )

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """`ids` and `ptr` as kernels take them: one type each, or they would be compiled anew."""
        return np.require(self.ids, np.int32, ["C", "W"]), np.require(self.ptr, np.int64, ["C", "W"])

    @classmethod
    def of(
        cls,
        sets: Sequence[Sequence[int]],
        newest: Sequence[int] | None = None,
        visible: Sequence[int] | None = None,
        num_warm: int = 0,
    ) -> Steps:
        """Steps from plain lists; `visible` is all ids where it is not given."""
        ids = np.array([id_ for step in sets for id_ in step], np.int32)
        num_ids = int(max(ids.max(initial=-1), max(newest or (), default=-1))) + 1
        return cls(
            ids,
            np.cumsum([0, *map(len, sets)], dtype=np.int64),
            np.array([NO_ID] * len(sets) if newest is None else newest, np.int32),
            np.array([num_ids] * len(sets) if visible is None else visible, np.int64),
            num_ids,
            num_warm,
        )


@cached_njit(nogil=True, _nrt=False)
def _is_ascending(ids: np.ndarray, ptr: np.ndarray) -> bool:
    for step in range(len(ptr) - 1):
        for at in range(ptr[step] + 1, ptr[step + 1]):
            if ids[at - 1] > ids[at]:
                return False
    return True


@cached_njit(nogil=True, _nrt=False)
def _sort_rows(ids: np.ndarray, ptr: np.ndarray, words: np.ndarray) -> None:
    """Sorts each step's ids in place, through a set of bits: `words` is (num_ids / 64 + 1,) and 0."""
    for step in range(len(ptr) - 1):
        begin, end = ptr[step], ptr[step + 1]
        first, last = len(words), -1
        for at in range(begin, end):
            word = ids[at] >> 6
            words[word] |= ONE << np.uint64(ids[at] & 63)
            first, last = min(first, word), max(last, word)
        at = begin
        for word in range(first, last + 1):
            bits = words[word]
            words[word] = 0
            while bits:
                ids[at] = (word << 6) + lowest_bit(bits)
                at += 1
                bits &= bits - ONE
