"""Sequences of sets for the replay's tests, and what a plain buffer of sets is."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from dsatrace.selection_replay.steps import Steps


@st.composite
def set_traces(draw: st.DrawFn, num_ids: int = 24, equal: bool = False) -> Steps:
    """Up to 30 steps of up to 8 ids in any order, of one size where `equal`; some steps have a newest id.

    One in four traces spreads its ids, so that they fill several words of bits.
    """
    largest = draw(st.integers(1, 8))
    spread = draw(st.sampled_from([1, 1, 1, 37]))
    sizes = st.just(largest) if equal else st.integers(0, largest)
    num_steps = draw(st.integers(1, 30))
    sets = []
    for _ in range(num_steps):
        size = draw(sizes)
        one_set = st.lists(st.integers(0, num_ids - 1), min_size=size, max_size=size, unique=True)
        sets.append([id_ * spread for id_ in draw(one_set)])
    newest = [draw(st.sampled_from([-1, *ids])) for ids in sets]
    ends = [max(ids, default=0) + 1 + draw(st.integers(0, 5)) for ids in sets]
    visible = list(itertools.accumulate(ends, max))
    return Steps.of(sets, newest, visible, num_warm=draw(st.integers(0, num_steps)))


def buffer_sizes(steps: Steps) -> st.SearchStrategy[int]:
    """Sizes that hold every step, and some that hold everything."""
    largest = max(1, int(steps.sizes.max(initial=0)))
    return st.integers(largest, largest + 20)


def rows_of(steps: Steps) -> list[list[int]]:
    return [steps.of_step(step).tolist() for step in range(steps.num_steps)]
