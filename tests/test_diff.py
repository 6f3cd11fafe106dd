"""`dsatrace diff`: a run against itself, with a row altered, in other formats, and in other numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dsatrace
from conftest import ROOT
from dsatrace import cli
from dsatrace.captures.diff import Diff, diff
from dsatrace.errors import UserError
from dsatrace.model.config import PLAIN_NUMERICS
from dsatrace.report.diff import diff_parts
from dsatrace.report.grid import Grid
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE
from dsatrace.trace.export import export_run
from dsatrace.trace.load import load
from dsatrace.trace.reader import RunReader
from dsatrace.workloads.encoding import Message, encode_chat
from dsatrace.workloads.tokenizer import load_tokenizer
from helpers.checkpoints import tiny_config
from helpers.golden_run import read_lines, write_golden, write_lines
from helpers.kind_runs import KINDS, write_kind

OPEN = ROOT / "data" / "traces" / "needle-2k" / "2k"
IDS = ("selected_token_pos", "selected_ids")


def compare(a: Path, b: Path, tie: float | None = None) -> Diff:
    return diff(load(a), load(b), tie)


def altered(folder: Path, out: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    """A copy of the run in which `change` has been at the records."""
    shutil.copytree(folder, out)
    records = read_lines(out)
    change(records)
    write_lines(out, records)
    return out


def with_manifest(folder: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(folder, out)
    manifest = json.loads((out / MANIFEST_FILE).read_bytes())
    change(manifest)
    (out / MANIFEST_FILE).write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_golden(tmp_path_factory.mktemp("diff") / "golden")


def swap_one(record: dict[str, Any]) -> tuple[int, int]:
    """Lets one id of the record give way to one that it lacks."""
    ids = next(record[name] for name in IDS if record.get(name))
    new = next(i for i in range(10_000) if i not in ids)
    old, ids[0] = ids[0], new
    return old, new


@pytest.mark.parametrize("name", ["golden", *KINDS])
def test_a_run_is_itself_in_every_format(golden: Path, tmp_path: Path, name: str) -> None:
    folder = golden if name == "golden" else write_kind(tmp_path / "run", name)
    for format_ in ("parquet", "replay"):
        export_run(RunReader(folder), format_, tmp_path / format_)
    for other in (folder, tmp_path / "parquet", tmp_path / "replay"):
        found = compare(folder, other)
        assert (found.num_differing, found.first, found.matched_by) == (0, None, "id")
        assert found.num_rows == len(read_lines(folder))
        assert {layer.overlap for layer in found.layers.values() if layer.rows} == {1.0}


@pytest.mark.parametrize("name", ["golden", *KINDS])
def test_one_altered_id_is_found(golden: Path, tmp_path: Path, name: str) -> None:
    folder = golden if name == "golden" else write_kind(tmp_path / "run", name)
    at = len(read_lines(folder)) * 2 // 3
    swapped: list[tuple[int, int]] = []
    other = altered(folder, tmp_path / "other", lambda records: swapped.append(swap_one(records[at])))
    found, record = compare(folder, other), read_lines(folder)[at]
    assert found.num_differing == 1
    row = found.first
    assert row is not None
    assert (row.request_id, row.layer_id, row.kv_head, row.step_idx) == (
        record["request_id"], record["layer_id"], record.get("kv_head", 0), record["step_idx"]
    )  # fmt: skip
    assert [(row.only_a, row.only_b)] == [([old], [new]) for old, new in swapped]
    size = row.num_shared + 1
    same = [one for one in read_lines(folder) if one["layer_id"] == row.layer_id]
    total = sum(len(next(one[key] for key in IDS if one.get(key) is not None)) for one in same)
    layer = found.layers[row.layer_id]
    assert layer.overlap == pytest.approx((total - 1) / (total + 1))
    by_step = found.overlap_by_step()[row.layer_id, row.step_idx + 1]
    assert (size - 1) / (size + 1) <= by_step < 1


def test_the_first_in_time_is_the_first(golden: Path, tmp_path: Path) -> None:
    """Laid out for replay the records stand by request; the first is still the earliest computed."""

    def change(records: list[dict[str, Any]]) -> None:
        for at in (40, 7, 25):
            swap_one(records[at])

    export_run(RunReader(golden), "replay", tmp_path / "replay")
    found = compare(tmp_path / "replay", altered(golden, tmp_path / "other", change))
    first = read_lines(golden)[7]
    assert found.num_differing == 3 and found.first is not None
    assert (found.first.request_id, found.first.layer_id, found.first.step_idx) == (
        first["request_id"], first["layer_id"], first["step_idx"]
    )  # fmt: skip
    assert [row.forward_idx for row in found.rows] == sorted(row.forward_idx for row in found.rows)


def test_ties_are_told_from_others(golden: Path, tmp_path: Path) -> None:
    """Four altered rows: one id at an exact tie, one at a near one, two at a near one, and one at none."""
    sparse = [i for i, one in enumerate(read_lines(golden)) if one["path"] == "sparse"][:4]

    def margins(records: list[dict[str, Any]]) -> None:
        for at, margin in zip(sparse, (0.0, 0.001, 0.01, 0.5), strict=True):
            records[at] |= {"kth_margin": margin, "scores_stats": {"min": -1.0, "mean": 0.0, "max": 1.0}}

    def change(records: list[dict[str, Any]]) -> None:
        margins(records)
        for at in (*sparse, sparse[2]):
            swap_one(records[at])
        ids = records[sparse[2]]["selected_token_pos"]
        ids[1] = next(i for i in range(100) if i not in ids)

    a, b = altered(golden, tmp_path / "a", margins), altered(golden, tmp_path / "b", change)
    for tie, ties in ((0.0, 1), (0.01, 2), (0.019, 2), (0.02, 3), (0.5, 4)):
        found = compare(a, b, tie)
        assert found.num_differing == 4
        assert sum(layer.ties for layer in found.layers.values()) == ties
    assert compare(a, b).tie == 2.0**-8  # whose numbers nobody knows


def test_rows_of_one_run_count(golden: Path, tmp_path: Path) -> None:
    other = altered(golden, tmp_path / "other", lambda records: records.__delitem__(slice(-5, None)))
    for found in (compare(golden, other), compare(other, golden)):
        assert (found.num_differing, found.first) == (5, None)
        assert found.num_rows == len(read_lines(golden))
    less = altered(
        golden,
        tmp_path / "less",
        lambda records: records.__setitem__(slice(None), [r for r in records if r["request_id"] != "r1"]),
    )
    lost = sum(record["request_id"] == "r1" for record in read_lines(golden))
    for found in (compare(golden, less), compare(less, golden)):
        assert (found.num_differing, found.num_requests) == (lost, 2)


def renamed(folder: Path, out: Path) -> Path:
    def rename(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["request_id"] = f"other {record['request_id']}"

    altered(folder, out, rename)
    lines = [json.loads(line) for line in (out / REQUESTS_FILE).read_bytes().splitlines()]
    rename(lines)
    (out / REQUESTS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return out


def test_other_names_are_matched_by_order(golden: Path, tmp_path: Path) -> None:
    other = renamed(golden, tmp_path / "other")
    records = read_lines(other)
    swap_one(records[30])
    write_lines(other, records)
    found = compare(golden, other)
    assert (found.matched_by, found.num_differing, found.num_requests) == ("order", 1, 3)
    assert found.first is not None and found.first.request_id == read_lines(golden)[30]["request_id"]


def test_what_is_not_the_same_is_refused(golden: Path, tmp_path: Path) -> None:
    def longer(records: list[dict[str, Any]]) -> None:
        records[20]["seq_len_current"] += 1

    def keyed(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["prefix"]["prefix_key"] = "00" * 8

    lines = tmp_path / "lines"
    shutil.copytree(golden, lines)
    text = (lines / REQUESTS_FILE).read_text()
    assert '"num_prompt_tokens":40' in text
    (lines / REQUESTS_FILE).write_text(text.replace('"num_prompt_tokens":40', '"num_prompt_tokens":41'))
    fewer = altered(
        renamed(golden, tmp_path / "renamed"),
        tmp_path / "fewer",
        lambda records: records.__setitem__(slice(None), [r for r in records if "r1" not in r["request_id"]]),
    )
    kinds = {name: write_kind(tmp_path / name, name) for name in ("entry", "slots", "two heads")}
    for other, said in (
        (
            altered(golden, tmp_path / "longer", longer),
            r"not the same tokens: request .*: sees \d+ and \d+ pos",
        ),
        (altered(golden, tmp_path / "keyed", keyed), r"not the same tokens: request 'r1': prompt digest"),
        (lines, r"not the same tokens: request 'r1': prompt tokens 40 and 41"),
        (fewer, r"no request has one id in both, and 3 cannot be matched with 2 by order"),
        (kinds["entry"], r"cannot be compared: unit: token and entry"),
        (kinds["slots"], r"cannot be compared: kind of id: position and slot"),
        (kinds["two heads"], r"cannot be compared: sets of layer 0: 1 and 2"),
        (write_golden(tmp_path / "two", num_layers=2), r"cannot be compared: layers: 3 and 2"),
        (write_golden(tmp_path / "blocks", level="blocks"), r"cannot be compared: level: full and blocks"),
        (
            with_manifest(golden, tmp_path / "none", lambda record: record.update(selections="none")),
            r"no model ran, so there are no selections to compare",
        ),
    ):
        with pytest.raises(UserError, match=said):
            compare(golden, other)
    with pytest.raises(UserError, match="hold no selections"):
        compare(*(write_golden(tmp_path / name, level="stats") for name in ("stats", "stats too")))
    found = compare(*(write_golden(tmp_path / name, level="blocks") for name in ("b", "b too")))
    assert found.num_differing == 0 < found.num_rows


def run_diff(*args: object) -> int:
    return cli.main(["diff", *map(str, args)])


def test_the_command_tells_and_writes(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = altered(golden, tmp_path / "other", lambda records: [swap_one(records[i]) for i in (10, 20)])
    out = tmp_path / "out"
    assert run_diff(golden, other, "--out", out) == 1
    shown = capsys.readouterr().out
    num_rows = len(read_lines(golden))
    assert f"3 requests, matched by id: 2 of {num_rows} rows differ" in shown
    assert "first: request " in shown
    record = json.loads((out / "diff.json").read_bytes())
    assert (record["num_differing"], record["num_rows"], len(record["rows"])) == (2, num_rows, 2)
    assert len(record["overlap_by_step"]) == 3
    assert (out / "diff.png").read_bytes().startswith(b"\x89PNG")
    (grid,) = (part for part in diff_parts(record) if isinstance(part, Grid))
    assert sum(row[2].value for row in grid.rows) == 2  # type: ignore[attr-defined]
    *_, many = diff_parts(record | {"layers": record["layers"] * 30})
    assert isinstance(many, Grid) and "| ... and 26 more in diff.json |" in many.markdown()
    for most, code in (("1", 1), ("2", 0), ("1%", 1), ("99%", 0)):
        assert run_diff(golden, other, "--max-differing", most, "--out", out, "--no-figure") == code
    assert run_diff(golden, golden, "--out", out) == 0
    assert json.loads((out / "diff.json").read_bytes())["first"] is None


def test_a_mistake_is_one_line(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    other = write_golden(tmp_path / "two", num_layers=2)
    for args, said in (
        ((golden, golden, "--max-differing", "many"), "--max-differing many: use a number of rows"),
        ((golden, golden, "--max-differing", "101%"), "--max-differing 101%"),
        ((golden, golden, "--tie", "2"), "--tie 2.0: use a share"),
        ((golden, golden, "--out", tmp_path / "full"), "holds mine.txt"),
        ((golden, golden, "--out", tmp_path / "file"), "is no folder"),
        ((golden, tmp_path / "nothing"), "cannot read it"),
        ((golden, other, "--out", tmp_path / "out"), "layers: 3 and 2"),
    ):
        assert run_diff(*args) == 2
        told = capsys.readouterr()
        assert said in told.err and told.err.count("\n") == 1, told.err
    assert not (tmp_path / "out").exists()
    assert not golden.with_name("golden_diff").exists()


def test_fp32_against_bf16(checkpoint: Path, tmp_path: Path) -> None:
    """One prompt and its first token, which both say. Random weights' scores lie close: ids at ties move."""
    (tmp_path / "prompts.txt").write_text("The lighthouse keeper counted 41 ships. " * 10)
    for name, dtype in (("fp32", "fp32"), ("bf16", "bf16"), ("again", "fp32")):
        (tmp_path / f"of {name}").mkdir()
        config = tiny_config(tmp_path / f"of {name}", dtype=dtype)
        flags = {
            "--ckpt-path": checkpoint,
            "--config": config,
            "--input-file": tmp_path / "prompts.txt",
            "--max-new-tokens": 2,
            "--temperature": 0,
            "--trace-out": tmp_path / name,
            "--trace-prefill": "last",
        }
        given = [str(one) for flag in flags.items() for one in flag]
        assert cli.main(["generate", "--trace-enable", *given]) == 0
    assert compare(tmp_path / "fp32", tmp_path / "again").num_differing == 0
    found = compare(tmp_path / "fp32", tmp_path / "bf16")
    assert found.tie == 2.0**-8
    first = found.first
    assert first is not None and (first.layer_id, first.step_idx) == (0, -1)
    assert len(first.only_a) == len(first.only_b) == 1 and first.is_tie(2.0**-7)
    overlaps = [layer.overlap or 0 for layer in found.layers.values()]
    assert 1 > overlaps[0] > 0.9 and overlaps[0] > overlaps[3] > 0.4  # what differs adds up over the layers


