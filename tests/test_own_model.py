"""`trace.selection`: a model of the caller's own hands its selections over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsatrace
from conftest import ROOT
from dsatrace.errors import UserError
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify

LAYERS, TOP_K = 2, 4


def chosen(positions: np.ndarray, layer: int, unit_tokens: int = 1, heads: int = 1) -> np.ndarray:
    """(*positions.shape, heads, TOP_K) ids that each query can see, -1 where there are fewer; repeatable."""
    ids = np.full((*positions.shape, heads, TOP_K), -1)
    for place in np.ndindex(*positions.shape, heads):
        position = int(positions[place[:-1]])
        num_ids = (position + 1) // unit_tokens
        rng = np.random.default_rng([position, layer, place[-1], place[0]])
        mine = rng.permutation(num_ids)[:TOP_K]
        ids[place][: len(mine)] = mine
    return ids if heads > 1 else ids[..., 0, :]


def write(folder: Path, steps: list[np.ndarray], as_: Any = np.asarray, **settings: Any) -> Path:
    kind = {name: settings[name] for name in ("unit_tokens", "heads") if name in settings}
    with dsatrace.attach(None, folder, num_layers=LAYERS, top_k=TOP_K, **settings) as trace:
        for positions in steps:
            for layer in range(LAYERS):
                trace.selection(layer, as_(chosen(positions, layer, **kind)), as_(positions))
    return folder


def records_of(folder: Path) -> list[dict[str, Any]]:
    return list(RunReader(folder).steps())


DECODE = [np.array([20 + step, 30 + step]) for step in range(5)]
WITH_PROMPT = [np.arange(12)[None], *(np.array([12 + step]) for step in range(3))]


@pytest.mark.parametrize(
    "as_", [np.asarray, torch.tensor, np.ndarray.tolist], ids=["numpy", "torch", "lists"]
)
def test_decode_steps_of_a_batch(tmp_path: Path, as_: Any) -> None:
    folder = write(tmp_path / "run", DECODE, as_)
    found = {
        (record["request_id"], record["step_idx"], record["layer_id"]): record["selected_token_pos"]
        for record in records_of(folder)
    }
    assert found == {
        (f"r{b}", step, layer): sorted(chosen(positions, layer)[b].tolist())
        for step, positions in enumerate(DECODE)
        for b in range(2)
        for layer in range(LAYERS)
    }
    requests = list(RunReader(folder).requests())
    assert [(r["num_prompt_tokens"], r["num_output_tokens"], r["state"]) for r in requests] == [
        (20, 6, "length"),
        (30, 6, "length"),
    ]
    assert (verify(folder).state, verify(folder).num_records) == ("complete", 20)
    for record in records_of(folder):
        assert {record[name] for name in ("scores_stats", "step_wall_us", "prefix", "kv_fetch")} == {None}


@pytest.mark.parametrize(("prefill", "first"), [("off", 0), ("last", -1), ("all", -12)])
def test_rows_of_a_prompt(tmp_path: Path, prefill: str, first: int) -> None:
    folder = write(tmp_path / "run", WITH_PROMPT, prefill=prefill)
    assert [record["step_idx"] for record in records_of(folder)][::LAYERS] == list(range(first, 3))
    assert next(RunReader(folder).requests())["num_prompt_tokens"] == 12
    verify(folder)


def test_a_position_that_does_not_follow_is_a_new_request(tmp_path: Path) -> None:
    one = [np.array([7 + step]) for step in range(2)]
    folder = write(tmp_path / "run", [*one, *WITH_PROMPT, *DECODE])
    found = [(r["num_prompt_tokens"], r["num_output_tokens"]) for r in RunReader(folder).requests()]
    assert found == [(7, 3), (12, 4), (20, 6), (30, 6)]
    verify(folder)


def test_heads_and_units(tmp_path: Path) -> None:
    folder = write(tmp_path / "heads", DECODE, heads=2)
    assert [record["kv_head"] for record in records_of(folder)[:4]] == [0, 1, 0, 1]
    verify(folder)
    folder = write(tmp_path / "entries", WITH_PROMPT, unit="entry", unit_tokens=4, prefill="all")
    steps = [record["step_idx"] for record in records_of(folder)][::LAYERS]
    assert steps == list(range(-9, 3))  # the first three positions see no whole entry
    assert RunReader(folder).manifest["selection"]["unit_tokens"] == 4
    verify(folder)


def test_positions_in_the_future_are_cut(tmp_path: Path) -> None:
    with dsatrace.attach(None, tmp_path / "run", num_layers=1, top_k=3, prefill="all") as trace:
        trace.selection(0, np.array([[[0, 5, -1], [1, 0, 7]]]), np.array([[0, 1]]))
    assert [record["selected_token_pos"] for record in records_of(tmp_path / "run")] == [[0], [0, 1]]
    verify(tmp_path / "run")


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([(2, [[0]], [3])], "layer 2: num_layers is 2"),
        ([(0, [[0], [1]], [3])], r"ids \(2, 1\) do not fit positions \(1,\)"),
        ([(0, [[0.5]], [3])], "ids are float64, not whole numbers"),
        ([(0, [[0]], [3]), (0, [[0]], [4])], r"layer 1: it has given nothing for positions \[3\]"),
        ([(0, [[0]], [3]), (1, [[0]], [4])], r"layer 1: it has given nothing for positions \[3\]"),
        ([(0, [[0, 1, 2, 3, 4]], [9]), (1, [[0, 1, 2, 3, 4]], [9])], "layer 0: more ids than top_k, 4"),
        ([(0, [[[0], [0]]], [[3, 5]]), (1, [[[0], [0]]], [[3, 5]])], "positions must ascend by 1"),
        ([(0, [[0], [0]], [0, 4]), (1, [[0], [0]], [0, 4])], "a sequence begins at 0 among others"),
        ([(0, [[0]], [3])], r"layer 1: it has given nothing for positions \[3\]"),
        ([], "trace.selection was not called"),
    ],
)
def test_what_fits_no_step_is_refused(
    tmp_path: Path, calls: list[tuple[int, list[Any], list[Any]]], said: str
) -> None:
    with (
        pytest.raises(UserError, match=said),
        dsatrace.attach(None, tmp_path / "run", num_layers=LAYERS, top_k=TOP_K) as trace,
    ):
        for layer, ids, positions in calls:
            trace.selection(layer, ids, positions)
    assert RunReader(tmp_path / "run").state == "incomplete"


def test_settings_are_checked(tmp_path: Path) -> None:
    for settings, said in (
        ({"num_layers": 2}, "top_k None: a model of your own needs it"),
        ({"top_k": 2}, "num_layers None"),
        ({"num_layers": 2, "top_k": 0}, "top_k 0"),
        ({"num_layers": 2, "top_k": 2, "unit": "page"}, "unit page: not one of"),
        ({"num_layers": 2, "top_k": 2, "unit_tokens": 4}, "unit_tokens 4: no size of a token"),
    ):
        with pytest.raises(UserError, match=said):
            dsatrace.attach(None, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "attach.md").read_text(encoding="utf-8")
    [example] = [block for block in page.split("```") if "trace.selection(layer" in block]
    monkeypatch.chdir(tmp_path)
    steps = [np.array([40 + step, 50 + step]) for step in range(3)]

    def select(layer: int, positions: np.ndarray) -> torch.Tensor:
        return torch.arange(16).repeat(len(positions), 1) + layer

    exec(example.removeprefix("python\n"), {"dsatrace": dsatrace, "steps": steps, "select": select})
    assert verify(tmp_path / "outputs/mine").num_records == 3 * 2 * 4
