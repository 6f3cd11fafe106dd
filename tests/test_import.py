"""`dsatrace import`: captures become runs that verify, report, replay and export; bad ones are refused."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace import cli
from dsatrace.captures.description import FLAGS as FLAG_NAMES
from dsatrace.captures.description import Description
from dsatrace.captures.examine import examine, open_captures
from dsatrace.captures.formats import FORMATS
from dsatrace.captures.import_run import ImportSettings, write_run
from dsatrace.errors import UserError
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from helpers.captured import as_slots, position_rows, random_slots, response, write_responses
from helpers.imports import expected, imported, refused, sets_of

K, PROMPT = 8, 5
FLAGS = ["--layers", "2", "--top-k", "8"]


def saved(path: Path, ids: np.ndarray) -> Path:
    np.save(path, ids)
    return path


@pytest.fixture
def ids() -> np.ndarray:
    return position_rows(np.random.default_rng(0), 60)


def test_a_run_holds_the_captures_rows(tmp_path: Path, ids: np.ndarray) -> None:
    run = imported(tmp_path, saved(tmp_path / "mine.npy", ids), "--format", "npy", "--prompt-tokens", PROMPT)
    rows = expected(ids)
    assert sets_of(run) == {"mine": {t: rows[t] for t in range(PROMPT - 1, 60)}}
    manifest = RunReader(run).manifest
    assert (manifest["selection"]["door"], manifest["selection"]["id_kind"]) == ("import", "position")
    assert manifest["selection"]["sparse_active"] > 0
    assert manifest["state"] == "complete"
    (line,) = RunReader(run).requests()
    assert (line["num_prompt_tokens"], line["num_output_tokens"]) == (PROMPT, 60 - PROMPT + 1)
    assert verify(run).state == "complete"


@pytest.mark.parametrize("way", [[], ["--trace-format", "parquet"]], ids=["jsonl", "parquet"])
def test_everything_behind_a_run_takes_it(
    tmp_path: Path, ids: np.ndarray, way: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = imported(tmp_path, saved(tmp_path / "mine.npy", ids), "--format", "npy", "--prompt-tokens", 5, *way)
    for command in (
        ["verify", str(run)],
        ["report", str(run)],
        ["summarize", str(run)],
        ["check", str(run)],
        ["replay", str(run), "--no-figure", "--out", str(tmp_path / "replay")],
        ["export", str(run), "--to", "jsonl" if way else "parquet", "--out", str(tmp_path / "copy")],
    ):
        assert cli.main(command) == 0, command
    said = capsys.readouterr().out
    assert "door import" in said
    assert "None" not in said


def test_slots_are_recorded_as_slots(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    slots = as_slots(ids, random_slots(np.random.default_rng(1), 60) + 60)
    run = imported(tmp_path, saved(tmp_path / "a.npy", slots), "--format", "npy", "--prompt-tokens", PROMPT)
    assert "the engine's slots" in capsys.readouterr().out
    manifest = RunReader(run).manifest
    assert (manifest["selection"]["id_kind"], manifest["selection"]["sparse_active"]) == ("slot", None)
    rows = expected(slots)
    assert sets_of(run) == {"a": {t: rows[t] for t in range(PROMPT, 60)}}
    verify(run)
    for verb in (["replay", "--no-figure"], ["report"], ["check"]):
        assert cli.main([verb[0], str(run), *verb[1:]]) == 0


def test_what_is_not_proven_is_a_slot_unless_declared(tmp_path: Path, capsys: Any) -> None:
    ids = position_rows(np.random.default_rng(0), 40, first=20)
    path = saved(tmp_path / "a.npy", ids)
    run = imported(tmp_path, path, "--format", "npy", "--start", 20)
    assert "undetermined" in capsys.readouterr().out
    assert RunReader(run).manifest["selection"]["id_kind"] == "slot"
    run = imported(tmp_path, path, "--format", "npy", "--start", 20, "--ids", "position")
    assert RunReader(run).manifest["selection"]["id_kind"] == "position"
    assert sets_of(run) == {"a": expected(ids, 20)}
    verify(run)


def test_ragged_offsets_are_repaired(tmp_path: Path, ids: np.ndarray) -> None:
    """The decode rows prove themselves; the prompt's last row is moved back."""
    moved = ids.copy()
    moved[:PROMPT] = np.where(ids[:PROMPT] >= 0, ids[:PROMPT] + 700, -1)
    run = imported(tmp_path, saved(tmp_path / "a.npy", moved), "--format", "npy", "--prompt-tokens", PROMPT)
    assert sets_of(run)["a"][PROMPT - 1] == expected(ids)[PROMPT - 1]
    verify(run)


