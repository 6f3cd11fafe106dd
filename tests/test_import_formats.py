"""What each engine's capture holds comes out of it, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace import cli
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from helpers.captured import (
    as_slots,
    choices,
    log_forward,
    log_header,
    npy_text,
    position_rows,
    random_slots,
    response,
    write_responses,
)
from helpers.imports import expected, imported, refused, sets_of

K = 8


def experts(seed: int, num_rows: int, num_layers: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((num_rows, num_layers, 64)), axis=2)[..., :K].astype(np.int32)


def write_log(path: Path, tail: bytes = b"", **header: Any) -> dict[str, np.ndarray]:
    """Four requests of a log: two with one hash side by side, and one whose name is used again."""
    rng = np.random.default_rng(0)
    rows = {name: position_rows(rng, 30, first=first) for name, first in (("a", 3), ("b", 20), ("c", 40))}
    rows["again"] = position_rows(rng, 12, first=9)
    hashes = {"a": 7, "b": 7, "c": 1, "again": 1}
    first = {"a": 3, "b": 20, "c": 40, "again": 9}
    begins = {"a": 0, "b": 5, "c": 2, "again": 35}
    data = log_header([0, 2], K, **header)
    for forward in range(47):
        live = [name for name in rows if 0 <= forward - begins[name] < len(rows[name])]
        members = [(hashes[name], first[name] + forward - begins[name] + 1) for name in live]
        ids = np.stack([rows[name][forward - begins[name]] for name in live])
        data += log_forward(forward, members, ids)
    path.write_bytes(data + tail)
    path.with_suffix(".rids.jsonl").write_text('{"hash": 7, "rid": "seven"}\n{"hash": 1, "rid": "o')
    return rows


def test_the_log_of_a_fork(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "indexer_topk_rank0.bin"
    torn = log_forward(47, [(7, 50)], position_rows(np.random.default_rng(0), 1, first=49))[:-3]
    rows = write_log(path, torn)
    run = imported(tmp_path, path, "--format", "sgltopk1")
    assert "1 forward left out, number 47: the log ends within it" in capsys.readouterr().out
    assert sets_of(run) == {
        "seven": expected(rows["a"], 3),
        f"{1:016x}": expected(rows["c"], 40),
        "seven.2": expected(rows["b"], 20),
        f"{1:016x}.2": expected(rows["again"], 9),
    }
    manifest = RunReader(run).manifest
    assert manifest["model_config"] == {"name": "some/model"}
    assert [layer["heads"] for layer in manifest["selection"]["layers"]] == [1, 0, 1]
    assert manifest["selection"]["id_kind"] == "position"
    verify(run)
    assert cli.main(["replay", str(run), "--no-figure"]) == 0


def test_a_log_says_what_its_ids_are(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "log.bin"
    write_log(path, ids_are_token_positions=False)
    run = imported(tmp_path, path, "--format", "sgltopk1")
    assert RunReader(run).manifest["selection"]["id_kind"] == "slot"
    rng = np.random.default_rng(1)
    ids = as_slots(position_rows(rng, 30, first=20), random_slots(rng, 60) + 60)
    data = log_header([0, 1], K)
    for t in range(30):
        data += log_forward(t, [(1, 21 + t)], ids[t : t + 1])
    path.write_bytes(data)
    assert "said to be positions, but request" in refused(capsys, path, "--format", "sgltopk1")


def test_logs_that_do_not_belong_together(tmp_path: Path, capsys: Any) -> None:
    write_log(tmp_path / "a.bin")
    write_log(tmp_path / "b.bin", model_path="another")
    line = refused(capsys, tmp_path / "a.bin", tmp_path / "b.bin", "--format", "sgltopk1")
    assert "b.bin: says of its ids what" in line
    write_log(tmp_path / "b.bin")
    run = imported(tmp_path, tmp_path / "a.bin", tmp_path / "b.bin", "--format", "sgltopk1")
    assert len(sets_of(run)) == 8
    verify(run)


def test_damaged_logs(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "log.bin"
    write_log(path)
    whole = path.read_bytes()
    head = len(log_header([0, 2], K))
    line = refused(capsys, path, "--format", "sgltopk1", "--start", 0)
    assert "--start: a log tells where each of its requests begins; leave it out" in line
    for content, said in (
        (b"x" + whole, "no SGLTOPK1 log"),
        (whole[:30], "its header is damaged"),
        (log_header([0, 2], K, version=2), "of no known version"),
        (log_header([2, 0], K), "of no known version"),
        (log_header([0, 2], K), "holds no rows"),
        (whole[: head + 30] + b"\xff" * 8 + whole[head + 38 :], "cannot unpack it"),
        (whole[:head] + b"\0" * 16 + whole[head:], "forward 0 of 0 requests"),
        (log_header([0, 2], 2 * K) + whole[head:], "64 of 128 bytes"),
        (log_header([0, 2], K) + log_forward(0, [(1, 1)], np.zeros((1, 2, K), np.int32)), "sees 1 tokens"),
    ):
        path.write_bytes(content)
        assert said in refused(capsys, path, "--format", "sgltopk1"), said


def test_the_proposal_of_vllm(tmp_path: Path, capsys: Any) -> None:
    ids = position_rows(np.random.default_rng(0), 60)
    late = position_rows(np.random.default_rng(1), 42, first=3)
    path = write_responses(
        tmp_path / "vllm.jsonl",
        choices(
            {"indexer_topk": npy_text(ids), "finish_reason": "stop"}, prompt_tokens=5, completion_tokens=56
        ),
        choices({"indexer_topk": npy_text(late)}, prompt_tokens=6, completion_tokens=40),
    )
    run = imported(tmp_path, path, "--format", "vllm", "--layers", "1,4")
    assert sets_of(run) == {
        "cmpl-1": {t: row for t, row in expected(ids).items() if t >= 4},
        "cmpl-1.2": {t: row for t, row in expected(late, 3).items() if t >= 5},
    }
    verify(run)
    two = choices(
        {"indexer_topk": npy_text(ids)}, {"indexer_topk": npy_text(ids)}, prompt_tokens=5, completion_tokens=1
    )
    write_responses(path, two)
    run = imported(tmp_path, path, "--format", "vllm", "--start", 0)
    assert list(sets_of(run)) == ["cmpl-1-0", "cmpl-1-1"]
    write_responses(path, choices({"indexer_topk": npy_text(ids)}, prompt_tokens=5, completion_tokens=9))
    describe = tmp_path / "capture.json"
    describe.write_text('{"requests": {"cmpl-1": {"start": 0}}}')
    assert list(sets_of(imported(tmp_path, path, "--format", "vllm", "--describe", describe))) == ["cmpl-1"]
    for record, said in (
        ({"choices": [{}]}, "no choice with indexer_topk; no release of vLLM returns it"),
        ({"meta_info": {}}, "no response with choices"),
        (choices({"indexer_topk": npy_text(ids)}, prompt_tokens=5, completion_tokens=9), "say --start"),
        (choices({"indexer_topk": 7}, prompt_tokens=5, completion_tokens=9), "is no text of base64"),
    ):
        write_responses(path, record)
        assert said in refused(capsys, path, "--format", "vllm"), said


def test_experts_of_sglang_and_vllm(tmp_path: Path, capsys: Any) -> None:
    ids = experts(0, 50)
    ids[:, 0] = 0  # a dense layer has a place in the buffer
    one = response(ids[10:], 20, first=10, id="one", routed_experts_start_len=10)
    one["meta_info"]["routed_experts"] = one["meta_info"].pop("indexer_topk")
    path = write_responses(tmp_path / "sglang.jsonl", one)
    flags = ("--format", "routed-experts", "--experts", 64)
    run = imported(tmp_path, path, *flags, "--layers", 3, "--top-k", K)
    rows = expected(ids[:, 1:])
    assert sets_of(run) == {"one": {t: rows[t] for t in range(19, 50)}}
    selection = RunReader(run).manifest["selection"]
    assert (selection["unit"], selection["num_ids"]) == ("expert", 64)
    assert [layer["heads"] for layer in selection["layers"]] == [0, 1, 1]
    verify(run)
    for verb in ("replay", "report", "check"):
        assert cli.main([verb, str(run), *(["--no-figure"] if verb == "replay" else [])]) == 0
    answer = {"routed_experts": npy_text(experts(1, 30).astype(np.uint8))}
    path = write_responses(tmp_path / "vllm.jsonl", choices(answer, prompt_tokens=10, completion_tokens=21))
    run = imported(tmp_path, path, *flags)
    assert sets_of(run) == {"cmpl-1": {t: row for t, row in expected(experts(1, 30)).items() if t >= 9}}
    verify(run)
    capsys.readouterr()
    assert "from how many experts" in refused(capsys, path, *flags[:2])
    assert "no routing of experts; correct" in refused(capsys, path, *flags[:3], 60)
    write_responses(path, {"choices": [{"text": "x"}]})
    assert "no routed_experts; start SGLang or vLLM with" in refused(capsys, path, *flags)


def trace_text(calls: list[np.ndarray], layers: tuple[int, ...] = (3, 4, 5)) -> str:
    lines = []
    for call, rows in enumerate(calls):
        for row, sets in enumerate(rows):
            for layer, chosen in zip(layers, sets.tolist(), strict=True):
                lines.append(f"{call} {row} {layer} " + " ".join(f"{one}:0.125" for one in chosen))
    return "\n".join(lines) + "\n"


def test_the_text_of_colibri(tmp_path: Path, capsys: Any) -> None:
    first, second = experts(0, 40), experts(1, 30)
    calls = [first[:8], first[8:12], *first[12:, None], second[:5], *second[5:, None]]
    path = tmp_path / "route.txt"
    path.write_text("# a comment\n" + trace_text(calls))
    flags = ("--format", "route-trace", "--experts", 64)
    run = imported(tmp_path, path, *flags)
    assert sets_of(run) == {
        "route-0": {t: row for t, row in expected(first).items() if t >= 11},
        "route-1": {t: row for t, row in expected(second).items() if t >= 4},
    }
    layers = RunReader(run).manifest["selection"]["layers"]
    assert [layer["heads"] for layer in layers] == [0, 0, 0, 1, 1, 1]
    verify(run)
    run = imported(tmp_path, path, *flags, "--prompt-tokens", 12)
    assert list(sets_of(run)) == ["route"]
    text = "\n".join(
        f"{t} {layer} {' '.join(map(str, first[t, i]))} {' '.join(['0.5'] * K)}"
        for t in range(40)
        for i, layer in enumerate((3, 4, 5))
    )
    path.write_text(text)
    run = imported(tmp_path, path, *flags, "--prompt-tokens", 12)
    assert sets_of(run) == {"route": {t: row for t, row in expected(first).items() if t >= 11}}
    good = trace_text(calls)
    for content, said in (
        ("", "holds no rows"),
        (good + "9 0 3 1:0.5 2\n", "line 211: not `call row layer expert:gate ...`"),
        (
            good.replace("0 0 4 ", "0 0 9 "),
            "line 4: a row of layers 3, 4, 5, and those before it",
        ),
        (good + "99 0 3 1:1\n99 0 4 1:1\n99 0 5 1:1\n", "line 211: 1 experts, and lines before it have 8"),
        (good.replace(":0.125", ":x:"), "line 1: not `call row"),
        (good.replace("0 0 3", "0 -1 3", 1), "line 1: not `call row"),
        (trace_text([*first[:, None]]), "add --prompt-tokens"),
    ):
        path.write_text(content)
        assert said in refused(capsys, path, *flags), said
    capsys.readouterr()
    for torn in ("63 0 3 1:0.5 2", "63 0 3 " + "1:1 " * K, "63 0"):
        path.write_text(good + torn)
        run = imported(tmp_path, path, *flags)
        assert len(sets_of(run)["route-1"]) == 26
        assert ("1 row left out" in capsys.readouterr().out) == (K * "1:1 " in torn)


@pytest.mark.parametrize("kind", ["position", "slot", "heads", "gap", "expert"])
def test_arrays_there_and_back(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    ids = experts(0, 60) if kind == "expert" else position_rows(rng, 60)
    flags: tuple[object, ...] = ("--experts", 64) if kind == "expert" else ()
    if kind == "slot":
        ids = as_slots(ids, random_slots(rng, 60) + 60)
    elif kind == "heads":
        ids = position_rows(rng, 60, num_sets=4).reshape(60, 2, 2, K)
        flags = ("--heads", 2)
    elif kind == "gap":
        ids[30:33] = 0
    flags += ("--unit", "expert") if kind == "expert" else ()
    np.save(tmp_path / "a.npy", ids)
    run = imported(tmp_path, tmp_path / "a.npy", "--format", "npy", "--prompt-tokens", 5, *flags)
    arrays = tmp_path / "arrays"
    assert cli.main(["export", str(run), "--to", "npy", "--out", str(arrays)]) == 0
    files = sorted(arrays.glob("*.npy"))
    found = [np.load(file) for file in files]
    first = 5 if kind in ("slot", "gap") else 4
    expect = [ids[first:30], ids[33:]] if kind == "gap" else [ids[first:]]
    assert [one.dtype for one in found] == [np.dtype("<i4")] * len(expect)
    for one, wanted in zip(found, expect, strict=True):
        assert np.array_equal(np.sort(one, axis=-1), np.sort(wanted, axis=-1))
    again = imported(tmp_path, *files, "--format", "npy", "--describe", arrays / "capture.json")
    assert list(sets_of(again).values()) == list(sets_of(run).values())
    assert RunReader(again).manifest["selection"] == RunReader(run).manifest["selection"]
    verify(again)
