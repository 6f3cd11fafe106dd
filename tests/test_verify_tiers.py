"""`dsatrace verify` finds what was spoilt in the accounts of tiers, and in what a run says of the stores."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsatrace.errors import UserError
from dsatrace.files import write_json
from dsatrace.schema import LEVELS, OFFLOADED_FETCH, REQUESTS_FILE, STEPS_FILE, TIER_NAMES
from dsatrace.trace.summarize import summarize_runs
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from helpers.damage import overwrite
from helpers.golden_run import REQUESTS, read_lines, write_golden, write_lines
from helpers.json_edits import at, changed, key_paths, number_paths
from helpers.memory_run import MemoryRun
from helpers.tier_samples import LATENT, SETUPS
from test_verify import leaves, spoilt

VARIANTS = [("block", "full"), ("row", "full"), ("half a block", "blocks"), ("block of two", "stats")]
POOLS = TIER_NAMES[1:]
# The engine's word, held within what is possible; the summary's totals notice the rest, not in which record.
ONLY_IN_TOTAL = {
    *("kv_fetch.hbm.evicted_units", "kv_fetch.hbm.read_ops"),
    *(
        f"kv_fetch.{pool}.{name}"
        for pool in POOLS
        for name in ("bytes_useful", "bytes_written", "errors", "evicted_units", "read_ops")
    ),
}
# A clock's, so only another request of the same forward can contradict it.
OF_THE_CLOCK = {f"kv_fetch.{pool}.latency_us" for pool in POOLS}


def altered(record: dict[str, Any], path: str) -> Iterator[dict[str, Any]]:
    """What `spoilt` makes, and whole tokens and units more or less."""
    yield from spoilt(record, path)
    where = path.split(".")
    value = at(record, where)
    for change in (LATENT, -LATENT, 4 * LATENT, -4 * LATENT) if isinstance(value, int) else ():
        yield changed(record, where, value + change)


@pytest.mark.parametrize(("name", "level"), VARIANTS)
def test_every_spoilt_field_of_a_tier_is_found(tmp_path: Path, name: str, level: str) -> None:
    run = MemoryRun(write_golden(tmp_path / "run", level=level, tiers=SETUPS[name]))
    records = run.records
    paths = [path for path in leaves(level) if path.startswith("kv_fetch.")]
    assert len(paths) == 3 * 15
    for i in (0, len(records) // 2, len(records) - 1):  # a prefill by itself, decode of three and of two
        caught, unnamed, missed = set(), set(), set()
        for path in paths:
            for record in altered(records[i], path):
                said = run.found_in(i, record)
                if not said:
                    missed.add(path)
                else:
                    caught.add(path)
                    unnamed |= {path} if f"{STEPS_FILE} line {i + 1} " not in said else set()
        assert caught == set(paths)
        assert unnamed <= ONLY_IN_TOTAL
        assert missed <= (OF_THE_CLOCK if i == 0 else set())
    assert run.num_whole_way > 20


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["block", "row"])
def test_what_a_lone_request_missed_is_what_was_fetched(tmp_path: Path, name: str, level: str) -> None:
    """Its totals made to fit again, so that only the record itself can say that a unit is missing."""
    folder = write_golden(tmp_path / "run", REQUESTS[1:2], level=level, tiers=SETUPS[name])
    records, unit_bytes = read_lines(folder), SETUPS[name].unit_bytes
    pool = list(SETUPS[name].pools)[-1]
    line = next(i for i, r in enumerate(records) if r["step_idx"] >= 0 and r["kv_fetch"][pool]["bytes_read"])
    for field, change in (("bytes_read", unit_bytes), ("bytes_read", -unit_bytes), ("bytes_useful", -LATENT)):
        spoilt = copy.deepcopy(records)
        spoilt[line]["kv_fetch"][pool][field] += change
        if field == "bytes_read":
            spoilt[line]["kv_fetch"]["hbm"]["bytes_written"] += change
        write_lines(folder, spoilt)
        write_json(folder / "summary.json", summarize_runs([folder]))
        with pytest.raises(Mismatch, match=rf"line {line + 1} .*{pool}\.{field}: stored \d+, derived"):
            verify(folder)


def test_a_chain_moved_to_another_tier_is_found(tmp_path: Path) -> None:
    """The whole chain moved alike, from HBM to a pool: a block of a cache has all its tokens in one place."""
    folder = write_golden(tmp_path / "run", tiers=SETUPS["block of two"])
    records = read_lines(folder)
    line = next(i for i, r in enumerate(records) if r["kv_fetch"]["hbm"]["hit_blocks"] == 1)
    hbm, local = (records[line]["kv_fetch"][name] for name in TIER_NAMES[:2])
    moved = hbm["hit_tokens"]
    for tier, change in ((hbm, -moved), (local, moved)):
        tier["hit_tokens"] += change
    hbm["missed_tokens"] += moved
    local["requested_tokens"] += moved
    hbm["bytes_useful"] = 0
    write_lines(folder, records)
    with pytest.raises(Mismatch, match=rf"line {line + 1} .*kv_fetch\.hbm\.hit_tokens: stored 0, derived 1"):
        verify(folder)


def rewritten(folder: Path, name: str, where: tuple[str, ...], value: Any) -> str:
    """Puts the value there and returns what verify says."""
    whole = json.loads((folder / name).read_text())
    overwrite(folder / name, json.dumps(changed(whole, where, value)).encode())
    try:
        verify(folder)
        return ""
    except (Mismatch, UserError) as found:
        return str(found)
    finally:
        overwrite(folder / name, json.dumps(whole).encode())


# Counted by the stores alone, and nowhere else.
UNHELD = {"corrupt_units", "read_batches", "read_ops", "read_us", "write_batches", "write_us"}
UNHELD |= {"evicted_units", "errors", "timeouts", "skipped_batches", "retries", "bytes_moved"}
UNHELD |= {"prefetch", "lost_units"}


def test_totals_of_the_stores_add_up(tmp_path: Path) -> None:
    run = MemoryRun(write_golden(tmp_path / "run", tiers=SETUPS["block"]))
    said, free = run.said["tiers"], set()
    for where in number_paths(said):
        found = run.found(summary=changed(run.said, ("tiers", *where), at(said, where) + 1))
        if found:
            assert found.startswith("summary.json: tiers.")
        else:
            free |= {next((key for key in where if key in UNHELD), where[-1])}
        assert run.found(summary=changed(run.said, ("tiers", *where), -1))
    assert free == UNHELD


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("since_forward",), 1, "tiers.since_forward: stored 1, derived 0"),
        (("remote_pool",), None, "tiers.remote_pool"),
        (("local_pool", "latency_kind"), "modelled", "tiers.local_pool.latency_kind"),
        (("local_pool", "timeouts"), 10**6, "more than errors"),
        (("local_pool", "skipped_batches"), 10**6, "more than the errors"),
        (("local_pool", "bytes_moved"), 0, "bytes_moved"),
        (("index_keys",), {"local_pool": None, "remote_pool": None}, "tiers.index_keys"),
        (("prefetch", "precision"), 1.5, "tiers.prefetch.precision"),
        (("prefetch", "used_units"), 10, "of 9 units"),
        (("num_recomputes",), 0, "tiers.num_recomputes: stored 0, derived"),
        (("failed_requests",), 1, "tiers.failed_requests: stored 1, derived 0 to 0"),
    ],
)
def test_an_impossible_word_on_the_stores_is_found(
    tmp_path: Path, where: tuple[str, ...], value: Any, said: str
) -> None:
    folder = write_golden(tmp_path / "run", tiers=SETUPS["block"])
    assert said in rewritten(folder, "summary.json", ("tiers", *where), value)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("granularity",), "page", "tiers.granularity"),
        (("granularity",), "row", "tiers.unit_tokens: stored 4, no size of a row"),
        (("unit_bytes",), 4000, "tiers.unit_bytes: stored 4000, derived 4608"),
        (("unit_tokens",), 8, "tiers.unit_bytes"),
        (("on_error",), "stop", "tiers.on_error"),
        (("hbm", "blocks"), 0, "tiers.hbm.blocks"),
        (("local_pool", "blocks"), 0, "tiers.local_pool.blocks"),
        (("local_pool", "latency_kind"), "none", "tiers.local_pool.latency_kind"),
        (("remote_pool", "latency_kind"), "measured", "kv_fetch.remote_pool.latency_kind"),
        (("remote_pool",), None, "kv_fetch.local_pool.hit_tokens"),
        ((), None, "kv_fetch.hbm.requested_tokens: stands there, and the manifest has no tiers"),
    ],
)
def test_an_edited_setup_is_found(tmp_path: Path, where: tuple[str, ...], value: Any, said: str) -> None:
    folder = write_golden(tmp_path / "run", tiers=SETUPS["block"])
    if not where:  # nor do the requests say what only a run with tiers says
        lines = [line | {} for line in read_lines(folder, REQUESTS_FILE)]
        for line in lines:
            del line["num_recomputes"]
        write_lines(folder, lines, REQUESTS_FILE)
    assert said in rewritten(folder, "manifest.json", ("tiers", *where), value)


@pytest.mark.parametrize("name", ["manifest.json", "summary.json"])
def test_nothing_broken_makes_a_traceback(tmp_path: Path, name: str) -> None:
    folder = write_golden(tmp_path / "run", tiers=SETUPS["block"])
    run = MemoryRun(folder)
    tiers = json.loads((folder / name).read_text())["tiers"]
    for where in key_paths(tiers):
        for value in (None, [], {}, -1, 1.5, "x", [None]):
            if name == "summary.json":
                said = run.found(summary=changed(run.said, ("tiers", *where), value))
            else:
                said = rewritten(folder, name, ("tiers", *where), value)
            assert said.count("\n") == 0


def test_fields_of_tiers_stand_where_there_are_tiers(tmp_path: Path) -> None:
    with_tiers = write_golden(tmp_path / "with", tiers=SETUPS["block"])
    records = read_lines(with_tiers)
    for field in OFFLOADED_FETCH:
        write_lines(with_tiers, changed(records, (7, "kv_fetch", "remote_pool", field), ...))
        with pytest.raises(Mismatch, match=rf"line 8 .*kv_fetch\.remote_pool\.{field}: .*missing"):
            verify(with_tiers)
    without = write_golden(tmp_path / "without")
    records = read_lines(without)
    records[7]["kv_fetch"]["remote_pool"]["errors"] = 0
    write_lines(without, records)
    with pytest.raises(Mismatch, match=r"line 8 .*remote_pool\.errors: stands there"):
        verify(without)
    assert "tiers: stored" in rewritten(
        write_golden(tmp_path / "said"), "summary.json", ("tiers",), read_summary(with_tiers)["tiers"]
    )


def read_summary(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return record


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": "failed"}, "error: .*says why"),
        ({"num_recomputes": -1}, "num_recomputes: stored -1, below 0"),
        ({"num_recomputes": None}, "num_recomputes"),
    ],
)
def test_an_edited_request_is_found(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = write_golden(tmp_path / "run", tiers=SETUPS["block"])
    write_lines(folder, [line | change for line in read_lines(folder, REQUESTS_FILE)], REQUESTS_FILE)
    with pytest.raises(Mismatch, match=said):
        verify(folder)


def test_only_a_run_with_tiers_loses_something_with_them(tmp_path: Path) -> None:
    folder = write_golden(tmp_path / "run")
    lines = read_lines(folder, REQUESTS_FILE)
    for change, said in (({"num_recomputes": 0}, "num_recomputes"), ({"state": "failed"}, "state")):
        write_lines(folder, [line | change for line in lines], REQUESTS_FILE)
        with pytest.raises(Mismatch, match=f"{said}: .*the manifest has no tiers"):
            verify(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"state": "incomplete"}, "steps were lost"), ({"queue_policy": "drop"}, "steps were lost")],
)
def test_lost_steps_leave_the_stores_unchecked(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = write_golden(tmp_path / "run", tiers=SETUPS["block"], **changes)
    write_lines(folder, [record for record in read_lines(folder) if record["step_idx"] != 1])
    stored = read_summary(folder)
    record = summarize_runs([folder]) | {"dropped_steps": 1, "state": stored["state"]}
    write_json(folder / "summary.json", record)
    assert any(said in note for note in verify(folder).notes)
    write_json(folder / "summary.json", record | {"tiers": None})
    assert any("did not say" in note for note in verify(folder).notes)
