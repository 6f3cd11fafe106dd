"""The detector calls positions, slots, offsets and rows that were never captured by their names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.captures.detector import Detector, Found
from dsatrace.trace.kind import Layer, SelectionKind
from helpers.captured import as_slots, position_rows, random_slots

K = 8
QUICK = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def kind_of(num_sets: int = 2, **changes: object) -> SelectionKind:
    layers = (Layer(K),) * num_sets
    return SelectionKind(**({"layers": layers, "door": "import"} | changes))  # type: ignore[arg-type]


def looked_at(
    ids: np.ndarray, prompt_tokens: int = 1, first: int = 0, kind: SelectionKind | None = None, step: int = 7
) -> Found:
    """Fed in pieces, as from a file."""
    detector = Detector(kind or kind_of(ids.shape[1]))
    for at in range(0, len(ids), step):
        detector.add("r", first + at, prompt_tokens, ids[at : at + step])
    return detector.found()


@QUICK
@given(SEEDS, st.integers(12, 60))
def test_positions_are_proven_by_rows_within_top_k(seed: int, num_rows: int) -> None:
    ids = position_rows(np.random.default_rng(seed), num_rows)
    found = looked_at(ids)
    assert found.decode.what == "position"
    assert found.decode.proven == K - 1  # positions 1 .. 7
    assert found.decode.broken == found.decode.future == 0
    assert found.sparse_records == 2 * (num_rows - K)
    assert found.active_positions > 0


@QUICK
@given(SEEDS)
def test_rows_past_top_k_alone_prove_nothing(seed: int) -> None:
    ids = position_rows(np.random.default_rng(seed), 40, first=K)
    assert looked_at(ids, first=K).decode.what == "undetermined"


@QUICK
@given(SEEDS, st.sampled_from([1, 4, 16]))
def test_planted_slots(seed: int, page: int) -> None:
    rng = np.random.default_rng(seed)
    slots = random_slots(rng, 60, page) + 64  # a pool's first pages are taken
    ids = as_slots(position_rows(rng, 60), slots)
    for first in (0, 20):
        found = looked_at(ids[first:], prompt_tokens=max(first, 1), first=first)
        assert found.decode.what == "slot"
        assert found.decode.first_broken is not None
        assert found.decode.first_broken.position >= first
        assert found.decode.miscounted == 0
        assert found.active_slots > 0


@QUICK
@given(SEEDS)
def test_reused_low_slots_are_not_called_positions(seed: int) -> None:
    """Slots of a long request, which are all below its positions."""
    rng = np.random.default_rng(seed)
    ids = as_slots(position_rows(rng, 40, first=100), rng.permutation(140))
    ids = np.where(ids > 100, ids - 40, ids)
    if (np.diff(np.sort(ids, axis=2), axis=2) == 0).any():
        return
    assert looked_at(ids, first=100).decode.what == "undetermined"


@QUICK
@given(SEEDS, st.integers(1, 10**6))
def test_ragged_offsets_of_a_prompt(seed: int, base: int) -> None:
    rng = np.random.default_rng(seed)
    ids = position_rows(rng, 60)
    prompt = np.where(ids[:40] >= 0, ids[:40] + base, -1)
    decode = as_slots(ids[40:], random_slots(rng, 60) + 60)
    found = looked_at(np.concatenate([prompt, decode]), prompt_tokens=40)
    assert (found.prompt.what, found.decode.what) == ("ragged", "slot")
    assert found.bases == {"r": base}


def test_offsets_of_a_batchs_first_request_say_nothing_of_its_steps() -> None:
    """Its prompt's rows count from 0 and look like positions; its steps hold slots that pass for some."""
    ids = position_rows(np.random.default_rng(1), 60)
    found = looked_at(ids, prompt_tokens=40)
    assert (found.prompt.what, found.decode.what) == ("position", "undetermined")


@QUICK
@given(SEEDS, st.sets(st.integers(1, 59), min_size=1, max_size=40))
def test_zeros_were_never_captured(seed: int, lost: set[int]) -> None:
    ids = position_rows(np.random.default_rng(seed), 60)
    ids[sorted(lost), 1] = 0  # one layer is enough
    found = looked_at(ids)
    assert found.decode.not_captured == len(lost)
    assert found.decode.first_not_captured == ("r", min(lost))
    assert found.decode.broken == 0
    assert looked_at(np.zeros_like(ids)).decode.what == "not captured"


@QUICK
@given(SEEDS, st.integers(1, 20))
def test_rows_of_another_request(seed: int, shift: int) -> None:
    """A host cache's hit brings rows that were written for other queries."""
    ids = position_rows(np.random.default_rng(seed), 60)
    ids[20:30] = ids[20 + shift : 30 + shift]
    ids[20, 0] = np.arange(20 + shift - K + 1, 20 + shift + 1)
    found = looked_at(ids)
    assert found.decode.what == "mixed"
    assert found.decode.first_broken is not None
    assert found.decode.first_broken.position == 20
    assert "lies beyond the 21" in found.decode.first_broken.why


def test_a_prompt_of_two_offsets_is_not_repaired() -> None:
    ids = position_rows(np.random.default_rng(0), 30)
    ids = np.where(ids >= 0, ids + 50, -1)
    ids[10:] = np.where(ids[10:] >= 0, ids[10:] + 100, -1)
    assert looked_at(ids, prompt_tokens=30).prompt.what == "slot"


