"""From a run's records to the sets a buffer is asked for: blocks, unions of rows, layers that share."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.selection_replay.settings import ReplaySettings, parse_sizes, parse_unit
from dsatrace.selection_replay.steps import NO_ID, Steps
from dsatrace.selection_replay.streams import (
    Recorded,
    in_blocks,
    in_unions,
    layer_steps,
    numbered_anew,
    pooled,
)
from dsatrace.trace.kind import engine_kind
from dsatrace.trace.selections import LayerSelections, LayerSet, RequestSelections

TOKENS = Recorded(engine_kind(2, 4), 1, 656, 132)


def sets_of(steps: Steps) -> list[list[int]]:
    return [steps.of_step(step).tolist() for step in range(steps.num_steps)]


def firsts(ids: list[int]) -> list[int]:
    return list(dict.fromkeys(ids))


SETS = st.lists(st.lists(st.integers(0, 40), unique=True, max_size=6), min_size=1, max_size=12)


@given(SETS, st.integers(1, 9))
def test_blocks_stand_in_the_order_their_ids_name_them(sets: list[list[int]], block: int) -> None:
    blocks = in_blocks(Steps.of(sets, newest=[3] * len(sets), visible=[41] * len(sets)), block)
    assert sets_of(blocks) == [firsts([id_ // block for id_ in one]) for one in sets]
    assert blocks.newest.tolist() == [3 // block] * len(sets)
    assert blocks.visible.tolist() == [-(-41 // block)] * len(sets)


@given(SETS, st.integers(1, 5), st.integers(0, 4))
def test_a_union_asks_for_what_any_of_its_rows_selects(sets: list[list[int]], rows: int, warm: int) -> None:
    newest = list(range(len(sets)))
    united = in_unions(Steps.of(sets, newest=newest, num_warm=min(warm, len(sets))), rows)
    groups = [sets[i : i + rows] for i in range(0, len(sets), rows)]
    assert sets_of(united) == [firsts([id_ for one in group for id_ in one]) for group in groups]
    assert united.newest.tolist() == [newest[i : i + rows][-1] for i in range(0, len(sets), rows)]
    assert united.num_warm == -(-min(warm, len(sets)) // rows)


def test_a_shared_buffer_sees_step_by_step_each_layer_with_ids_of_its_own() -> None:
    layers = [Steps.of([[0, 1], [2]], newest=[1, 2]), Steps.of([[0], [0, 3]], newest=[NO_ID, 3], num_warm=1)]
    together = pooled(layers)
    assert sets_of(together) == [[0, 1], [3], [2], [3, 6]]
    assert together.newest.tolist() == [1, NO_ID, 2, 6]
    assert together.num_ids == 7 and together.num_warm == 2


def test_ids_without_order_are_numbered_without_gaps() -> None:
    steps = Steps.of([[900_000, 7], [7, 12]])
    assert sets_of(numbered_anew(steps)) == [[2, 0], [0, 1]]
    assert numbered_anew(steps).num_ids == 3


def selections(
    lengths: list[int], prompt_rows: int = 0, step_idx: list[int] | None = None
) -> RequestSelections:
    """Rows that select the last four tokens they see, or all."""
    ids = [list(range(max(0, length - 4), length)) for length in lengths]
    steps = [-1] * prompt_rows + list(range(len(lengths) - prompt_rows))
    layer = LayerSelections(
        np.array(steps if step_idx is None else step_idx),
        np.array(lengths),
        np.arange(len(lengths)),
        np.array(["decode"] * len(lengths)),
        np.array([id_ for row in ids for id_ in row], np.int32),
        np.cumsum([0, *map(len, ids)]),
    )
    return RequestSelections("r7", lengths[0], {LayerSet(0): layer})


def steps_of(request: RequestSelections, **settings: Any) -> Steps:
    return layer_steps(request, LayerSet(0), TOKENS, ReplaySettings(**settings))


def test_steps_that_select_everything_only_warm_up() -> None:
    steps = steps_of(selections([2, 3, 4, 5, 6]), start="empty")
    assert steps.num_warm == 3
    assert steps.newest.tolist() == [1, 2, 3, 4, 5]
    assert steps.visible.tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("start", "num_steps", "num_warm"),
    [("empty", 2, 0), ("first-b", 2, 0), ("first-set", 2, 1), ("prefill", 4, 2)],
)
def test_starts(start: Any, num_steps: int, num_warm: int) -> None:
    """Prompt rows are left out, unless they are what warms the buffer up."""
    steps = steps_of(selections([8, 9, 10, 11], prompt_rows=2), start=start)
    assert (steps.num_steps, steps.num_warm) == (num_steps, num_warm)
    assert sets_of(steps)[-1] == [7, 8, 9, 10]


def test_only_the_last_prompt_rows_warm_up() -> None:
    rows = [*range(-40, 0), 0, 1]
    steps = steps_of(selections(list(range(8, 50)), prompt_rows=40, step_idx=rows), start="prefill")
    assert (steps.num_steps, steps.num_warm) == (34, 32)
    assert sets_of(steps)[0] == [12, 13, 14, 15]


def test_a_start_from_prompt_rows_needs_some() -> None:
    with pytest.raises(UserError, match=r"r7: --start prefill needs prompt rows.*--trace-prefill last"):
        steps_of(selections([8, 9]), start="prefill")


def test_a_run_that_lost_a_step_is_refused() -> None:
    with pytest.raises(UserError, match="request r7, layer 0: step 1 was not recorded"):
        steps_of(selections([8, 9, 10], step_idx=[0, 2, 3]))


MANIFEST: dict[str, Any] = {
    "selections": "model",
    "model_config": {"index_topk": 4, "n_layers": 2, "n_routed_experts": 64},
    "cache_layout": "fp8",
    "cache_layouts": [{"name": "fp8", "latent_bytes_per_token": 656, "index_bytes_per_token": 132}],
    "trace": {"level": "full", "sample_rate": 1.0, "keep_order": False, "block_size_tokens": 16},
}
SELECTION: dict[str, Any] = {
    "unit": "token",
    "unit_tokens": 1,
    "id_kind": "position",
    "layers": [{"top_k": 4, "heads": 1, "source_layer": None}] * 2,
    "door": "attach",
}


def kind(
    selection: dict[str, Any] | None = None, settings: ReplaySettings | None = None, **trace: Any
) -> Recorded:
    manifest = {**MANIFEST, "trace": {**MANIFEST["trace"], **trace}}
    if selection is not None:
        manifest["selection"] = {**SELECTION, **selection}
    return Recorded.of(manifest, settings or ReplaySettings(), "outputs/mine")


def test_what_ids_are_is_read_from_the_manifest() -> None:
    assert kind() == TOKENS
    entries = kind({"unit": "entry", "unit_tokens": 4})
    assert entries.bytes_per_id == 4 * 656
    assert entries.visible(np.array([4, 5, 8])).tolist() == [1, 1, 2]
    assert entries.newest(np.array([4, 5, 8])).tolist() == [0, NO_ID, 1]
    experts = kind({"unit": "expert", "num_ids": 64})
    assert not experts.is_position and experts.bytes_per_id is None
    assert experts.visible(np.array([4, 5])).tolist() == [64, 64]
    assert not kind({"id_kind": "slot"}).is_position
    nothing = {"name": "own", "latent_bytes_per_token": 0, "index_bytes_per_token": 0}
    own = Recorded.of(
        {**MANIFEST, "cache_layout": "own", "cache_layouts": [nothing]}, ReplaySettings(), "outputs/mine"
    )
    assert own.bytes_per_id is own.index_bytes_per_id is None  # a door that does not know them


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({"sample_rate": 0.5}, {}, "outputs/mine: only a share of 0.5 of its steps"),
        ({"level": "stats"}, {}, "recorded at level stats, which holds no ids"),
        ({"level": "blocks"}, {}, "recorded at level blocks, so replay blocks: --unit block:16"),
        ({"level": "blocks"}, {"block": 24}, "block:24: use a multiple of 16 tokens"),
        ({"selection": {"unit": "entry", "unit_tokens": 4}}, {"block": 6}, "use a multiple of 4 tokens"),
        ({"selection": {"id_kind": "slot"}}, {"block": 16}, "no positions, so --unit block:N"),
        (
            {"selection": {"unit": "expert", "num_ids": 64}},
            {"pin_newest": True},
            "no positions, so --pin-newest",
        ),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    change: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    selection = change.pop("selection", None)
    with pytest.raises(UserError, match=said):
        kind(selection, ReplaySettings(**settings), **change)


def test_a_run_without_a_model_is_refused() -> None:
    with pytest.raises(UserError, match="no model ran"):
        Recorded.of({**MANIFEST, "selections": "none"}, ReplaySettings(), "outputs/mine")


def test_sizes_are_ids_multiples_of_top_k_and_shares_of_the_context() -> None:
    sizes = parse_sizes("4096, 1k,1.5k,25%,0.1%")
    assert [size.ids(2048, 131_073) for size in sizes] == [4096, 2048, 3072, 32_769, 132]
    assert [size.label for size in sizes] == ["4096", "1k", "1.5k", "25%", "0.1%"]


@pytest.mark.parametrize("text", ["", "0", "-5", "4096.5", "101%", "2kk", "k", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--sizes"):
        parse_sizes(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policies": ("lru", "best")}, "--policy best: use some of lru"),
        ({"policies": ()}, "name a --policy"),
        ({"union": 0}, "--union 0"),
        ({"block": 0}, "--unit block:0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_settings_name_the_flag_that_is_wrong(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ReplaySettings(**change)


def test_units() -> None:
    assert parse_unit("block:16") == 16 and parse_unit("run") is None
    with pytest.raises(UserError, match="--unit page:4"):
        parse_unit("page:4")


def test_other_settings_have_another_digest() -> None:
    settings = ReplaySettings()
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"union": 2},
        {"sizes": parse_sizes("3k")},
        {"start": "empty"},
    ]
    digests = {settings.digest, *(dataclasses.replace(settings, **change).digest for change in changes)}
    assert len(digests) == 1 + len(changes)
