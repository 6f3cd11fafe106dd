"""Streams of sets whose ids were visible when they were selected, as a causal selector's are."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from dsatrace.selection_replay.nulls import CHANCE_BITS
from dsatrace.selection_replay.steps import Steps


@st.composite
def visible_steps(draw: st.DrawFn, most: int = 24, visible: list[int] | None = None) -> Steps:
    """Up to 90 steps; each sees a few ids more than the one before and selects some, in any order."""
    if visible is None:
        growth = draw(st.lists(st.integers(0, 3), min_size=1, max_size=draw(st.sampled_from([1, 8, 90]))))
        visible = [sum(growth[: step + 1]) for step in range(len(growth))]
    sets = []
    for among in visible:
        size = draw(st.integers(0, min(among, most)))
        # Mostly the last ids, so that there is something to share and to reuse.
        first = draw(st.sampled_from([0, max(0, among - 2 * size)]))
        ids = st.integers(first, max(first, among - 1))
        sets.append(draw(st.lists(ids, min_size=size, max_size=size, unique=True)))
    steps = Steps.of(sets, visible=visible, num_warm=draw(st.integers(0, len(sets))))
    return dataclasses.replace(steps, num_ids=max([steps.num_ids, *visible]))


def sets_of(steps: Steps) -> list[set[int]]:
    return [set(steps.of_step(step).tolist()) for step in range(steps.num_steps)]


def chance_of(one: int, other: int, visible: int) -> int:
    """Ids that two random sets of these sizes share, in the figures' unit."""
    return (one * other << CHANCE_BITS) // max(visible, 1)
