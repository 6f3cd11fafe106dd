"""Runs with latents in real stores: the tokens and selections of an all-HBM run, and a trace that adds up.

Also what becomes of a run whose store is taken away, emptied, altered, stopped or filled in the middle.
Arithmetic is fp64, so that what is computed again in other chunks comes out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsatrace.engine.live import LiveRequest
from dsatrace.engine.settings import RunSettings
from dsatrace.errors import UserError
from dsatrace.model.transformer import Transformer
from dsatrace.runner.settings import ModelSettings, OffloadSettings
from dsatrace.runner.setup import open_engine
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from dsatrace.workloads.request import Request
from helpers.command_runs import selections
from helpers.models import SMALL, random_model, random_tokens
from helpers.stores import mooncake, valkey

BLOCK = 16
NEW_TOKENS = 10
LENGTHS = (230, 170, 250, 90)
HBM_BLOCKS = {"block": 24, "row": 6}
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Served:
    """A run that has ended."""

    live: list[LiveRequest]
    out: Path

    @property
    def answers(self) -> list[list[int]]:
        return [one.answer for one in self.live]

    @property
    def states(self) -> list[str]:
        return [one.state for one in self.live]

    @property
    def selections(self) -> dict[tuple[str, int, int], list[int]]:
        return selections(self.out)

    @property
    def summary(self) -> dict:
        return RunReader(self.out).summary()

    def check_books(self) -> None:
        """Every record by the second implementation, and that bytes are conserved."""
        assert verify(self.out).state == "complete"
        tiers = self.summary["tiers"]
        for name in ("local_pool", "remote_pool"):
            for told in (tiers[name] or {}).values():
                if isinstance(told, dict):
                    assert told["in_records"] + told["elsewhere"] == told["store"]
                    assert min(told.values()) >= 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """One loaded model, and the folder of the runs."""

    model: Transformer
    settings: ModelSettings
    folder: Path

    def serve(
        self,
        offload: OffloadSettings | None,
        name: str = "run",
        on_step: Callable[[int], None] = lambda step: None,
        **changes: object,
    ) -> Served:
        """Serves four requests, two at a time; `on_step` is called before each forward."""
        with self.open(offload, name, **changes) as (engine, live):
            step = 0
            while engine.scheduler.has_work:
                on_step(step)
                engine.step()
                step += 1
        return Served(live, self.folder / name)

    @contextlib.contextmanager
    def open(self, offload: OffloadSettings | None, name: str, **changes: object) -> Iterator:
        settings = dataclasses.replace(self.settings, offload=offload, **changes)
        trace = TraceConfig(out=self.folder / name, block_size=BLOCK, prefill="last")
        run = RunSettings(longest=max(LENGTHS) + NEW_TOKENS, trace=trace)
        with open_engine(self.model, settings, CPU, run) as engine:
            live = [
                engine.submit(Request(f"r{i}", tuple(tokens), NEW_TOKENS, stop_at_eos=False))
                for i, tokens in enumerate(prompts(self.model))
            ]
            yield engine, live


def prompts(model: Transformer) -> list[list[int]]:
    return [random_tokens(length, model.args, seed=i) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model_and_settings() -> tuple[Transformer, ModelSettings]:
    settings = ModelSettings(
        Path("built in memory"), device="cpu", max_batch_size=2, prefill_chunk=64, cache_block_size=BLOCK
    )
    return random_model(dataclasses.replace(SMALL, dtype="fp64", index_topk=16)), settings


@pytest.fixture(scope="module")
def expected(model_and_settings, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Bench(*model_and_settings, tmp_path_factory.mktemp("whole")).serve(None)


@pytest.fixture
def bench(model_and_settings, tmp_path: Path) -> Bench:
    return Bench(*model_and_settings, tmp_path)


def offload_of(granularity: str = "block", **changes: object) -> OffloadSettings:
    return OffloadSettings(hbm_blocks=HBM_BLOCKS[granularity], granularity=granularity, **changes)


# ---- the same run


@contextlib.contextmanager
def stores(kind: str, folder: Path) -> Iterator[dict[str, object]]:
    """The flags of one way to keep latents outside HBM."""
    with contextlib.ExitStack() as stack:
        local, _, remote = ("", "", kind) if kind.startswith("sim:") else kind.rpartition("+")
        if remote == "valkey":
            yield {"local": local or None, "remote": stack.enter_context(valkey()).tcp} | _few(local)
        elif remote == "mooncake":
            yield {"local": local or None, "remote": stack.enter_context(mooncake()).spec} | _few(local)
        elif remote in ("mmap", "file"):
            yield {"local": f"{remote}:{folder}/units"}
        else:
            yield {"local": remote}


def _few(local: str) -> dict[str, object]:
    """A local pool that has to make room."""
    return {"local_blocks": 9} if local else {}


KINDS = ("ram", "mmap", "file", "sim:pcie5-x16+ram", "valkey", "mooncake", "ram+valkey", "ram+mooncake")


@pytest.mark.parametrize("granularity", ["block", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_and_selections_from_every_store(
    bench: Bench, expected: Served, kind: str, granularity: str, tmp_path: Path
) -> None:
    with stores(kind, tmp_path) as named:
        served = bench.serve(offload_of(granularity, **named))
    assert served.answers == expected.answers
    assert served.selections == expected.selections
    served.check_books()
    totals = served.summary["kv_fetch"]
    tiers = [name for name, flag in (("local_pool", "local"), ("remote_pool", "remote")) if named.get(flag)]
    assert totals["hbm"]["hit_tokens"] > 0
    for name in tiers:
        assert totals[name]["bytes_read"] >= totals[name]["bytes_useful"] > 0
        assert served.summary["tiers"][name]["errors"] == 0
    assert served.summary["tiers"]["lost_units"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"tier_policy": "fifo"},
        {"tier_policy": "sieve", "granularity": "row"},
        {"prefetch": "previous-layer"},
        {"prefetch": "previous-step", "granularity": "row"},
        {"local": "ram", "local_blocks": 9, "remote": "sim:rdma-400g+ram"},
        {"offload_index_keys": True},
        {"offload_index_keys": True, "granularity": "row", "prefetch": "previous-layer"},
    ],
    ids=str,
)
def test_the_same_tokens_whatever_is_asked_of_the_tiers(
    bench: Bench, expected: Served, changes: dict[str, object]
) -> None:
    served = bench.serve(offload_of(**changes))
    assert served.answers == expected.answers
    assert served.selections == expected.selections
    served.check_books()
    tiers = served.summary["tiers"]
    assert (tiers["prefetch"] is None) == ("prefetch" not in changes)
    assert (tiers["index_keys"] is None) == ("offload_index_keys" not in changes)
    if tiers["index_keys"]:
        keys = tiers["index_keys"]["local_pool"]
        assert keys["bytes_read"] > served.summary["bytes_read"]["indexer_scan"] > 0, "all of every context"
        assert keys["bytes_written"] > 0 and keys["errors"] == 0


def test_prefix_caching_over_tiers(bench: Bench, expected: Served) -> None:
    """Cached blocks are found in the tiers too; those that are given up leave nothing behind."""
    served = bench.serve(offload_of(), prefix_caching=True, cache_blocks=40)
    assert served.answers == expected.answers
    served.check_books()


# ---- what users get wrong


def test_a_server_that_is_down_at_the_start_is_one_line(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"redis://127.0.0.1:1.*start"):
        bench.serve(offload_of(remote="redis://127.0.0.1:1"))


def test_a_local_pool_that_is_too_small_says_how_large(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"--local-blocks 8: the cache has 34 blocks.*use --local-blocks 34"):
        bench.serve(offload_of(local_blocks=8))


def test_hbm_that_does_not_hold_a_step_says_how_much_is_needed(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"HBM holds 3; use --hbm-blocks \d+ at least"):
        bench.serve(OffloadSettings(hbm_blocks=3))


# ---- faults


def at(step: int, act: Callable[[], object]) -> Callable[[int], None]:
    """Acts once, before forward `step`."""
    return lambda now: act() if now == step else None


FAULT_STEP = 9  # behind the first two prompts, in the midst of decode


def check_recovered(served: Served, expected: Served) -> None:
    assert served.answers == expected.answers
    assert set(served.states) == {"length"}
    served.check_books()
    tiers = served.summary["tiers"]
    assert tiers["lost_units"] > 0 and tiers["num_recomputes"] > 0 and tiers["failed_requests"] == 0
    assert sum(one.num_recomputes for one in served.live) == tiers["num_recomputes"]


def check_failed(served: Served, expected: Served, cause: str) -> None:
    """Some requests failed, for a cause that is named; nobody got a wrong token."""
    assert "failed" in served.states
    for one, answer in zip(served.live, expected.answers, strict=True):
        assert one.answer == answer[: len(one.answer)]
        assert one.state == "failed" or one.answer == answer
        if one.state == "failed":
            assert one.error is not None and cause in one.error
    served.check_books()
    assert served.summary["tiers"]["failed_requests"] == served.states.count("failed")


@pytest.mark.parametrize(
    ("prefix_caching", "changes"),
    [
        (False, {"granularity": "block"}),
        (True, {"granularity": "row"}),
        (True, {"granularity": "row", "prefetch": "previous-layer"}),
        (False, {"granularity": "row", "local": "ram", "local_blocks": 3}),
        (True, {"granularity": "row", "offload_index_keys": True}),
    ],
    ids=str,
)
def test_an_emptied_server_costs_time_and_nothing_else(
    bench: Bench, expected: Served, changes: dict[str, object], prefix_caching: bool
) -> None:
    """Emptied twice: the second time it is what was computed again that is lost.

    test_offload_faults.py tries these settings in any mixture.
    """
    with valkey() as server, client(server) as redis:

        def disturb(step: int) -> None:
            if step in (FAULT_STEP, 2 * FAULT_STEP):
                redis.flushall()

        offload = offload_of(remote=server.tcp, **changes)
        served = bench.serve(offload, on_step=disturb, prefix_caching=prefix_caching)
    check_recovered(served, expected)


def test_altered_units_are_computed_again(bench: Bench, expected: Served) -> None:
    with valkey() as server, client(server) as redis:

        def alter() -> None:
            for key in redis.keys("*"):
                redis.setrange(key, 100, b"\xff\x00\xff")

        served = bench.serve(offload_of("row", remote=server.tcp), on_step=at(FAULT_STEP, alter))
    check_recovered(served, expected)
    assert served.summary["tiers"]["remote_pool"]["corrupt_units"] > 0


def test_a_server_that_dies_and_comes_back_empty(bench: Bench, expected: Served) -> None:
    with valkey() as server:

        def restart() -> None:
            server.kill()
            server.start()

        served = bench.serve(offload_of("row", remote=server.tcp), on_step=at(FAULT_STEP, restart))
    check_recovered(served, expected)


def test_a_server_that_does_not_answer_in_time(bench: Bench, expected: Served) -> None:
    """It is resumed a forward later, and then asked again as soon as its pause is over."""
    with valkey() as server:

        def disturb(step: int) -> None:
            if step == FAULT_STEP:
                server.pause()
            elif step == FAULT_STEP + 1:
                server.resume()
                time.sleep(0.1)

        served = bench.serve(offload_of("row", remote=server.tcp, tier_timeout_s=0.3), on_step=disturb)
        server.resume()
    check_recovered(served, expected)
    assert served.summary["tiers"]["remote_pool"]["timeouts"] > 0


@pytest.mark.parametrize("on_tier_error", ["recompute", "fail"])
def test_a_server_that_stays_dead_fails_requests_and_ends_the_run(
    bench: Bench, expected: Served, on_tier_error: str
) -> None:
    with valkey() as server:
        served = bench.serve(
            offload_of("row", remote=server.tcp, on_tier_error=on_tier_error),
            on_step=at(FAULT_STEP, server.kill),
        )
    check_failed(served, expected, "127.0.0.1")


def test_a_full_server_fails_requests_with_its_reason(bench: Bench, expected: Served) -> None:
    """Two thirds of what the units need."""
    with valkey("--maxmemory", "1500kb", "--maxmemory-policy", "noeviction") as server:
        served = bench.serve(offload_of("row", remote=server.tcp))
    check_failed(served, expected, "do not take what leaves HBM")


def test_a_local_pool_survives_the_death_of_the_remote_one(bench: Bench, expected: Served) -> None:
    """Whatever the local pool holds is still served from there."""
    with valkey() as server:
        served = bench.serve(
            offload_of("row", local="ram", local_blocks=40, remote=server.tcp),
            on_step=at(FAULT_STEP, server.kill),
        )
    assert served.answers == expected.answers
    served.check_books()


def test_a_server_that_drops_units_on_its_own(bench: Bench, expected: Served) -> None:
    """Too small, and told to evict: whoever misses a unit is computed again, or fails in the end."""
    with valkey("--maxmemory", "1550kb", "--maxmemory-policy", "allkeys-lru") as server:
        served = bench.serve(offload_of("row", remote=server.tcp))
    assert served.summary["tiers"]["lost_units"] > 0
    for one, answer in zip(served.live, expected.answers, strict=True):
        assert one.answer == answer[: len(one.answer)]
        assert one.state == "failed" or one.answer == answer
    served.check_books()


def test_mooncake_evicts_units_under_a_lease(bench: Bench, expected: Served) -> None:
    """By force, from another client: the leases of those just read do not keep them."""
    with mooncake(lease_ms=60_000) as master:

        def remove() -> None:
            stranger = importlib.import_module("mooncake.store").MooncakeDistributedStore()
            address = master.spec.removeprefix("mooncake://").partition("?")[0]
            assert stranger.setup("127.0.0.1", "P2PHANDSHAKE", 0, 1 << 24, "tcp", "", address) == 0
            stranger.remove_all(True)
            stranger.close()

        served = bench.serve(offload_of("row", remote=master.spec), on_step=at(FAULT_STEP, remove))
    check_recovered(served, expected)


def test_mooncake_whose_master_dies(bench: Bench, expected: Served) -> None:
    with mooncake() as master:
        served = bench.serve(
            offload_of("row", remote=master.spec, tier_timeout_s=2.0, on_tier_error="fail"),
            on_step=at(FAULT_STEP, master.kill),
        )
    for one, answer in zip(served.live, expected.answers, strict=True):
        assert one.answer == answer[: len(one.answer)]
        assert one.state in ("length", "failed")
    served.check_books()


def test_two_runs_on_one_server_do_not_meet(bench: Bench, expected: Served) -> None:
    """They take turns, forward by forward, under equal request and block ids."""
    with valkey() as server, client(server) as redis, contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(bench.open(offload_of("row", remote=server.tcp), name))
            for name in ("one", "two")
        ]
        most_keys = 0
        while any(engine.scheduler.has_work for engine, _ in runs):
            for engine, _ in runs:
                if engine.scheduler.has_work:
                    engine.step()
            most_keys = max(most_keys, redis.dbsize())
        stack.close()
        assert most_keys > 0 and redis.dbsize() == 0, "a run takes its units with it"
    for name, (_, live) in zip(("one", "two"), runs, strict=True):
        assert [one.answer for one in live] == expected.answers
        Served(live, bench.folder / name).check_books()


@functools.cache
def _redis():
    return pytest.importorskip("redis", reason="redis-py plays the stranger at the server")


@contextlib.contextmanager
def client(server) -> Iterator:
    connection = _redis().Redis.from_url(server.tcp)
    try:
        yield connection
    finally:
        connection.close()
