"""Layers against each other, which of them could share an index, and predictors, against plain sets."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.selection_replay import layer_overlap, predictors
from dsatrace.selection_replay.layer_overlap import LayerOverlap, sharing_of, suggest_sharing
from dsatrace.selection_replay.predictors import PREDICTORS, predictions_of
from dsatrace.selection_replay.steps import Steps
from helpers.power import examples
from helpers.visible_steps import chance_of, sets_of, visible_steps

SETTINGS = settings(max_examples=examples(20), deadline=None)
SLIDING = [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]


@st.composite
def requests(draw: st.DrawFn) -> dict[int, Steps]:
    """Layers of one request, which see the same ids."""
    growth = draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    visible = [sum(growth[: step + 1]) for step in range(len(growth))]
    num_warm = draw(st.integers(0, len(visible)))
    found = {}
    for layer in draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True)):
        steps = draw(visible_steps(most=40, visible=visible))
        found[layer] = Steps(steps.ids, steps.ptr, steps.newest, steps.visible, steps.num_ids, num_warm)
    return found


@SETTINGS
@given(request=requests(), chunk=st.sampled_from([1, 50, 1 << 22]))
def test_layers(request: dict[int, Steps], chunk: int) -> None:
    before = layer_overlap._CHUNK_IDS
    layer_overlap._CHUNK_IDS = chunk
    try:
        found = LayerOverlap.of(request)
    finally:
        layer_overlap._CHUNK_IDS = before
    assert found.layers == tuple(sorted(request))
    for (i, a), (j, b) in itertools.product(enumerate(found.layers), repeat=2):
        one, other = sets_of(request[a]), sets_of(request[b])
        counted = range(request[a].num_warm, request[a].num_steps)
        assert found.shared[i][j] == sum(len(one[t] & other[t]) for t in counted)
        assert found.chance[i][j] == sum(
            chance_of(len(one[t]), len(other[t]), int(request[a].visible[t])) for t in counted
        )
        selected = sum(len(other[t]) for t in counted)
        assert found.recalls()[i][j] == (found.shared[i][j] / selected if selected else None)
    assert LayerOverlap.from_json((found + found).to_json()) == found + found
    assert (found + found).shared[0][0] == 2 * found.shared[0][0]


def test_layers_with_other_ids() -> None:
    one, other = Steps.of([[0], [1]], visible=[2, 3]), Steps.of([[0], [1]], visible=[2, 2])
    with pytest.raises(ValueError, match="layers 3 and 7 do not choose from the same ids"):
        LayerOverlap.of({3: one, 7: other})


@SETTINGS
@given(request=requests(), recall=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_best_sharing(request: dict[int, Steps], recall: float) -> None:
    """No pattern of all is better than the one suggested."""
    overlap = LayerOverlap.of(request)
    first, *rest = overlap.layers
    every = [
        sharing_of(overlap, {first, *chosen})
        for num in range(len(rest) + 1)
        for chosen in itertools.combinations(rest, num)
    ]

    def good(recalls: tuple[float | None, ...]) -> bool:
        return all(each is None or each >= recall for each in recalls)

    fitting = [each for each in every if good(each.recalls())]
    found = suggest_sharing(overlap, recall=recall)
    assert found.num_full == min(each.num_full for each in fitting)
    assert sum(found.kept) == max(sum(each.kept) for each in fitting if each.num_full == found.num_full)
    assert good(found.recalls())


def test_sharing() -> None:
    like = [[0, 1, 2, 3], [4, 5, 6, 7]]
    near = [[0, 1, 2, 9], [4, 5, 6, 8]]
    far = [[10, 11, 12, 13], [14, 15, 16, 17]]
    layers = {0: like, 2: near, 3: far, 5: far}
    overlap = LayerOverlap.of({layer: Steps.of(sets, visible=[18, 18]) for layer, sets in layers.items()})
    found = suggest_sharing(overlap, recall=0.7)
    assert (found.letters, found.sources) == ("FSFS", (0, 0, 3, 3))
    assert found.recalls() == (1, 0.75, 1, 1)
    assert found.recall_of_shared() == 14 / 16
    assert suggest_sharing(overlap, recall=0).letters == "FSSS"
    assert suggest_sharing(overlap, recall=1).letters == "FFFS"
    assert sharing_of(overlap, {0, 2, 3, 5}).recall_of_shared() is None
    assert overlap.chance_recalls()[0][1] == pytest.approx(4 / 18)
    with pytest.raises(ValueError, match="it must be a full layer"):
        sharing_of(overlap, {2})


@SETTINGS
@given(request=requests())
def test_predictors(request: dict[int, Steps]) -> None:
    layers = sorted(request)
    steps, before = request[layers[-1]], request[layers[0]]
    found = predictions_of(steps, before)
    assert list(found) == list(PREDICTORS)
    sets, sets_before = sets_of(steps), sets_of(before)
    scores: Counter[int] = Counter()
    guesses: dict[str, list[set[int]]] = {name: [] for name in PREDICTORS}
    counted = range(max(steps.num_warm, 1), len(sets))
    for step, ids in enumerate(sets):
        best = sorted((score, id_) for id_, score in scores.items() if score)[::-1][: len(ids)]
        if step in counted:
            guesses["previous_step"].append(sets[step - 1])
            guesses["previous_layer"].append(sets_before[step])
            guesses["previous_layer_and_step"].append(sets_before[step - 1])
            guesses["ema"].append({id_ for _, id_ in best})
        for id_ in {*scores, *ids}:
            scores[id_] = scores[id_] * 7 // 8 + predictors.EMA_UNIT * (id_ in ids)
    for name, sums in found.items():
        assert sums is not None
        pairs = list(zip((sets[t] for t in counted), guesses[name], strict=True))
        assert sums.steps == len(pairs)
        assert sums.selected == sum(len(wanted) for wanted, _ in pairs)
        assert sums.predicted == sum(len(guess) for _, guess in pairs)
        assert sums.hits == sum(len(wanted & guess) for wanted, guess in pairs)
        assert sums.extra == sum(len(guess - wanted) for wanted, guess in pairs)
        assert sums.chance == sum(
            chance_of(len(sets[t]), len(guess), int(steps.visible[t]))
            for t, guess in zip(counted, guesses[name], strict=True)
        )
        assert type(sums).from_json((sums + sums).to_json()).hits == 2 * sums.hits
        assert sums.recall == (sums.hits / sums.selected if sums.selected else None)
        assert sums.precision == (sums.hits / sums.predicted if sums.predicted else None)


def test_average_forgets() -> None:
    """An id that is not selected any more sinks to a score of 0, and is not guessed again."""
    sets = [[7], *[[] for _ in range(150)], [7, 8], [7, 8]]
    found = predictions_of(Steps.of(sets, visible=[9] * len(sets)))["ema"]
    assert found is not None and (found.predicted, found.hits) == (2, 2)
    assert found.chance_recall == pytest.approx(1 / 9)
    recent = predictions_of(Steps.of([*sets[:60], [7]], visible=[9] * 61))["ema"]
    assert recent is not None and recent.hits == 1


def test_first_layer_has_none_before() -> None:
    found = predictions_of(Steps.of(SLIDING))
    assert found["previous_layer"] is None and found["previous_layer_and_step"] is None
    step = found["previous_step"]
    assert step is not None and (step.recall, step.extra) == (0.75, 3)
    with pytest.raises(ValueError, match="the one before it"):
        predictions_of(Steps.of(SLIDING), before=Steps.of(SLIDING[1:]))