def test_rows_that_were_never_captured_split_a_request(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    ids[20] = ids[41:43] = 0
    ids[30, 1] = 0
    run = imported(tmp_path, saved(tmp_path / "a.npy", ids), "--format", "npy", "--prompt-tokens", PROMPT)
    assert "decode rows left out: 4 of zeros" in capsys.readouterr().out
    rows = expected(ids)
    assert sets_of(run) == {
        name: {t: rows[t] for t in steps}
        for name, steps in (
            ("a", range(PROMPT, 20)),
            ("a from 21", range(21, 30)),
            ("a from 31", range(31, 41)),
            ("a from 43", range(43, 60)),
        )
    }
    assert RunReader(run).summary()["workload"]["counts"]["rows_never_captured"] == 4
    assert verify(run).state == "complete"
    assert cli.main(["replay", str(run), "--no-figure"]) == 0


def test_shared_layers_are_recorded(tmp_path: Path) -> None:
    ids = position_rows(np.random.default_rng(0), 40, num_sets=4)
    ids[:, 2] = ids[:, 3] = ids[:, 1]
    run = imported(tmp_path, saved(tmp_path / "a.npy", ids), "--format", "npy", "--prompt-tokens", PROMPT)
    layers = RunReader(run).manifest["selection"]["layers"]
    assert [layer["source_layer"] for layer in layers] == [None, None, 1, 1]
    verify(run)


def test_responses_of_sglang(tmp_path: Path, ids: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    other, late = position_rows(rng, 30), position_rows(rng, 20, first=25)
    path = write_responses(
        tmp_path / "responses.jsonl",
        response(ids, PROMPT, id="one", finish_reason={"type": "stop"}),
        response(other, 10, id="one"),
        response(late, 25, first=25),  # of a decode instance: it has no rows of the prompt
    )
    path.write_text(path.read_text() + "\n")
    run = imported(tmp_path, path, "--format", "sglang", *FLAGS, "--model", "deepseek-v3.2")
    assert sets_of(run) == {
        "one": {t: row for t, row in expected(ids).items() if t >= PROMPT},
        "one.2": {t: row for t, row in expected(other).items() if t >= 10},
        "responses-2": expected(late, 25),
    }
    lines = {line["request_id"]: line for line in RunReader(run).requests()}
    assert lines["one"]["state"] == "stop"
    assert lines["responses-2"]["num_prompt_tokens"] == 25
    assert RunReader(run).manifest["model_config"] == {"name": "deepseek-v3.2"}
    verify(run)


def test_a_long_text_is_left_in_the_file(tmp_path: Path) -> None:
    """Texts around the length from which they are not kept, with escapes at every place of a window."""
    from dsatrace.captures import json_responses
    from dsatrace.captures.json_responses import Text, read_responses

    rng = np.random.default_rng(0)
    records = []
    for i in range(200):
        size = int(rng.integers(json_responses.SHORT_CHARS - 20, json_responses.SHORT_CHARS + 20))
        text = "".join(rng.choice(list('ab"\\\nü\t'), size))
        records.append({"a": text, "n": [i, {"b": None}], text[:5]: "x" * (i * 10)})
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    data = path.read_bytes()

    def whole(value: Any) -> Any:
        if isinstance(value, Text):
            return json.loads(b'"' + data[value.offset : value.offset + value.num_chars] + b'"')
        return value

    for window in (7, 64, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_responses, "_WINDOW_BYTES", window)
            patch.setattr(json_responses, "_NEAR_BYTES", 16)
            found = [one.record for one in read_responses(path)]
        assert any(isinstance(value, Text) for one in found for value in one.values())
        assert [{key: whole(value) for key, value in one.items()} for one in found] == records


def test_looking_through_is_seen_from_the_first_window(
    tmp_path: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte once, before any row is checked."""
    from dsatrace.captures import json_responses

    monkeypatch.setattr(json_responses, "_WINDOW_BYTES", 1000)
    path = write_responses(tmp_path / "responses.jsonl", response(ids, PROMPT), response(ids, PROMPT))
    seen: list[int] = []
    open_captures([path], "sglang", Description(layers="2", top_k=K), seen.append)
    size = path.stat().st_size
    assert seen == [1000] * (size // 1000) + [size % 1000] * (size % 1000 > 0) and len(seen) > 3


def test_a_line_that_is_large_beside_its_texts(tmp_path: Path, capsys: Any) -> None:
    from dsatrace.captures import json_responses

    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"logprobs": list(range(1000))}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_responses, "_MOST_BYTES", 2000)
        line = refused(capsys, path, "--format", "sglang", *FLAGS)
    assert "line 1: more than 0 MiB beside its long texts; ask the engine for less" in line


def test_arrays_of_several_requests(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    other = position_rows(np.random.default_rng(1), 30, first=12)
    describe = tmp_path / "capture.json"
    describe.write_text(
        json.dumps(
            {
                "layers": [3, 5],
                "model": "mine",
                "prompt_tokens": PROMPT,
                "requests": {"b": {"start": 12, "prompt_tokens": 12}},
            }
        )
    )
    np.savez(tmp_path / "plain.npz", a=ids, b=other)
    np.savez_compressed(tmp_path / "packed.npz", a=ids.astype(np.int64), b=other.astype(">i4"))
    (tmp_path / "arrays.safetensors").write_bytes(safetensors_of({"a": ids, "b": other}))
    for name in ("plain.npz", "packed.npz", "arrays.safetensors"):
        run = imported(tmp_path, tmp_path / name, "--format", "npy", "--describe", describe)
        assert sets_of(run) == {
            "a": {t: row for t, row in expected(ids).items() if t >= PROMPT},
            "b": expected(other, 12),
        }
        layers = RunReader(run).manifest["selection"]["layers"]
        assert [layer["heads"] for layer in layers] == [0, 0, 0, 1, 0, 1]
        verify(run)
    assert "described and" not in capsys.readouterr().out
    imported(tmp_path, saved(tmp_path / "a.npy", ids), "--format", "npy", "--describe", describe)
    assert "described and not captured: 1 request, the first b" in capsys.readouterr().out


def safetensors_of(arrays: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save(arrays, metadata={"made": "by hand"})


def test_heads_blocks_and_entries(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = np.full((80, 2, 2, K), -1, dtype=np.int32)
    for t in range(80):
        for head in np.ndindex(2, 2):
            count = min(K, t // 4 + 1)
            blocks[(t, *head)][rng.permutation(K)[:count]] = rng.choice(t // 4 + 1, count, replace=False)
    path = saved(tmp_path / "a.npy", blocks)
    flags = ("--unit", "block", "--unit-tokens", 4, "--heads", 2, "--prompt-tokens", 3)
    run = imported(tmp_path, path, "--format", "npy", *flags)
    selection = RunReader(run).manifest["selection"]
    assert (selection["unit"], selection["id_kind"]) == ("block", "position")
    assert [layer["heads"] for layer in selection["layers"]] == [2, 2]
    assert sets_of(run)["a"] == {t: row for t, row in expected(blocks.reshape(80, 4, K)).items() if t >= 3}
    verify(run)
    assert cli.main(["replay", str(run), "--no-figure"]) == 0


def test_captures_that_are_not_what_they_claim(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    window = np.arange(60)[:, None] - np.arange(K)
    window = np.repeat(np.where(window >= 0, window, -1)[:, None], 2, axis=1).astype(np.int32)
    stale = ids.copy()
    stale[30] = ids[50]
    stale[30, 0, 0] = 55
    for changed, flags, said in (
        (np.zeros_like(ids), [], "none of its 60 rows was captured: all are zeros"),
        (ids[:0], [], "holds no rows"),
        (ids[:K], [], "sparse attention was never active: no row chooses from more than 8 ids"),
        (window, [], "sets past top-k is the newest ids and no others"),
        (stale, [], "row t must hold what query t of that request selected"),
        (ids, ["--top-k", "9"], "--top-k 9: rows of "),
        (ids, ["--experts", "9"], "--experts 9: its ids are of unit token"),
        (ids[:, :1], ["--layers", "2"], "its rows hold 1 sets, not 2 layers"),
        (ids, ["--start", "3"], "either --start, --layers or --top-k is not the capture's"),
        (ids.astype(np.float32), [], "float32 of shape (60, 2, 8); use whole numbers"),
        (ids.astype(np.int64) + 2**31, [], "is no id; ids are below 2^31"),
        (np.array([[{}]]), [], "holds pickled objects"),
        (np.asfortranarray(ids), [], "holds columns first"),
    ):
        path = saved(tmp_path / "a.npy", changed)
        line = refused(capsys, path, "--format", "npy", "--prompt-tokens", PROMPT, *flags)
        assert said in line
        assert "a.npy" in line or "--" in line
    path = saved(tmp_path / "a.npy", window)
    run = imported(tmp_path, path, "--format", "npy", "--prompt-tokens", PROMPT, "--allow-inactive")
    assert RunReader(run).manifest["selection"]["sparse_active"] == 0
    run = imported(
        tmp_path, saved(path, stale), "--format", "npy", "--prompt-tokens", PROMPT, "--ids", "slot"
    )
    verify(run)
    slots = as_slots(ids, random_slots(np.random.default_rng(1), 60) + 60)
    path = saved(tmp_path / "a.npy", slots)
    line = refused(capsys, path, "--format", "npy", "--prompt-tokens", PROMPT, "--ids", "position")
    assert "these are slots" in line


def test_files_that_are_damaged(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    good = response(ids, PROMPT)
    text = json.dumps(good)
    base = good["meta_info"]["indexer_topk"]
    path = tmp_path / "a.jsonl"
    for content, said in (
        (text[:-900], "line 1 is cut short"),
        (text + "\n{]\n", "line 2: not JSON"),
        (text.replace(base, base[:-4]), "are no whole rows of 2 layers of 8 ids; correct"),
        (text.replace(base, base[:-3]), "characters are no whole base64"),
        (text.replace(base, base[:500] + "\\u0041" + base[506:]), "holds backslashes"),
        (text.replace(base, base[:500] + "!" + base[501:]), "no base64"),
        (json.dumps({"meta_info": {}}), "line 1: no meta_info.indexer_topk; start the server with"),
        (json.dumps({"choices": []}), "line 1: no meta_info.indexer_topk"),
        ("[1]", "not a response"),
        ("", "holds no rows"),
        (json.dumps(response(ids, 10, completion_tokens=90)), "60 rows; 10 prompt and 90 answer tokens"),
        (text.replace('"prompt_tokens": 5', '"prompt_tokens": "x"'), "line 1: prompt_tokens is no count"),
        (text.replace('"prompt_tokens": 5', '"prompt_tokens": null'), "add --prompt-tokens"),
        (text.replace('"prompt_tokens": 5', '"prompt_tokens": 4.5'), "is no count"),
    ):
        path.write_text(content)
        line = refused(capsys, path, "--format", "sglang", *FLAGS)
        assert said in line, content[-80:]
        assert "\x1b" not in line
    hostile = response(ids[:K], PROMPT, id="\x1b[2J\n")
    path.write_text(json.dumps(hostile))
    assert "\x1b" not in refused(capsys, path, "--format", "sglang", *FLAGS)
    path.write_text(text)
    for flags, said in (
        (FLAGS[:2], "--top-k is missing"),
        (FLAGS[2:], "--layers is missing"),
        (["--layers", "3,2", "--top-k", "8"], "--layers 3,2: use a count"),
        (["--layers", "9" * 20, "--top-k", "8"], "use a count"),
        ([*FLAGS, "--unit", "block"], "needs --unit-tokens"),
        ([*FLAGS, "--top-k", "0"], "--top-k 0: use at least 1"),
        (["--layers", "1000", "--top-k", "1000000"], "larger than any model's"),
    ):
        assert said in refused(capsys, path, "--format", "sglang", *flags)
    array = tmp_path / "a.npy"
    np.save(array, ids)
    whole = array.read_bytes()
    for content, said in (
        (whole[:-1], "it is cut short"),
        (whole[:40], "no array of numpy's"),
        (b"\x93NUMPY\x09\x00" + whole[8:], "no array of numpy's"),
        (b"PK\x03\x04", "no whole .npz"),
        (b"hello", "neither .npy, .npz nor .safetensors"),
        (b"", "neither .npy"),
    ):
        array.write_bytes(content)
        assert said in refused(capsys, array, "--format", "npy", "--prompt-tokens", 3)
    broken = tmp_path / "a.safetensors"
    whole = safetensors_of({"a": ids})
    for content, said in (
        (whole[:-9], "the file ends 9 bytes early"),
        (whole[:20], "no whole safetensors file"),
        (whole[:8] + b"x" * 800, "no safetensors header"),
        (whole.replace(b"I32", b"F32"), "F32; use whole numbers"),
        (whole.replace(b"[60,2,8]", b"[61,2,8]"), "contradicts itself"),
    ):
        broken.write_bytes(content)
        assert said in refused(capsys, broken, "--format", "npy", "--prompt-tokens", 3), content[:90]
    assert "cannot read it" in refused(capsys, tmp_path / "none.npy", "--format", "npy")


def test_a_bad_description_is_named(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    path, describe = saved(tmp_path / "a.npy", ids), tmp_path / "capture.json"
    for content, said in (
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"topk": 8}', "'topk' is no key of it; use layers, top_k"),
        ('{"top_k": "8"}', "top_k: '8' is no number"),
        ('{"top_k": true}', "top_k: True is no number"),
        ('{"layers": [true]}', "--layers"),
        ('{"unit": "page"}', "--unit page: use one of"),
        ('{"requests": {"a": {"tokens": 1}}}', "requests: use"),
    ):
        describe.write_text(content)
        assert said in refused(capsys, path, "--format", "npy", "--describe", describe)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    path = saved(tmp_path / "a.npy", ids)
    run = imported(tmp_path, path, "--format", "npy", "--prompt-tokens", PROMPT)
    before = {file: file.read_bytes() for file in run.iterdir()}
    assert cli.main(["import", str(path), "--format", "npy", "--out", str(run)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in run.iterdir()} == before


def test_an_interrupt_leaves_nothing(tmp_path: Path, ids: np.ndarray) -> None:
    path = saved(tmp_path / "a.npy", ids)
    described = Description(prompt_tokens=PROMPT)
    captures = open_captures([path], "npy", described)
    examined = examine([path], "npy", described, captures)

    def interrupt(_num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_run(examined, tmp_path / "run", ImportSettings(), interrupt)
    assert [one.name for one in tmp_path.iterdir()] == ["a.npy"]


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="--kv-block-size 0"):
        ImportSettings(block_size=0)


def test_what_sglang_captures_by_default(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    """Offsets in the prompt's rows, other ones after a prefix-cache hit, and slots in the steps'."""
    rng = np.random.default_rng(2)
    slots = as_slots(ids, random_slots(rng, 60, page=4) + 60)
    prompt = np.where(ids[:20] >= 0, ids[:20] + 300, -1)
    hit = prompt.copy()
    hit[:6] = np.where(ids[:6] >= 0, ids[:6] + 9000, -1)
    path = write_responses(
        tmp_path / "a.jsonl",
        response(np.concatenate([ids[:20], slots[20:]]), 20, id="first of its batch"),
        response(np.concatenate([prompt, slots[20:]]), 20, id="second"),
        response(np.concatenate([hit, slots[20:]]), 20, id="hit", cached_tokens=6),
    )
    run = imported(tmp_path, path, "--format", "sglang", *FLAGS)
    said = capsys.readouterr().out
    assert "1 of 3 requests found part of their prompt in the prefix cache" in said
    assert "decode rows: 120, the engine's slots" in said
    assert "the prompt's rows are not recorded" in said
    assert RunReader(run).manifest["selection"]["id_kind"] == "slot"
    rows = expected(slots)
    assert list(sets_of(run).values()) == [{t: rows[t] for t in range(20, 60)}] * 3
    verify(run)
    assert cli.main(["check", str(path), "--format", "sglang", *FLAGS]) == 1
    assert "SGLANG_DSA_FUSE_TOPK=0" in capsys.readouterr().err


def test_a_prompt_that_is_not_to_be_used(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    """Rows of a prompt that are another request's, before steps that are proven."""
    ids[2] = [5, 6, 7, -1, -1, -1, -1, -1]
    path = saved(tmp_path / "a.npy", ids)
    flags = ("--format", "npy", "--prompt-tokens", PROMPT)
    assert "prompt rows are mixed: 3 are positions, and 1 are not" in refused(capsys, path, *flags)
    run = imported(tmp_path, path, *flags, "--prompt-rows", "off")
    assert min(sets_of(run)["a"]) == PROMPT
    verify(run)


def test_entries_that_nothing_proves(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([[rng.choice((t + 1) // 4, K, replace=False) for _ in range(2)] for t in range(64, 110)])
    path = saved(tmp_path / "a.npy", ids)
    run = imported(tmp_path, path, "--format", "npy", "--start", 64, "--unit", "entry", "--unit-tokens", 4)
    selection = RunReader(run).manifest["selection"]
    assert (selection["unit"], selection["unit_tokens"], selection["id_kind"]) == ("entry", 4, "slot")
    verify(run)


def test_a_layer_that_was_captured_late(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    from dsatrace.captures import rows

    ids[:40, 1] = 0
    path = saved(tmp_path / "a.npy", ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK_BYTES", 20 * 2 * K * 4)
        line = refused(capsys, path, "--format", "npy", "--prompt-tokens", PROMPT)
    assert "a layer holds zeros at first, and ids from position 40 on" in line


def test_the_docs_description_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "import.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "capture.json").write_text(example)
    described = Description.of(argparse.Namespace(**dict.fromkeys(FLAG_NAMES)), tmp_path / "capture.json")
    assert described.layer_ids == [0, 1, 2, 6]
    assert described.of_request("second", "start") == 120
    assert [name for name in FORMATS if f"`{name}`" not in text] == []
    assert [key for key in FLAG_NAMES if f"`{key}`" not in text and key != "model"] == []


def test_all_rows_of_a_prompt(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    moved = ids.copy()
    moved[:40] = np.where(ids[:40] >= 0, ids[:40] + 700, -1)
    flags = ("--format", "npy", "--prompt-rows", "all")
    path = saved(tmp_path / "a.npy", ids)
    for num_prompt in (PROMPT, 60):  # with steps, and without any
        run = imported(tmp_path, path, *flags, "--prompt-tokens", num_prompt)
        assert sets_of(run) == {"a": expected(ids)}
        assert RunReader(run).manifest["trace"]["prefill"] == "all"
        verify(run)
        for command in (["report"], ["check"], ["summarize"]):
            assert cli.main([*command, str(run)]) == 0
    run = imported(tmp_path, saved(path, moved), *flags, "--prompt-tokens", 40, "--ids", "position")
    assert sets_of(run) == {"a": expected(ids)}
    verify(run)
    arrays = tmp_path / "arrays"
    assert cli.main(["export", str(run), "--to", "npy", "--out", str(arrays)]) == 0
    (file,) = arrays.glob("*.npy")
    assert np.array_equal(np.sort(np.load(file)), np.sort(ids))
    for changed, more, said in (
        (moved, (), "--prompt-rows all: the ids are slots"),
        (ids[10:], ("--start", 10, "--ids", "position"), "some requests lack rows of it"),
    ):
        line = refused(capsys, saved(path, changed), *flags, "--prompt-tokens", 40, *more)
        assert said in line, said
    line = refused(capsys, saved(path, ids), "--format", "npy", "--prompt-tokens", 60)
    assert "holds no rows of decode steps; to record the prompt's, say --prompt-rows all" in line
    ids[3] = 0
    assert "never captured" in refused(capsys, saved(path, ids), *flags, "--prompt-tokens", PROMPT)


def test_an_archive_that_is_encrypted(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=ids)
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of each header
        data[data.index(mark) + at] |= 1
    path.write_bytes(data)
    assert "cannot unpack it" in refused(capsys, path, "--format", "npy", "--prompt-tokens", PROMPT)
