"""What stores are made of: checksums, the ledger of keys, the server's replies, specs and presets."""

from __future__ import annotations

import dataclasses
import importlib
import json
import socket
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.cli import main
from dsatrace.errors import UserError
from dsatrace.kv.stores.calibration import Sample, fit
from dsatrace.kv.stores.checksums import copy_units, sum_units
from dsatrace.kv.stores.interface import StoreStats, unit_keys
from dsatrace.kv.stores.ledger import FIRST_SLOTS, Ledger
from dsatrace.kv.stores.opening import STORES, open_store
from dsatrace.kv.stores.resp import NIL, Address, Connection
from dsatrace.kv.stores.simulated import PRESETS, Figure, Preset, load_preset
from dsatrace.kv.stores.valkey import parse_spec
from helpers.stores import units

UNIT_BYTES = st.sampled_from([1, 3, 8, 33, 132, 576, 656, 1152])


def sums_of(buffer: np.ndarray, keys: np.ndarray | None = None) -> np.ndarray:
    keys = np.zeros(len(buffer), np.uint64) if keys is None else keys
    sums = np.empty(len(buffer), dtype=np.uint64)
    sum_units(buffer, np.arange(len(buffer)), keys, sums)
    return sums


@given(UNIT_BYTES, st.data())
def test_a_checksum_sees_any_change_within_a_word(unit_bytes, data):
    unit = units(1, unit_bytes, seed=data.draw(st.integers(0, 1000)))
    word = 8 if unit_bytes % 8 == 0 else 4 if unit_bytes % 4 == 0 else 1
    place = data.draw(st.integers(0, unit_bytes // word - 1)) * word
    change = data.draw(st.binary(min_size=word, max_size=word).filter(any))
    altered = unit.copy()
    altered[0, place : place + word] ^= np.frombuffer(change, dtype=np.uint8)
    assert sums_of(unit) != sums_of(altered)


def test_a_checksum_sees_what_goes_wrong_with_units():
    unit = units(1, 656)
    swapped = unit.reshape(-1, 8)[::-1].reshape(1, 656).copy()
    top_bits = unit.copy()
    top_bits[0, [7, 15]] ^= 128  # two changes that would cancel in a plain weighted sum
    shifted = np.roll(unit, 8, axis=1)
    for altered in (swapped, top_bits, shifted, np.zeros_like(unit)):
        assert sums_of(unit) != sums_of(altered)
    zeros = np.zeros((100, 656), dtype=np.uint8)
    assert len(set(sums_of(zeros, np.arange(100, dtype=np.uint64)).tolist())) == 100
    assert 0 not in sums_of(zeros, np.arange(100, dtype=np.uint64))


@given(UNIT_BYTES, st.integers(0, 4))
def test_a_copy_brings_its_checksum(unit_bytes, padding_words):
    source = units(20, unit_bytes)
    padded = np.full((20, unit_bytes + 8 * padding_words), 7, dtype=np.uint8)
    keys = np.arange(20, dtype=np.uint64)
    sums, back_sums = np.empty((2, 20), dtype=np.uint64)
    order = np.random.default_rng(0).permutation(20)
    copy_units(source, order, padded, np.arange(20), keys, sums)
    assert (padded[:, :unit_bytes] == source[order]).all()
    assert (padded[:, unit_bytes:] == 7).all()
    back = np.zeros_like(source)
    copy_units(padded, np.arange(20), back, order, keys, back_sums)
    assert (back == source).all()
    assert (sums == back_sums).all()
    assert (sums == sums_of(source[order].copy(), keys)).all()


KEY = st.one_of(st.integers(0, 20), st.sampled_from([2**32, 2**48, 2**63, 2**64 - 1]))
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["take", "free"]), st.lists(KEY, unique=True, max_size=12)), max_size=20
)


@settings(deadline=None)
@given(OPERATIONS, st.integers(1, 10))
def test_a_ledger_equals_a_dictionary(operations, capacity):
    ledger, plain = Ledger(capacity), {}
    every = np.array([*range(21), 2**32, 2**48, 2**63, 2**64 - 1], dtype=np.uint64)
    for operation, chosen in operations:
        keys = np.array(chosen, dtype=np.uint64)
        if operation == "take":
            slots = ledger.take(keys).tolist()
            for key, slot in zip(chosen, slots, strict=True):
                if key in plain or len(plain) < capacity:
                    assert slot == plain.setdefault(key, slot)
                else:
                    assert slot == -1
        else:
            ledger.free(keys)
            for key in chosen:
                plain.pop(key, None)
        assert ledger.find(every).tolist() == [plain.get(int(key), -1) for key in every]
        assert len(set(plain.values())) == len(plain) == len(ledger)
        assert set(ledger.keys().tolist()) == set(plain)


