"""A run on a real server that fails in every way: the faults fire, requests finish, and no token is wrong.

By hand, longer and with a table:

    STORE_FAULT_REQUESTS=100 python -m pytest -s tests/test_store_fault_runs.py
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dsatrace.engine.live import LiveRequest
from dsatrace.kv.stores import backoff
from dsatrace.kv.stores.interface import Store, StoreStats
from dsatrace.kv.stores.opening import open_store
from dsatrace.kv.tiers.fetches import REMOTE
from dsatrace.kv.tiers.stack import TierStack
from dsatrace.runner.offload.cache import OffloadedCache, unit_bytes
from helpers.fault_proxy import FAULTS, FaultProxy
from helpers.models import SMALL, random_tokens
from helpers.stores import valkey
from helpers.waiting import Clock
from test_offload_faults import BLOCK, MODEL, NEW_TOKENS, NUM_BLOCKS, serve

ENVIRONMENT = "STORE_FAULT_REQUESTS"
NUM_REQUESTS = int(os.environ.get(ENVIRONMENT, "6"))
PROMPTS = [random_tokens(30 + 7 * i % 40, SMALL, seed=i) for i in range(NUM_REQUESTS)]
TIMEOUT_S = {"hang": 0.3}
PATIENT_S = 600.0
"""How long an answer may take: short where the test waits for it in vain, else any time."""
RESTART = "server killed and restarted"
EVERY = {
    "dropped": 40,
    "truncated reply": 40,
    "hang": 900,
    "wrong bytes": 60,
    "error reply": 500,
    "another protocol": 500,
    "full store": 500,
}
"""How often each fault fires, in commands: seldom enough that some requests get through."""


FELT: dict[str, Callable[[StoreStats], int]] = {
    "dropped": lambda stats: stats.retries,
    "truncated reply": lambda stats: stats.retries,
    "hang": lambda stats: stats.timeouts,
    "wrong bytes": lambda stats: stats.corrupt_units,
    "error reply": lambda stats: stats.errors,
    "another protocol": lambda stats: stats.errors,
    "full store": lambda stats: stats.put_units - stats.stored_units,
    RESTART: lambda stats: stats.retries,
}
"""What the store counts at least once for each."""


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The answers of a run without tiers."""
    plain = MODEL.new_cache(NUM_BLOCKS, BLOCK)
    return [live.answer for live in serve(plain, prefix_caching=False, recompute=True, prompts=PROMPTS)[0]]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    head = "fired finished failed recomputes retries errors timeouts skipped corrupt wrong_tokens seconds"
    rows = [f"{'fault':28}" + "".join(f"{name:>13}" for name in head.split())]
    yield rows
    if ENVIRONMENT in os.environ:
        print("", *rows, sep="\n")


def served(
    spec: str, on_step: Callable[[int, Store], None], timeout_s: float = PATIENT_S
) -> tuple[list[LiveRequest], StoreStats]:
    """By rows, 24 of them in HBM, all others in the store alone."""
    size = unit_bytes(MODEL.setup, BLOCK, "row")
    store = open_store(spec, size, timeout_s=timeout_s)
    tiers = TierStack(None, store, num_layers=SMALL.n_layers, units_per_layer=NUM_BLOCKS * BLOCK)
    with contextlib.closing(tiers):
        cache = OffloadedCache(MODEL.setup, NUM_BLOCKS, BLOCK, tiers=tiers, hbm_blocks=3, granularity="row")
        live, _ = serve(
            cache,
            prefix_caching=False,
            recompute=True,
            prompts=PROMPTS,
            on_step=lambda step: on_step(step, store),
        )
        stats = tiers.stats()[REMOTE]
        assert stats is not None
        return live, stats


def test_a_store_that_hangs_for_good_is_not_waited_for_by_every_request(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that each look at it moves on by a hundredth of the first pause."""
    monkeypatch.setattr(backoff, "time", Clock(tick=PATIENT_S * backoff.FIRST / 100))
    with valkey() as server:

        def pause(step: int, store: Any) -> None:
            if step == 6:
                server.pause()
                store._medium._connection._timeout_s = 0.1

        live, stats = served(server.tcp, pause)
    assert sum(one.state == "failed" for one in live) > 2
    assert all(one.answer == right[: len(one.answer)] for one, right in zip(live, expected, strict=True))
    assert stats.skipped_batches > 3 * stats.timeouts > 0


@pytest.mark.parametrize("fault", [*FAULTS, RESTART])
def test_no_fault_of_a_store_makes_a_wrong_token(
    fault: str, expected: list[list[int]], table: list[str]
) -> None:
    begin = time.monotonic()
    with valkey() as server:
        restarts = []

        def restart(step: int, _: Store) -> None:
            if fault == RESTART and step % 25 == 24:
                server.kill()
                server.start()
                restarts.append(step)

        proxied = None if fault == RESTART else fault
        with FaultProxy(server.port, proxied, EVERY.get(fault, 1)) as proxy:
            live, stats = served(proxy.spec, restart, TIMEOUT_S.get(fault, PATIENT_S))
    num_fired = len(restarts) if fault == RESTART else proxy.num_fired
    pairs = [(one, answer[: len(one.answer)]) for one, answer in zip(live, expected, strict=True)]
    wrong = sum(a != b for one, answer in pairs for a, b in zip(one.answer, answer, strict=True))
    finished = [one for one in live if one.state == "length"]
    num_failed = sum(one.state == "failed" for one in live)
    counts = (num_fired, len(finished), num_failed, sum(one.num_recomputes for one in live), stats.retries)
    counts += (stats.errors, stats.timeouts, stats.skipped_batches, stats.corrupt_units, wrong)
    seconds = time.monotonic() - begin
    table.append(f"{fault:28}" + "".join(f"{count:13}" for count in counts) + f"{seconds:13.1f}")
    assert num_fired > 0
    assert finished
    assert wrong == 0
    assert all(len(one.answer) == NEW_TOKENS for one in finished)
    assert len(finished) + num_failed == NUM_REQUESTS
    assert all((one.error is not None) == (one.state == "failed") for one in live)
    assert FELT[fault](stats) >= num_fired
    if fault in ("dropped", "truncated reply"):
        assert num_failed == stats.errors == 0