TALE = (
    "The lighthouse keeper counted 41 ships, and wrote their names into the book that nobody but him had "
    "ever read; then he slept until the morning came."
)


def test_the_engine_against_transformers(tiny_checkpoint: Path, tiny_hf: Path, tmp_path: Path) -> None:
    """One checkpoint, two doors, without the released model's roundings, which transformers does not have.

    The last of 129 prompt rows is the first that leaves an id out, so that every row which can meet a tie is
    recorded. A request's first difference must be a tie; what comes after it may be its consequence.
    """
    parts = (TALE[at : at + 125] for at in range(len(TALE) - 124))
    texts = [part for part in parts if part == part.strip()][:4]
    (tmp_path / "prompts.txt").write_text("\n\n".join(texts))
    num_tokens = 32
    flags = ("--config", tiny_config(tmp_path, **PLAIN_NUMERICS), "--max-new-tokens", num_tokens)
    paths = ("--ckpt-path", tiny_checkpoint, "--input-file", tmp_path / "prompts.txt", "--temperature", 0)
    traced = ("--ignore-eos", "--trace-out", tmp_path / "engine", "--trace-prefill", "last")
    assert cli.main(["generate", *map(str, (*flags, *paths, *traced))]) == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32)
    tokenizer = load_tokenizer(tiny_checkpoint)
    with dsatrace.attach(model, tmp_path / "attached", prefill="last", selections="random_weights"):
        for one in texts:
            ids = torch.tensor([encode_chat([Message("user", one)], tokenizer)])
            assert ids.shape == (1, 129)
            lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
    found = compare(tmp_path / "engine", tmp_path / "attached")
    assert (found.num_requests, found.num_rows, found.tie) == (4, 4 * num_tokens * 4, 2.0**-20)
    first = {row.request_id: row for row in reversed(found.rows)}
    assert all(row.is_tie(found.tie) for row in first.values()), first
    assert found.num_differing < found.num_rows / 20
    paths_taken = load(tmp_path / "attached").records.to_arrow(["path"])["path"].to_pylist()
    assert paths_taken == ["sparse"] * found.num_rows


def test_a_cache_in_fp8_is_coarser(golden: Path, tmp_path: Path) -> None:
    def with_fp8(manifest: dict[str, Any]) -> None:
        manifest["model_config"] |= {"dtype": "fp32", "index_fp8": True}

    def in_fp32(manifest: dict[str, Any]) -> None:
        manifest["model_config"] |= {"dtype": "torch.float32"}

    def with_fp8_latents(manifest: dict[str, Any]) -> None:
        manifest["model_config"] |= {"dtype": "fp32", "latent_fp8": True}

    fp8 = with_manifest(golden, tmp_path / "fp8", with_fp8)
    latents = with_manifest(golden, tmp_path / "latents", with_fp8_latents)
    fp32 = with_manifest(golden, tmp_path / "fp32", in_fp32)
    assert compare(fp8, fp32).tie == compare(latents, fp32).tie == 2.0**-4
    assert compare(fp8, fp8).tie == compare(fp32, fp32).tie == 2.0**-20


def test_the_open_trace_is_itself() -> None:
    found = compare(OPEN, OPEN)
    assert (found.num_rows, found.num_differing, found.num_requests) == (2080, 0, 8)
    assert np.all(found.overlap_by_step() == 1)