def test_a_ledger_without_a_bound_grows_and_remembers():
    ledger = Ledger(None)
    keys = unit_keys(60, np.arange(5 * FIRST_SLOTS))
    for part in np.array_split(keys, 7):
        slots = ledger.take(part)  # first of all: it may grow
        ledger.sums[slots] = part * np.uint64(3)
    slots = ledger.find(keys)
    assert len(np.unique(slots)) == len(keys)
    assert (ledger.sums[slots] == keys * np.uint64(3)).all()


def test_keys_keep_layers_apart():
    keys = np.concatenate([unit_keys(layer, np.arange(100)) for layer in range(61)])
    assert len(np.unique(keys)) == 6100
    assert unit_keys(3, np.empty(0, dtype=int)).shape == (0,)
    for layer, ids in ((-1, [0]), (1 << 16, [0]), (0, [1 << 48]), (0, [-1])):
        with pytest.raises(ValueError, match=r"do(es)? not fit"):
            unit_keys(layer, np.array(ids))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.one_of(st.none(), st.binary(max_size=40)), min_size=1, max_size=30),
    st.lists(st.integers(1, 50), min_size=1, max_size=10),
)
def test_a_reply_is_parsed_however_it_arrives(values, chunk_sizes):
    """The values' places are the same whatever pieces the network makes of the reply."""
    body = b"".join(b"$-1\r\n" if v is None else b"$%d\r\n%s\r\n" % (len(v), v) for v in values)
    reply = b"*%d\r\n" % len(values) + body
    ours, theirs = socket.socketpair()

    def send() -> None:
        theirs.recv(100)
        sent = 0
        for turn in range(len(reply)):
            if sent >= len(reply):
                break
            size = chunk_sizes[turn % len(chunk_sizes)]
            theirs.sendall(reply[sent : sent + size])
            sent += size

    thread = threading.Thread(target=send)
    thread.start()
    connection = Connection(Address("here"), timeout_s=5)
    connection._socket = ours
    raw, begins, lengths = connection.values(np.zeros(1, np.uint8), len(values), likely_bytes=1)
    thread.join()
    theirs.close()
    connection.close()
    found = [
        None if length == NIL else raw[begin : begin + length].tobytes()
        for begin, length in zip(begins, lengths, strict=True)
    ]
    assert found == values


def test_addresses():
    full = parse_spec("redis://me:p%40ss@host:7000/4")[0]
    assert (full.host, full.port, full.database) == ("host", 7000, 4)
    assert (full.username, full.password) == ("me", "p@ss")
    assert full.label == "redis://host:7000/4"
    assert "p@ss" not in repr(full)
    assert parse_spec("valkey://h")[0].port == 6379
    assert parse_spec("unix:///run/v.sock?db=2")[0].path == "/run/v.sock"
    assert parse_spec("redis://h/3?ttl_s=30")[1] == parse_spec("unix:///s?db=3&ttl_s=30")[1] == 30
    for wrong in ("0", "-1", "nan", "inf", "1e9"):
        with pytest.raises(UserError, match=r"ttl_s=.*: use a ttl_s from 0\.1 to 2592000"):
            parse_spec(f"redis://h?ttl_s={wrong}")
    wrongs = (
        "redis://h:port",
        "rediss://h",
        "redis://h/x",
        "unix://",
        "unix:///s?color=red",
        "redis://h?db=1",
        "redis://h?ttl_s=soon",
    )
    for wrong in wrongs:
        with pytest.raises(UserError, match="not an address"):
            parse_spec(wrong)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rum", "no such store"),
        ("mmap:", "no such store"),
        ("s3://bucket", "no such store"),
        ("sim:pcie5-x16", r"sim:pcie5-x16\+ram"),
        ("sim:abacus+ram", "no such preset"),
        ("sim:nowhere.json+ram", "dsatrace calibrate"),
        ("nixl:", "no such store"),
        ("memcache:", "name MemCache's mmc-local.conf"),
        ("memcache://127.0.0.1:5000", "use memcache:FILE"),
        ("memcache:x?device=first", "use memcache:FILE"),
        ("mooncake://h/x", "not an address"),
        ("mooncake://h?segment_mib=much", "not an address"),
    ],
)
def test_specs_that_name_no_store(spec, message, monkeypatch):
    monkeypatch.delenv("MMC_LOCAL_CONFIG_PATH", raising=False)
    with pytest.raises(UserError, match=message):
        open_store(spec, 656, 10)


@pytest.mark.parametrize("scheme", STORES)
def test_every_store_of_the_table_has_its_opener(scheme):
    module, function = STORES[scheme].opener.split(".")
    assert callable(getattr(importlib.import_module(f"dsatrace.kv.stores.{module}"), function))


def test_what_only_a_caller_can_get_wrong():
    with pytest.raises(ValueError, match="how many units"):
        open_store("ram", 656)
    with pytest.raises(ValueError, match="at least 1 unit"):
        open_store("ram", 0, 10)
    with pytest.raises(ValueError, match="only `ram`"):
        open_store("mmap:/tmp/x", 656, 10, memory=np.zeros((10, 656), np.uint8))
    with pytest.raises(ValueError, match="C-contiguous"):
        open_store("ram", 656, 10, memory=np.zeros((9, 656), np.uint8))


