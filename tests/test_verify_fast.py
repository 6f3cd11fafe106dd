"""The fast derivation says "right" only where the plain one does, and adds up the same totals."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace.errors import UserError
from dsatrace.schema import LEVELS, MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE
from dsatrace.trace.export import export_run
from dsatrace.trace.kind import Layer, SelectionKind
from dsatrace.trace.manifest import TierSettings
from dsatrace.trace.parquet import file as parquet_file
from dsatrace.trace.reader import RunReader
from dsatrace.verify import fast, steps
from dsatrace.verify.check_record import check_record
from dsatrace.verify.check_tiers import Selected
from dsatrace.verify.chosen import Chosen, FastSelected
from dsatrace.verify.fast import Checked, ChunkChecks, JsonSteps, checked_chunks
from dsatrace.verify.fast_summary import FastOverlaps, FastSummary
from dsatrace.verify.files import PlainRun
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.plain_summary import PlainSummary
from dsatrace.verify.requests import PlainRequests, RequestLine
from dsatrace.verify.rules import Rules
from dsatrace.verify.run import verify
from helpers.golden_run import REQUESTS, GoldenRequest, read_lines, write_golden, write_lines
from helpers.kind_runs import KINDS as KINDS_OF_RUNS
from helpers.kind_runs import write_kind
from helpers.tier_samples import SETUPS
from test_verify import SHARED, VARIANTS, leaves, spoilt
from test_verify_tiers import altered

KINDS: dict[str, dict[str, Any]] = {
    **{level: {"level": level} for level in LEVELS},
    "scores": {"store_scores": True},
    "scores in order": {"store_scores": True, "keep_order": True},
    "shared layers": {"num_layers": 4, "shared_layers": SHARED},
    "sampled": {"sample_rate": 0.5, "seed": 3},
    "no prefill": {"prefill": "off"},
    **{f"tiers, {name}": {"tiers": setup} for name, setup in SETUPS.items()},
}
DOORS: dict[str, SelectionKind] = {
    "uneven layers, no timing or prefix": KINDS_OF_RUNS["uneven layers"],
    "attached, sets that hold fewer, a shared layer": SelectionKind(
        (Layer(8), Layer(8, source_layer=0), Layer(6)), door="attach", missing=("scores",)
    ),
    "imported, without scores, times and tiers": SelectionKind(
        (Layer(8), Layer(8)), door="import", missing=("scores", "timing", "tiers", "prefix")
    ),
}
"""Other doors whose ids are token positions."""
BLOCK_SIZES = (16, 32, 64)
STRIDE = int(os.environ.get("DSATRACE_SPOILT_STRIDE", "13"))  # every so many records are spoilt
LONG = (*REQUESTS, GoldenRequest("r3", 300, 20, 9, needle_positions=(0, 1, 17, 290)))


def checks_of(folder: Path) -> ChunkChecks:
    rules = Rules.of(json.loads((folder / MANIFEST_FILE).read_bytes()))
    known = {
        line["request_id"]: RequestLine(
            number,
            line["num_prompt_tokens"],
            line["num_output_tokens"],
            line["state"],
            tuple(line.get("needle_positions", ())),
        )
        for number, line in PlainRun(folder).lines(REQUESTS_FILE)
    }
    return ChunkChecks(
        PlainRun(folder).parquet_steps or JsonSteps(folder / STEPS_FILE),
        rules,
        known,
        BLOCK_SIZES,
        since_forward=0,
    )


def found_in(checks: ChunkChecks, size: int) -> Iterator[Checked]:
    for chunk in checks.steps.chunks(size):
        found = checks.check(chunk)
        assert found is not None, chunk
        yield found


def write_run(folder: Path, kind: str) -> Path:
    if kind in KINDS:
        return write_golden(folder, LONG, sealed=True, **KINDS[kind])
    return write_kind(folder, kind, kind=DOORS[kind])


@pytest.mark.parametrize("kind", [*KINDS, *DOORS])
def test_chunks_of_any_size_add_up_to_the_plain_totals(tmp_path: Path, kind: str) -> None:
    folder = write_run(tmp_path / "run", kind)
    checks, records = checks_of(folder), read_lines(folder)
    rules = checks.rules
    plain = PlainSummary(
        top_k=rules.top_k,
        block_sizes=BLOCK_SIZES,
        level=rules.level,
        offloaded=rules.tiers is not None,
        kind=rules.selections,
    )
    for record in records:
        plain.add(record)
    expected = plain.to_json(PlainRequests())
    for size in (1, 3000, 1 << 20):
        totals = FastSummary(rules, BLOCK_SIZES)
        num_lines = 0
        for found in found_in(checks, size):
            totals.merge(found.totals)
            num_lines += found.num_lines
            assert len(found.rows) * rules.num_layers == found.num_lines
        assert num_lines == len(records)
        assert totals.to_json(PlainRequests()) == expected
    num_forwards = len({record["forward_idx"] for record in records})
    assert len(list(checks.steps.chunks(1))) == num_forwards
    said = verify(folder)
    assert said == verify(folder, plain=True)

    in_parquet = tmp_path / "parquet"
    export_run(RunReader(folder), "parquet", in_parquet)
    totals = FastSummary(rules, BLOCK_SIZES)
    for found in found_in(checks_of(in_parquet), 1):
        totals.merge(found.totals)
    assert totals.to_json(PlainRequests()) == expected
    assert len(list(checks_of(in_parquet).steps.chunks(1))) == num_forwards
    assert verify(in_parquet) == verify(in_parquet, plain=True) == said


@pytest.mark.parametrize(
    "variant",
    [VARIANTS[0], VARIANTS[-1], *({"tiers": setup} for setup in SETUPS.values())],
    ids=["full", "scores in order", *SETUPS],
)
def test_no_spoilt_record_is_called_right(tmp_path: Path, variant: dict[str, Any]) -> None:
    """It may call a right one wrong, which only costs time; here it calls none of the unspoilt so."""
    folder = write_golden(tmp_path / "run", LONG, **variant)
    checks, num_bad = checks_of(folder), 0
    needles = {request.request_id: request.needle_positions for request in LONG}
    for record in read_lines(folder)[::STRIDE]:
        assert checks.derive(record) is not None
        for path in leaves("full"):
            of_tiers = "tiers" in variant and path.startswith("kv_fetch.")
            for bad in (altered if of_tiers else spoilt)(record, path):
                try:
                    check_record(bad, checks.rules, needles)
                except Mismatch:
                    num_bad += 1
                    assert not _is_called_right(checks, bad), path
    assert num_bad > 7000 // STRIDE


@pytest.mark.parametrize("kind", DOORS)
def test_no_spoilt_record_of_another_door_is_called_right(tmp_path: Path, kind: str) -> None:
    folder = write_run(tmp_path / "run", kind)
    checks, num_bad = checks_of(folder), 0
    needles = checks._needles
    for record in read_lines(folder)[::7]:
        assert checks.derive(record) is not None
        for path in leaves("full"):
            for bad in spoilt(record, path) if _holds(record, path) else ():
                try:
                    check_record(bad, checks.rules, needles)
                except Mismatch:
                    num_bad += 1
                    assert not _is_called_right(checks, bad), path
    assert num_bad > 100


def _holds(record: dict[str, Any], path: str) -> bool:
    """Whether the door tells what the field is part of."""
    return record.get(path.partition(".")[0]) is not None


def _is_called_right(checks: ChunkChecks, record: dict[str, Any]) -> bool:
    try:
        return checks.derive(record) is not None
    except (Mismatch, *fast.LOOK_AGAIN):
        return False


@pytest.mark.parametrize("name", ["selected_token_pos", "selected_block_ids"])
def test_true_is_no_position(tmp_path: Path, name: str) -> None:
    """Python's True equals 1, and JSON's true does not."""
    folder = write_golden(tmp_path / "run", [GoldenRequest("r0", 6, 6)])
    checks, record = checks_of(folder), read_lines(folder)[-1]
    assert record[name][1] == 1
    assert checks.derive(record) is not None
    assert not _is_called_right(checks, record | {name: [record[name][0], True, *record[name][2:]]})


@pytest.mark.parametrize("tiers", [None, SETUPS["block"]], ids=["in HBM", "tiers"])
def test_the_ends_of_every_request_and_a_sample_go_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiers: TierSettings | None
) -> None:
    folder = write_golden(tmp_path / "run", LONG, tiers=tiers)
    seen = []

    def check(record: dict[str, Any], *others: Any) -> None:
        seen.append((record["request_id"], record["step_idx"]))
        check_record(record, *others)

    monkeypatch.setattr(fast, "check_record", check)
    verify(folder)
    ends = {(request.request_id, step) for request in LONG for step in (-1, request.num_output_tokens - 2)}
    num_records = len(read_lines(folder))
    assert ends <= set(seen)
    assert len(seen) < num_records / 2  # the others were derived in numpy
    seen.clear()
    monkeypatch.setattr(fast, "SAMPLE", 1)
    verify(folder)
    assert len(seen) == num_records


def test_the_last_records_of_unfinished_requests_go_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_golden(tmp_path / "run", LONG)
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"state": "incomplete"}))
    (folder / SUMMARY_FILE).unlink()
    records = read_lines(folder)
    write_lines(folder, records[: -2 * 3])
    (folder / REQUESTS_FILE).write_text("")
    seen = []
    monkeypatch.setattr(steps, "check_record", lambda record, *others: seen.append(record))
    verify(folder)
    last = {record["request_id"]: record["step_idx"] for record in records[: -2 * 3]}
    assert {(record["request_id"], record["step_idx"]) for record in seen} == set(last.items())
    assert len(seen) == len(last) * checks_of(folder).rules.num_layers


def test_rows_walked_plainly_are_not_looked_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_golden(tmp_path / "run", LONG)
    monkeypatch.setattr(fast, "CHUNK_BYTES", 20_000)
    source = JsonSteps(folder / STEPS_FILE)
    *_, last = source.chunks(fast.CHUNK_BYTES)
    check = ChunkChecks.check
    monkeypatch.setattr(
        ChunkChecks, "check", lambda self, chunk: None if chunk == last else check(self, chunk)
    )
    seen = []
    monkeypatch.setattr(steps, "check_record", lambda record, *others: seen.append(record))
    verify(folder)
    assert seen == [record for _, record in source.records(last)]


@pytest.mark.parametrize("group_records", [1 << 14, 5])
def test_parquet_is_read_as_its_lines_and_named_by_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_records: int
) -> None:
    monkeypatch.setattr(parquet_file, "GROUP_RECORDS", group_records)
    folder = write_golden(tmp_path / "run", LONG, store_scores=True)
    records = read_lines(folder)
    for i in (0, 4, len(records) - 1):
        bad = records[i] | {"unique_blocks": records[i]["unique_blocks"] + 1, "unknown": [1]}
        write_lines(folder, [*records[:i], bad, *records[i + 1 :]])
        out = tmp_path / f"parquet{i}"
        export_run(RunReader(folder), "parquet", out)
        steps = PlainRun(out).parquet_steps
        assert steps is not None
        assert [record for _, record in steps.records((0, steps.num_records))] == read_lines(folder)
        assert [row for row, _ in steps.records((3, 9))] == list(range(3, 9))
        for plain in (True, False):
            with pytest.raises(Mismatch, match=f"trace_steps.parquet record {i + 1} .*unique_blocks: stored"):
                verify(out, plain=plain)
    (out / "trace_steps.parquet").write_bytes(b"PAR1" * 9)
    with pytest.raises(UserError, match=r"not a whole Parquet file.*export the run again"):
        verify(out)


def test_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_golden(tmp_path / "run", LONG)
    monkeypatch.setattr(fast, "CHUNK_BYTES", 20_000)
    sizes = []
    assert verify(folder, sizes.append, jobs=2) == verify(folder)
    assert sum(sizes) == (folder / STEPS_FILE).stat().st_size
    assert len(sizes) > 4
    checks = checks_of(folder)
    for (_, one), (_, two) in zip(checked_chunks(checks, 1), checked_chunks(checks, 2), strict=True):
        assert one is not None
        assert two is not None
        assert one.rows == two.rows
        assert one.totals.to_json(PlainRequests()) == two.totals.to_json(PlainRequests())
    records = read_lines(folder)
    for i in (3, len(records) // 2, len(records) - 1):
        bad = records[i] | {"unique_blocks": records[i]["unique_blocks"] + 1}
        write_lines(folder, [*records[:i], bad, *records[i + 1 :]])
        with pytest.raises(Mismatch, match=f"line {i + 1} .*unique_blocks: stored"):
            verify(folder, jobs=2)


@pytest.mark.parametrize("damage", [b"{", b"[1]\n", b"\xff\n", b"[" * 100_000 + b"\n", b'{"event":NaN}\n'])
def test_damage_is_named_as_the_plain_implementation_names_it(tmp_path: Path, damage: bytes) -> None:
    folder = write_golden(tmp_path / "run", LONG)
    path = folder / STEPS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    for i in (0, 5, len(lines)):
        path.write_bytes(b"".join([*lines[:i], damage, *lines[i:]]))
        said = []
        for plain in (True, False):
            with pytest.raises(Mismatch) as found:
                verify(folder, plain=plain)
            said.append(str(found.value))
        assert said[0] == said[1]
        assert f"line {i + 1}" in said[0]


def test_shares_are_counted_alike(tmp_path: Path) -> None:
    """Selections with and without a common part, against sets."""
    overlaps = FastOverlaps(with_tokens=True)
    rng = np.random.default_rng(0)
    for first, second in itertools.pairwise(
        [np.sort(rng.choice(n, 8, replace=False)) for n in (9, 500, 20, 8)]
    ):
        shared = overlaps.num_shared(first.astype(np.int32), second.astype(np.int32))
        assert shared == len({*first.tolist()} & {*second.tolist()})


def test_bounds_of_a_selection_are_alike() -> None:
    """Tokens in blocks, runs and units, for every number of them, against loops."""
    rng = np.random.default_rng(0)
    for size, num, visible in ((1, 5, 5), (4, 1, 9), (4, 30, 60), (16, 64, 900), (3, 40, 41)):
        positions = np.sort(rng.choice(visible, num, replace=False))
        chosen = Chosen.of(positions, size)
        blocks, tokens = chosen.blocks.tolist(), positions.tolist()
        assert blocks == sorted({position // size for position in tokens})
        assert chosen.in_block.tolist() == [sum(p // size == block for p in tokens) for block in blocks]
        plain = Selected(num, len(blocks), size, 1152, 0, tokens, blocks)
        quick = FastSelected(num, len(blocks), size, 1152, 0, None, None, chosen)
        for by_row, num_all in ((False, len(blocks)), (True, num)):
            for hit in range(num_all + 1):
                assert quick.runs_of(hit, by_row) == plain.runs_of(hit, by_row)
        for hit in range(len(blocks) + 1):
            assert quick.tokens_of(hit) == plain.tokens_of(hit)
        assert [quick.num_units(n) for n in (1, 2, 7)] == [plain.num_units(n) for n in (1, 2, 7)]
