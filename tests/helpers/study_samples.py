"""Small requests for the study's tests, the conversation of its documentation, and its commands."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dsatrace import cli
from dsatrace.study.requests import RequestsBuilder, StudyRequests

THREE_TURNS = (
    (0.0, range(1, 7), range(7, 10)),  # 6 tokens asked, 3 answered
    (10.0, range(1, 15), range(15, 17)),  # the 9 so far and 5 more, 2 answered
    (30.0, range(1, 21), range(21, 23)),  # the 16 so far and 4 more, 2 answered
)
"""One conversation, whose token ids are 1, 2, 3, ...; in blocks of 4."""


def three_turns() -> StudyRequests:
    builder = RequestsBuilder()
    for turn, (arrival_s, prompt, answer) in enumerate(THREE_TURNS):
        builder.add(
            arrival_s, list(prompt), list(answer), conversation=("c0",), turn=turn, workload="chat_multi"
        )
    return builder.build()


def write_three_turns(path: Path) -> Path:
    """The same as a trace file of token ids, which names no conversation and says that times are recorded."""
    rows = (
        {
            "arrival_time_ns": int(s * 1e9),
            "input_tok_ids": list(prompt),
            "output_tok_ids": list(answer),
            "arrivals": "recorded",
        }
        for s, prompt, answer in THREE_TURNS
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def requests_of(
    rows: Sequence[tuple[Sequence[int], Sequence[int], str]], gap_s: float = 1.0
) -> StudyRequests:
    """Prompts, answers and workloads; a request every `gap_s` seconds."""
    builder = RequestsBuilder()
    for i, (prompt, answer, workload) in enumerate(rows):
        builder.add(i * gap_s, list(prompt), list(answer), workload=workload)
    return builder.build()


# Prompts over two tokens, so that prefixes and blocks repeat often.
ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=14),
        st.lists(st.integers(0, 1), max_size=5),
        st.sampled_from(["a", "b"]),
    ),
    min_size=1,
    max_size=14,
)


def study(*argv: object) -> int:
    return cli.main(["study", *map(str, argv)])


def study_json(out: Path, name: str, *argv: object) -> Any:
    """Runs a verb without pictures into the folder `out`; the JSON file `name` that it wrote there."""
    assert study(*argv, "--output-dir", out, "--skip-visualization") == 0
    return json.loads((out / name).read_text())


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def check_mistake(capsys: Any, code: int, message: str) -> None:
    """A user's mistake: exit code 2, and one line."""
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert (code, error.count("\n")) == (2, 1)
