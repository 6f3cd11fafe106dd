"""Gaps of logs with recorded times: what is a turn, what is busy, and which gaps count."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from helpers.json_lines import read_json_lines, write_json_lines
from helpers.real_data import real_file


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("recorded_gaps", ROOT / "scripts" / "recorded_gaps.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gaps_of_turns_and_of_anybody_by_rate(script: Any) -> None:
    """Conversation 0 asks every 10 s in quiet, conversation 1 every 10 s among others' requests."""
    quiet = [(10.0 * i, 0) for i in range(10)]
    busy = [(200.0 + 10 * i, 1) for i in range(10)]
    others = [(190.5 + i, 2 + i) for i in range(120)]
    late = [(900.0, 200), (1000.0, 200)]  # begins in the second half: does not count
    time_s, conversation = np.array(sorted([*quiet, *busy, *others, *late])).T
    grid = script.gap_grid("log", time_s, conversation.astype(int), 5.0)
    rows = {(kind, half): rest for kind, half, *rest in grid.rows}
    assert rows["turns", "all"][1:] == ["18", "10", "10", "10", "10", "10 to 10"]
    assert rows["turns", "quieter"][:2] == ["0", "9"]
    assert rows["turns", "busier"][:2] == ["1", "9"]
    assert rows["anybody's requests", "all"][1:3] == ["139", "0.5"]


def test_a_conversation_goes_on_from_a_block_that_others_lack(
    script: Any, tmp_path: Path, capsys: Any
) -> None:
    """Block 0 is everybody's; a turn that was asked twice parts a conversation no further."""
    chains = [[0, 1], [0, 2], [0, 3], [0, 1, 4], [0, 1, 5], [0, 2, 6]]
    rows = [
        {"timestamp": 1000 * i, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}
        for i, ids in enumerate(chains)
    ]
    path = write_json_lines(tmp_path / "log.jsonl", *rows)
    time_s, conversation = script._chains(path)
    assert (time_s.tolist(), conversation.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 1])
    write_json_lines(path, *({**row, "arrivals": "assumed"} for row in read_json_lines(path)))
    assert script.main([str(path)]) == 2
    assert "needs block ids with recorded times" in capsys.readouterr().err


def test_the_real_logs_have_both_kinds(script: Any, capsys: Any) -> None:
    logs = {"mooncake/conversation_trace_head500.jsonl": "30", "burstgpt/BurstGPT_3_head105.csv": "1800"}
    for name, near in logs.items():
        assert script.main([str(real_file(name)), "--near", near]) == 0
    shown = capsys.readouterr().out
    findings = (ROOT / "docs" / "study-findings.md").read_text()
    rows = [line for line in shown.splitlines() if line.startswith(("| turns", "| anybody"))]
    assert len(rows) == 12
    assert [row for row in rows if row not in findings] == []  # the page holds what the script prints
