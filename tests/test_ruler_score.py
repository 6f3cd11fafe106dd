"""RULER's metrics on hand-made predictions, and needle recall beside chance."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.workloads.ruler.example import TASKS, Example
from dsatrace.workloads.ruler.reader import read_examples
from dsatrace.workloads.ruler.recall import RecallSums, chance_recall, needle_recall
from dsatrace.workloads.ruler.score import score, string_match_all, string_match_part, summarize
from real_data import real_file


@pytest.mark.parametrize(
    ("prediction", "references", "all_of", "any_of"),
    [
        ("The number is 1234567.", ["1234567"], 100, 100),
        ("OAK, maple", ["oak", "Maple", "fir", "elm"], 50, 100),
        ("nothing", ["oak", "elm"], 0, 0),
        ("", ["oak"], 0, 0),
        ("Paris\x00 or\tRome", ["rome", "paris", "oslo"], 200 / 3, 100),
        ("New\nYork", ["new york"], 0, 0),
        ("New\x00York", ["new\nyork"], 100, 100),  # control characters are line breaks
        ("straSSe", ["strasse"], 100, 100),
    ],
)
def test_substrings_in_any_case(prediction: str, references: list[str], all_of: float, any_of: float) -> None:
    assert string_match_all(prediction, references) == pytest.approx(all_of)
    assert string_match_part(prediction, references) == any_of


def test_a_prediction_without_references_is_no_zero() -> None:
    for metric in (string_match_all, string_match_part):
        with pytest.raises(ValueError, match="without references"):
            metric("text", [])


def example_of(task: str, references: tuple[str, ...]) -> Example:
    return Example(task, 0, "prompt", "", references, TASKS[task].tokens_to_generate, TASKS[task].metric)


def test_qa_needs_one_reference_and_the_others_all() -> None:
    half = {task: score(example_of(task, ("oak", "elm")), "an oak") for task in TASKS}
    assert half == {task: 100.0 if task in ("qa_1", "qa_2") else 50.0 for task in TASKS}


def test_budgets_are_nvidias() -> None:
    budgets = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert len(TASKS) == 13
    assert all(task.tokens_to_generate == budgets[task.family] for task in TASKS.values())


def test_tasks_weigh_the_same_in_the_overall_score() -> None:
    summary = summarize([("vt", 100.0), ("vt", 50.0), ("vt", 0.0), ("qa_1", 100.0)])
    assert summary == {
        "score": 75.0,
        "num_examples": 4,
        "tasks": {"vt": {"num_examples": 3, "score": 50.0}, "qa_1": {"num_examples": 1, "score": 100.0}},
    }
    assert summarize([]) == {"score": None, "num_examples": 0, "tasks": {}}


def test_the_references_of_real_rows_score_full() -> None:
    for example in read_examples(real_file("ruler")):
        assert score(example, f"{', '.join(example.references)}.".upper()) == 100
        assert score(example, "I do not know.") == 0


def test_recall_is_the_share_of_the_answer_that_was_selected() -> None:
    assert needle_recall([1, 5, 6, 900], (5, 6, 7, 8)) == 0.5
    assert needle_recall(range(100), [3, 3, 4]) == 1
    assert needle_recall([], [3]) == 0
    with pytest.raises(ValueError, match="at least one answer position"):
        needle_recall([1], [])


def test_chance_is_k_of_n() -> None:
    assert chance_recall(2048, 32_768) == 1 / 16
    assert chance_recall(40, 40) == 1
    for k, n in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="not a selection"):
            chance_recall(k, n)


def test_a_random_selector_recalls_what_chance_says() -> None:
    draw = random.Random(0)
    recalls = [needle_recall(draw.sample(range(200), 50), range(90, 97)) for _ in range(4000)]
    assert sum(recalls) / len(recalls) == pytest.approx(chance_recall(50, 200), abs=0.01)


RECORDS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.floats(0, 1), st.floats(0, 1)), max_size=30
)


@given(RECORDS)
def test_sums_are_means_overall_by_layer_and_by_step(
    records: list[tuple[int, int, float, float]],
) -> None:
    sums = RecallSums()
    for record in records:
        sums.add(*record)
    result = sums.to_json()
    assert result["num_selections"] == len(records)
    for table, key, column in (("by_layer", "layer_id", 0), ("by_step", "step_idx", 1)):
        assert [row[key] for row in result[table]] == sorted({record[column] for record in records})
        for row in result[table]:
            mine = [record for record in records if record[column] == row[key]]
            assert row["num_selections"] == len(mine)
            assert row["recall"] == pytest.approx(sum(record[2] for record in mine) / len(mine))
            assert row["chance"] == pytest.approx(sum(record[3] for record in mine) / len(mine))
    if records:
        assert result["recall"] == pytest.approx(sum(record[2] for record in records) / len(records))
    else:
        assert result["recall"] is None and result["chance"] is None
