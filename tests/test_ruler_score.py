"""RULER's metrics on hand-made predictions."""

from __future__ import annotations

import pytest

from dsatrace.workloads.ruler.example import TASKS, Example, score, string_match_all, string_match_part
from dsatrace.workloads.ruler.reader import read_examples
from helpers.real_data import real_file


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
    return Example(task, 0, "prompt", "", references)


def test_qa_needs_one_reference_and_the_others_all() -> None:
    half = {task: score(example_of(task, ("oak", "elm")), "an oak") for task in TASKS}
    assert half == {task: 100.0 if task in ("qa_1", "qa_2") else 50.0 for task in TASKS}


def test_budgets_are_nvidias() -> None:
    budgets = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert len(TASKS) == 13
    assert all(task.tokens_to_generate == budgets[task.family] for task in TASKS.values())


def test_the_references_of_real_rows_score_full() -> None:
    for example in read_examples(real_file("ruler")):
        assert score(example, f"{', '.join(example.references)}.".upper()) == 100
        assert score(example, "I do not know.") == 0
