"""Stores that fail at random under a running engine: never a wrong token, whatever they do."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.engine import Engine
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.scheduler import Scheduler
from dsatrace.kv.tiers.stack import TierStack
from dsatrace.model.cache import KVCache
from dsatrace.runner.model_runner import ModelRunner
from dsatrace.runner.offload.cache import OffloadedCache, tokens_of_unit, unit_bytes
from dsatrace.runner.sampler import Sampler
from dsatrace.runner.settings import Granularity, PrefetchKind
from dsatrace.workloads.request import Request
from helpers.flaky_store import FlakyStore
from helpers.models import SMALL, random_model, random_tokens
from helpers.power import examples

BLOCK, NUM_BLOCKS = 8, 24
NEW_TOKENS = 6
MODEL = random_model(dataclasses.replace(SMALL, dtype="fp64", index_topk=6))
SHARED = random_tokens(24, SMALL, seed=50)
PROMPTS = [[*SHARED[:16], *random_tokens(n, SMALL, seed=n)] for n in (30, 21, 44)]


def serve(
    cache: KVCache,
    *,
    prefix_caching: bool,
    recompute: bool,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[list[LiveRequest], Engine]:
    """`on_step` is called before each forward, with its number."""
    pool = new_pool(NUM_BLOCKS, BLOCK, prefix_caching)
    pool.blocks.on_void = cache.void if isinstance(cache, OffloadedCache) else None
    scheduler = Scheduler(pool, max_batch_size=2, prefill_chunk=16)
    runner = ModelRunner(MODEL, cache, Sampler(seed=3))
    engine = Engine(scheduler, runner, on_tier_error="recompute" if recompute else "fail")
    live = [
        engine.submit(Request(f"r{i}", tuple(tokens), NEW_TOKENS, stop_at_eos=False))
        for i, tokens in enumerate(prompts)
    ]
    step = itertools.count()
    while scheduler.has_work:
        on_step(next(step))
        engine.step()
        pool.blocks.check_integrity()
    return live, engine


EXPECTED = [
    live.answer for live in serve(MODEL.new_cache(NUM_BLOCKS, BLOCK), prefix_caching=False, recompute=True)[0]
]


def serve_with_flaky_stores(
    seed: int,
    *,
    granularity: Granularity = "block",
    prefetch: PrefetchKind = "none",
    capacities: tuple[int | None, int | None] = (None, 0),
    rates: tuple[float, float] = (0.01, 0.0),
    prefix_caching: bool = False,
    index_keys: bool = False,
    recompute: bool = True,
) -> tuple[list[LiveRequest], Scheduler]:
    """`capacities` and `rates` of failure of the local and the remote pool; 0 units: there is none."""
    rng = random.Random(seed)

    def tiers(size: int, units_per_layer: int) -> TierStack:
        pools = [
            FlakyStore(size, capacity, rng, rate) if capacity != 0 else None
            for capacity, rate in zip(capacities, rates, strict=True)
        ]
        return TierStack(*pools, num_layers=SMALL.n_layers, units_per_layer=units_per_layer)

    index_bytes = BLOCK * MODEL.new_cache(1, BLOCK).index_bytes_per_token
    cache = OffloadedCache(
        MODEL.setup,
        NUM_BLOCKS,
        BLOCK,
        tiers=tiers(
            unit_bytes(MODEL.setup, BLOCK, granularity),
            NUM_BLOCKS * BLOCK // tokens_of_unit(granularity, BLOCK),
        ),
        hbm_blocks=11 if granularity == "block" else 3,
        granularity=granularity,
        prefetch=prefetch,
        index_tiers=tiers(index_bytes, NUM_BLOCKS) if index_keys else None,
    )
    live, engine = serve(cache, prefix_caching=prefix_caching, recompute=recompute)
    cache.prefetcher.close()
    return live, engine.scheduler


@settings(max_examples=examples(20), deadline=None)
@given(
    granularity=st.sampled_from(get_args(Granularity)),
    prefetch=st.sampled_from(get_args(PrefetchKind)),
    capacities=st.sampled_from([(None, 0), (0, None), (20, None), (7, 200)]),
    rates=st.sampled_from([(0.0, 0.003), (0.003, 0.0), (0.01, 0.01), (0.1, 0.1)]),
    prefix_caching=st.booleans(),
    index_keys=st.booleans(),
    recompute=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_never_a_wrong_token(recompute: bool, **changes) -> None:
    live, scheduler = serve_with_flaky_stores(recompute=recompute, **changes)
    for one, answer in zip(live, EXPECTED, strict=True):
        assert one.answer == answer[: len(one.answer)]
        assert one.state == "failed" or one.answer == answer
        assert (one.state == "failed") == (one.error is not None)
    assert scheduler.num_failed == sum(one.state == "failed" for one in live)
    assert scheduler.num_recomputes == sum(one.num_recomputes for one in live)
    assert recompute or scheduler.num_recomputes == 0


def test_the_cases_hold_losses_of_both_kinds() -> None:
    """So that the property above is not one of idle stores."""
    runs = [serve_with_flaky_stores(seed, granularity="row", rates=(0.003, 0.0)) for seed in range(4)]
    survived = [scheduler for live, scheduler in runs if all(one.state == "length" for one in live)]
    assert sum(scheduler.num_recomputes for scheduler in survived) > 0
    hopeless = [serve_with_flaky_stores(seed, granularity="row", rates=(0.3, 0.0)) for seed in range(2)]
    assert sum(scheduler.num_failed for _, scheduler in hopeless) > 0