def test_neighbours_are_one_operation(tmp_path):
    for spec in ("ram", f"mmap:{tmp_path}/m", f"file:{tmp_path}/f"):
        store = open_store(spec, 656, 100)
        keys = unit_keys(0, np.arange(100))
        store.put(keys, units(100, 656))
        assert store.stats().write_ops == 1
        before = store.stats()
        wanted = np.array([3, 4, 5, 40, 41, 99])
        assert store.fetch(keys[wanted], np.zeros((6, 656), np.uint8)).all()
        assert (store.stats() - before).read_ops == 3
        store.close()


def test_a_large_batch_passes_through_the_staging_memory(tmp_path):
    store = open_store(f"file:{tmp_path}/f", 100_000, 200)
    keys, data = unit_keys(0, np.arange(200)), units(200, 100_000)
    assert store.put(keys, data).all()
    order = np.random.default_rng(0).permutation(200)
    out = np.zeros_like(data)
    assert store.fetch(keys[order], out).all()
    assert (out == data[order]).all()
    assert store.stats().bytes_read == 200 * 100_352  # padded to sectors of 512 bytes
    store.close()


def test_a_simulated_store_has_its_presets_times():
    store = open_store("sim:pcie5-x16+ram", 656, 100)
    keys, data = unit_keys(0, np.arange(100)), units(100, 656)
    store.put(keys, data)
    wanted = np.arange(0, 100, 2)
    out = np.zeros((50, 656), dtype=np.uint8)
    assert store.fetch(keys[wanted], out).all()
    stats = store.stats()
    assert stats.latency_kind == "modelled"
    assert stats.read_us == pytest.approx(50 * 6 + 50 * 656 / 55e3)
    assert stats.write_us == pytest.approx(1 * 6 + 100 * 656 / 55e3)
    store.fetch(unit_keys(1, wanted), out)  # nothing moves, nothing is added
    assert store.stats().read_us == stats.read_us
    assert (store.stats() - stats).missed_units == 50


def test_presets_say_where_they_come_from():
    assert {"hbm-h200", "pcie5-x16", "rdma-400g", "nvme-gen4"} <= set(PRESETS)
    for preset in PRESETS.values():
        alphas = (preset.alpha_batch_us, preset.alpha_op_us)
        for figure in (*alphas, preset.read_gb_per_s, preset.write_gb_per_s):
            assert figure.source
            assert (figure.confidence == "unknown") == (figure.value == 0)
    with pytest.raises(ValueError, match="no time"):
        Figure(-1, "nobody", "unknown")
    with pytest.raises(ValueError, match="moves nothing"):
        Preset("x", "x", *[Figure(0, "nobody", "unknown")] * 4)


@given(st.floats(0, 1e3), st.floats(0, 100), st.floats(0.1, 5000))
def test_a_fit_finds_the_numbers_it_was_made_from(alpha_batch, alpha_op, gb_per_s):
    samples = [
        Sample(ops, units * size, alpha_batch + ops * alpha_op + units * size / gb_per_s / 1e3)
        for units in (1, 8, 64, 256)
        for size in (656, 41_984)
        for ops in (1, units)
    ]
    found = fit(samples)
    assert min(found) >= 0
    for sample in samples:
        us = found[0] + found[1] * sample.ops + found[2] * sample.num_bytes
        assert us == pytest.approx(sample.us, rel=1e-3)


def test_calibrate_writes_what_sim_reads(tmp_path, capsys):
    out = tmp_path / "here.json"
    assert main(["calibrate", "ram", f"mmap:{tmp_path}/m", "ram", "--repeats", "1", "--out", str(out)]) == 0
    assert "alpha_op" in capsys.readouterr().out
    assert [preset["name"] for preset in json.loads(out.read_text())] == ["ram", "mmap", "ram-2"]
    preset = load_preset(f"{out}#mmap")
    assert preset.read_gb_per_s.confidence == "measured"
    assert dataclasses.asdict(preset) in json.loads(out.read_text())
    store = open_store(f"sim:{out}#ram+ram", 656, 10)
    store.put(unit_keys(0, np.arange(10)), units(10, 656))
    assert store.stats().write_us > 0
    with pytest.raises(UserError, match="name one after a #"):
        load_preset(str(out))
    out.write_text("[{}]")
    with pytest.raises(UserError, match="not a file that"):
        load_preset(f"{out}#ram")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sim:pcie5-x16+ram"], "cannot be measured"),
        (["ram", "--repeats", "0"], "--repeats 0"),
        (["ram", "--out", "/nowhere/x.json"], "no folder"),
        (["rum"], "no such store"),
    ],
)
def test_calibrates_mistakes(arguments, message, capsys):
    assert main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_statistics_are_subtracted():
    assert StoreStats(hit_units=5, read_us=2.5) - StoreStats(hit_units=2, read_us=1) == StoreStats(
        hit_units=3, read_us=1.5
    )
