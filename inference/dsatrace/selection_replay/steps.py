"""The sequence of sets that one hot buffer is asked for.

A step asks for a set of ids, and all of them are resident together. An id is whatever the run's unit
is: a token, a compressed entry, a block of tokens, an expert. Knows no run, no layer and no policy.

    steps = Steps.of([[0, 1, 2], [1, 2, 7]])
    steps.of_step(1)          # array([1, 2, 7], dtype=int32)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

NO_ID = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """T steps of N ids in all. An id stands at most once per step."""

    ids: np.ndarray  # (N,) int32, from 0 to num_ids - 1; within a step in the order they were recorded
    ptr: np.ndarray  # (T + 1,) int64: step t asks for ids[ptr[t] : ptr[t + 1]]
    newest: np.ndarray  # (T,) int32, the id of the query's own token; NO_ID where there is none
    visible: np.ndarray  # (T,) int64, ids that the step could choose from (N of k / N)
    num_ids: int
    num_warm: int = 0  # the first steps only warm the buffer up and are not counted

    @property
    def num_steps(self) -> int:
        return len(self.ptr) - 1

    @property
    def sizes(self) -> np.ndarray:
        """(T,) int64, ids per step."""
        return np.diff(self.ptr)

    def of_step(self, step: int) -> np.ndarray:
        return self.ids[self.ptr[step] : self.ptr[step + 1]]

    def ascending(self) -> Steps:
        """The same with each step's ids ascending."""
        order = np.lexsort((self.ids, np.repeat(np.arange(self.num_steps), self.sizes)))
        return dataclasses.replace(self, ids=self.ids[order])

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