def test_future_positions_are_cut() -> None:
    """transformers returns k ids whatever a query can see."""
    ids = position_rows(np.random.default_rng(0), 30)
    for t in range(K):
        ids[t] = np.roll(np.arange(K), t)
    found = looked_at(ids)
    assert (found.decode.what, found.decode.future) == ("position", K - 2)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 6], "it holds an id twice"),
        ([0, 1, 2, 3, 4, 5, 6, -1], "it holds 7 ids, and should hold 8"),
        ([0, 1, 2, 3, 4, 5, 6, 31], "id 31 lies beyond the 31 that its query can see"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: list[int], why: str) -> None:
    ids = position_rows(np.random.default_rng(0), 40)
    ids[30, 1] = row
    broken = looked_at(ids).decode.first_broken
    assert broken is not None
    assert (broken.position, broken.set_index, broken.why) == (30, 1, why)


def test_a_wrong_start_is_no_slot() -> None:
    """Rows within top-k hold too few ids for where they are said to be."""
    ids = position_rows(np.random.default_rng(0), 40)
    found = looked_at(ids, first=3)
    assert found.decode.what == "mixed"
    assert found.decode.proven == 0


def test_a_recency_window_is_not_sparse_attention() -> None:
    positions = np.arange(60)[:, None] - np.arange(K)
    ids = np.repeat(np.where(positions >= 0, positions, -1)[:, None], 2, axis=1).astype(np.int32)
    found = looked_at(ids)
    assert found.decode.what == "position"
    assert (found.active_positions, found.sparse_records) == (0, 2 * (60 - K))
    slots = as_slots(ids, random_slots(np.random.default_rng(0), 60) + 60)
    found = looked_at(slots)
    assert (found.decode.what, found.active_slots) == ("slot", 0)
    assert "has more than one id that the row before it lacks" in (found.inactive(False, K) or "")
    alone = looked_at(slots[-1:], first=59)
    assert "none of 2 sets past top-k has a row before it" in (alone.inactive(False, K) or "")


def test_overlap_is_that_of_the_row_before() -> None:
    ids = position_rows(np.random.default_rng(3), 50)
    found = looked_at(ids)
    sets = [[set(row[row >= 0].tolist()) for row in ids[:, s]] for s in range(2)]
    pairs = [len(one[t] & one[t - 1]) for one in sets for t in range(K, 50)]
    assert found.overlaps.share == sum(pairs) / (K * len(pairs))
    assert found.overlaps.chance == pytest.approx(np.mean([K / (t + 1) for t in range(K, 50)]))


def test_a_window_with_gaps_and_two_spaces_is_still_one() -> None:
    """What begins after rows that were not captured, or after the prompt, is not seen to change."""
    positions = np.arange(60)[:, None] - np.arange(K)
    ids = np.repeat(np.where(positions >= 0, positions, -1)[:, None], 2, axis=1).astype(np.int32)
    ids = as_slots(ids, random_slots(np.random.default_rng(0), 60) + 60)
    ids[30:] = np.where(ids[30:] >= 0, ids[30:] + 1000, -1)
    ids[40:44] = 0
    for step in (1, 7, 60):
        found = looked_at(ids, prompt_tokens=30, step=step)
        assert found.active_slots == 0
        assert found.overlaps.share == (K - 1) / K


def test_shared_layers_are_found() -> None:
    ids = position_rows(np.random.default_rng(0), 40, num_sets=4)
    ids[:, 2] = ids[:, 1, ::-1]
    ids[:, 3] = ids[:, 2]
    assert looked_at(ids).shared_with_before == [2, 3]
    ids[39, 3] = np.arange(K)
    assert looked_at(ids).shared_with_before == [2]


def grouped(ids: np.ndarray, size: int, whole: bool) -> np.ndarray:
    """For each row of token positions, the groups that it may see, at most K of them."""
    out = np.full_like(ids, -1)
    rng = np.random.default_rng(0)
    for t in range(len(ids)):
        visible = (t + 1) // size if whole else t // size + 1
        for s in range(ids.shape[1]):
            count = min(K, visible)
            out[t, s, :count] = rng.choice(visible, count, replace=False)
    return out


@pytest.mark.parametrize(("unit", "whole"), [("entry", True), ("block", False)])
def test_groups_of_tokens(unit: str, whole: bool) -> None:
    ids = grouped(np.zeros((80, 2, K), np.int32), 4, whole)
    kind = kind_of(unit=unit, unit_tokens=4)
    assert looked_at(ids, kind=kind).decode.what == "position"
    ids[60, 1, 0] = (60 + 1) // 4 if whole else 60 // 4 + 1  # not whole yet, or not begun
    found = looked_at(ids, kind=kind)
    assert found.decode.broken == 1
    assert looked_at(ids[:3], kind=kind).decode.broken == 0  # an entry is whole after 4 tokens


def test_experts_are_not_judged_by_position() -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((40, 2, 64)), axis=2)[..., :K].astype(np.int32)
    kind = kind_of(unit="expert", num_ids=64)
    found = looked_at(ids, kind=kind)
    assert found.decode.broken == 0
    ids[5, 0, 0] = 64
    assert looked_at(ids, kind=kind).decode.broken == 1


def test_requests_side_by_side() -> None:
    rng = np.random.default_rng(0)
    one, two = position_rows(rng, 40), position_rows(rng, 40)
    detector, apart = Detector(kind_of()), Detector(kind_of())
    for t in range(0, 40, 5):
        detector.add("a", t, 1, one[t : t + 5])
        detector.add("b", t, 1, two[t : t + 5])
    apart.add("a", 0, 1, one)
    apart.end("a")
    apart.add("b", 0, 1, two)
    assert detector.found().overlaps.share == apart.found().overlaps.share
    assert detector.found().decode == apart.found().decode
