"""What follows for one size: the cost model against a plain one, engines' settings, engines' counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.kv.stores.simulated import PRESETS, load_preset
from dsatrace.selection_replay.answers import add_answers
from dsatrace.selection_replay.cost import Compute, Cost, parse_compute
from dsatrace.selection_replay.engines import Counters, engine_settings, read_counters

PCIE = load_preset("pcie5-x16")


def test_a_step_takes_the_longer_of_computing_and_fetching() -> None:
    cost = Cost(PCIE, Compute(100, 1), (10.0, 0.0), 4096, 656, 132, 1)
    fetch = 8 * 10 * 6.0 + 8 * 10 * 656 / 55e3  # 6 us per copy call, 55 GB/s
    assert cost.whole_step_us(8) == 2 * 108
    assert cost.step_us(8) == pytest.approx(fetch + 108)
    assert cost.step_us(8, overlapped=False) == pytest.approx(fetch + 2 * 108)


def test_memory_of_a_request() -> None:
    cost = Cost(PCIE, Compute(100, 0), (1.0,) * 61, 4096, 656, 132, 1)
    assert cost.request_bytes(131072, offloaded=False) == 61 * 131072 * (656 + 132)
    assert cost.request_bytes(131072, offloaded=True) == 61 * (4096 * 656 + 131072 * 132)
    assert cost.request_bytes(1024, offloaded=True) == 61 * 1024 * (656 + 132)


@given(
    st.floats(0, 300),
    st.floats(10, 500),
    st.floats(0, 5),
    st.floats(0.5, 40),
    st.sampled_from(sorted(PRESETS)),
)
def test_it_pays_from_the_first_batch_that_is_faster_than_all_that_fit(
    misses: float, base: float, per_request: float, gigabytes: float, link: str
) -> None:
    cost = Cost(load_preset(link), Compute(base, per_request), (misses, misses / 2), 4096, 656, 132, 1)
    budget = gigabytes * 1e8
    found = cost.pays_from(65536, budget)
    whole = cost.most_requests(65536, budget, offloaded=False)
    best = whole / cost.whole_step_us(whole) if whole else 0.0
    faster = [
        batch
        for batch in range(whole + 1, cost.most_requests(65536, budget, offloaded=True) + 1)
        if batch / cost.step_us(batch) > best
    ]
    assert found == (faster[0] if faster else None)


def test_compute() -> None:
    assert parse_compute("50") == (50, 0) and parse_compute("50.5+1.5") == (50.5, 1.5)
    for text in ("0", "-1", "50+", "a+b", ""):
        with pytest.raises(UserError, match="--compute-us"):
            parse_compute(text)


def test_settings_are_ready_to_paste() -> None:
    sglang, vllm, tensorrt = engine_settings(4096, 2048, 1)
    assert '{"top_k": 2048, "device_buffer_size": 4096, "host_to_device_ratio": 8}' in sglang.flags
    assert '{"hisparse_config": {"device_buffer_size": 4096}}' in vllm.flags
    assert "gpu_cache_factor=2)" in tensorrt.flags


def test_settings_that_an_engine_would_refuse_are_named() -> None:
    assert "vLLM wants 6144" in engine_settings(4096, 2048, 2)[1].note
    assert all("32768" in setting.note for setting in engine_settings(32769, 2048, 1)[:2])


def test_a_buffer_below_top_k_has_no_settings() -> None:
    """It is replayed all the same, where steps select fewer ids."""
    record = {
        "settings": {"sizes": ["6"], "share": "none", "union": 1},
        "overall": {"policies": {"lru": {"6": {"miss_rate": 0.5, "ids": 6.0}}}},
        "unit": "token",
        "top_k": [8],
    }
    add_answers(record, None, None, None, None, None)
    assert record["chosen"] == {"size": "6"}


def test_counters_of_prometheus_are_added_over_their_labels(tmp_path: Path) -> None:
    path = tmp_path / "metrics.txt"
    path.write_text(
        "# HELP vllm:hisparse_cache_hits_total hits\n"
        'vllm:hisparse_cache_hits_total{engine="0"} 60\n'
        'vllm:hisparse_cache_hits_total{engine="1"} 30.0\n'
        "vllm:hisparse_cache_misses 10\n"
        "vllm:hisparse_host_to_device_bytes_total 6560\n"
        "vllm:other 3\n"
    )
    assert read_counters(path) == Counters(90, 10, 6560)
    assert read_counters(path).miss_rate == 0.1


def test_counters_as_json(tmp_path: Path) -> None:
    path = tmp_path / "counters.json"
    path.write_text('{"hits": 3, "misses": 1}')
    assert read_counters(path) == Counters(3, 1, None)


@pytest.mark.parametrize(
    "text",
    [
     "", "{", "[]", '{"hits": 1}', '{"hits": -1, "misses": 2}', '{"hits": "1", "misses": 2}',
     '{"hits":0,"misses":0}',
     "vllm:hisparse_cache_hits NaN\nvllm:hisparse_cache_misses 1", "vllm:hisparse_cache_hits 1e99"],
)  # fmt: skip
def test_other_counters_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "counters"
    path.write_text(text)
    with pytest.raises(UserError, match="--measured"):
        read_counters(path)


def test_a_size_without_a_replay_has_no_cost() -> None:
    record: dict[str, Any] = {
        "bytes_per_id": 656,
        "index_bytes_per_id": 132,
        "unit_tokens": 1,
        "layers": [{"policies": {"lru": {"1k": {"miss_rate": None}}}}],
    }
    with pytest.raises(UserError, match="LRU was not replayed at 1k in every layer"):
        Cost.of(record, "1k", PCIE, Compute(50, 0))
    with pytest.raises(UserError, match="not known in bytes"):
        Cost.of({**record, "bytes_per_id": None}, "1k", PCIE, Compute(50, 0))
