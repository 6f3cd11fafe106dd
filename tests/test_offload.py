"""Latents outside HBM: the same logits, tokens and selections at every capacity that holds a decode step."""

from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.engine import Engine
from dsatrace.engine.scheduler import Scheduler
from dsatrace.errors import UserError
from dsatrace.kv.tiers.fetches import HBM, LOCAL, LayerFetch
from dsatrace.kv.tiers.stack import TierStack
from dsatrace.model.batch import Batch, Span
from dsatrace.model.cache import KVCache
from dsatrace.model.transformer import Transformer
from dsatrace.runner.model_runner import ModelRunner
from dsatrace.runner.offload.cache import OffloadedCache, unit_bytes
from dsatrace.runner.offload.layer_units import UnitsLost
from dsatrace.runner.sampler import Sampler
from dsatrace.runner.settings import Granularity, PrefetchKind
from dsatrace.workloads.request import Request
from helpers.memory_store import MemoryStore
from helpers.models import SMALL, SelectionLog, prefill, random_model, random_tokens
from helpers.power import examples

BLOCK = 8
GRANULARITIES = get_args(Granularity)


@functools.cache
def model_of(dtype: str) -> Transformer:
    """Selects so few tokens that most blocks of a context are left alone."""
    return random_model(dataclasses.replace(SMALL, dtype=dtype, index_topk=6))


def offloaded(
    model: Transformer,
    num_blocks: int,
    hbm_blocks: int,
    granularity: Granularity = "block",
    *,
    staged: bool = False,
    capacity: int | None = None,
    policy: str = "lru",
    prefetch: PrefetchKind = "none",
    local_units: int | None = None,
    index_keys: bool = False,
) -> OffloadedCache:
    """Over one store of `capacity` units, or with `local_units` over a local pool and a remote one."""
    size = unit_bytes(model.setup, BLOCK, granularity)
    per_layer = num_blocks * BLOCK if granularity == "row" else num_blocks
    num_layers = model.args.n_layers
    if local_units is None:
        tiers = TierStack(MemoryStore(size, capacity), None, num_layers=num_layers, units_per_layer=per_layer)
    else:
        tiers = TierStack(
            MemoryStore(size, local_units),
            MemoryStore(size),
            num_layers=num_layers,
            units_per_layer=per_layer,
            policy=policy,
        )
    index = MemoryStore(BLOCK * model.new_cache(1, BLOCK).index_bytes_per_token)
    return OffloadedCache(
        model.setup,
        num_blocks,
        BLOCK,
        tiers=tiers,
        hbm_blocks=hbm_blocks,
        granularity=granularity,
        policy=policy,
        prefetch=prefetch,
        index_tiers=TierStack(index, None, num_layers=num_layers, units_per_layer=num_blocks)
        if index_keys
        else None,
        staged=staged,
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """An engine and what it is asked; `num_blocks` may be so few that requests are preempted."""

    lengths: list[tuple[int, int]]  # shared with the others, own
    new_tokens: int
    batch_size: int
    chunk: int
    num_blocks: int
    prefix_caching: bool
    temperature: float
    dtype: str

    def serve(self, cache: KVCache) -> tuple[list[list[int]], list[list[list[int]]], int]:
        """Answers, every layer's selections in order, and how often somebody was preempted."""
        model = model_of(self.dtype)
        log = SelectionLog(model)
        pool = new_pool(self.num_blocks, BLOCK, self.prefix_caching)
        pool.blocks.on_void = cache.void if isinstance(cache, OffloadedCache) else None
        scheduler = Scheduler(pool, self.batch_size, self.chunk, reserve_answer=False)
        engine = Engine(scheduler, ModelRunner(model, cache, Sampler(seed=3)))
        shared = random_tokens(100, SMALL, seed=99)
        live = [
            engine.submit(
                Request(
                    f"r{i}",
                    (*shared[:num_shared], *random_tokens(num_own, SMALL, seed=i)),
                    self.new_tokens,
                    self.temperature,
                    stop_at_eos=False,
                )
            )
            for i, (num_shared, num_own) in enumerate(self.lengths)
        ]
        for _ in engine.run():
            pass
        chosen = [[row for s in layer for row in s.positions.tolist()] for layer in log.by_layer]
        return [one.answer for one in live], chosen, sum(one.num_preemptions for one in live)

    def all_hbm(self) -> KVCache:
        return model_of(self.dtype).new_cache(self.num_blocks, BLOCK)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=4))
    new_tokens = draw(st.integers(1, 12))
    longest = -(-(max(map(sum, lengths)) + new_tokens) // BLOCK)
    return Case(
        lengths=lengths,
        new_tokens=new_tokens,
        batch_size=draw(st.integers(1, 3)),
        chunk=draw(st.sampled_from([5, 16, 64])),
        num_blocks=longest + draw(st.integers(0, 20)),
        prefix_caching=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.0, 0.9])),
        dtype=draw(st.sampled_from(["fp32", "bf16"])),
    )


def check_conservation(cache: OffloadedCache) -> None:
    """What the cache counted is what the stores saw."""
    total, tiers = cache.total, cache.tiers
    for tier, stats in enumerate(tiers.stats()):
        if stats is not None:
            assert stats.hit_units == tiers.read_units[tier]
            assert stats.stored_units == tiers.written_units[tier]
            assert stats.missed_units == stats.errors == 0
    parts = (total.missed_units, total.refetched_units, total.refilled_units, total.prefetched_units)
    assert total.fetched_units == sum(parts)
    assert total.written_units <= total.evicted_units
    assert total.missed_units <= total.requested_units


@settings(max_examples=examples(6), deadline=None)
@given(cases(), st.data())
def test_the_same_run_at_any_capacity(case: Case, data: st.DataObject) -> None:
    expected = case.serve(case.all_hbm())
    model = model_of(case.dtype)
    granularity = data.draw(st.sampled_from(GRANULARITIES))
    staged = data.draw(st.booleans())
    whole = offloaded(model, case.num_blocks, case.num_blocks, granularity, staged=staged)
    assert case.serve(whole) == expected
    assert whole.total.fetched_units == whole.total.evicted_units == 0, "all of it fits HBM"

    smallest = max(1, -(-whole.peak_units * whole.unit_tokens // BLOCK))
    between = data.draw(st.integers(smallest, case.num_blocks))
    for hbm_blocks in {smallest, between}:
        cache = offloaded(
            model,
            case.num_blocks,
            hbm_blocks,
            granularity,
            staged=staged,
            policy=data.draw(st.sampled_from(["lru", "fifo", "sieve"])),
            prefetch=data.draw(st.sampled_from(get_args(PrefetchKind))),
            local_units=data.draw(st.none() | st.integers(1, 4 * case.num_blocks)),
            index_keys=data.draw(st.booleans()),
        )
        assert case.serve(cache) == expected
        assert cache.total.requested_units == whole.total.requested_units
        check_conservation(cache)


def test_the_cases_hold_preemption_shared_prefixes_and_traffic() -> None:
    """One that is known to have all of it, so that the property above is not of idle runs."""
    case = Case([(48, 20), (48, 31), (48, 9), (0, 40)], 24, 3, 16, 20, True, 0.0, "fp32")
    expected = case.serve(case.all_hbm())
    assert expected[2] > 0, "somebody is preempted"
    whole = offloaded(model_of("fp32"), case.num_blocks, case.num_blocks)
    assert case.serve(whole) == expected
    cache = offloaded(model_of("fp32"), case.num_blocks, whole.peak_units)
    assert whole.peak_units < case.num_blocks
    assert case.serve(cache) == expected
    total = cache.total
    assert min(total.missed_units, total.hit_units, total.written_units) > 0
    assert total.written_units < total.evicted_units, "clean victims are not written back"
    check_conservation(cache)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_below_the_smallest_capacity_one_clear_line(granularity: Granularity) -> None:
    case = Case([(0, 90), (0, 80)], 8, 2, 64, 26, False, 0.0, "fp32")
    whole = offloaded(model_of("fp32"), case.num_blocks, case.num_blocks, granularity)
    expected = case.serve(whole)
    smallest = -(-whole.peak_units * whole.unit_tokens // BLOCK)
    assert smallest > 1
    cache = offloaded(model_of("fp32"), case.num_blocks, smallest - 1, granularity)
    with pytest.raises(UserError, match=r"a step reads \d+ blocks .*use --hbm-blocks \d+ at least"):
        case.serve(cache)
    enough = offloaded(model_of("fp32"), case.num_blocks, smallest, granularity)
    assert case.serve(enough) == expected


def test_hbm_of_nothing_and_a_store_of_other_units_are_refused() -> None:
    with pytest.raises(UserError, match="--hbm-blocks 0: use at least 1"):
        offloaded(model_of("fp32"), 4, 0)
    tiers = TierStack(MemoryStore(7), None, num_layers=SMALL.n_layers, units_per_layer=4)
    with pytest.raises(ValueError, match="the tiers keep units of 7 bytes"):
        OffloadedCache(model_of("fp32").setup, 4, BLOCK, tiers=tiers, hbm_blocks=2)


def decode(model: Transformer, cache: KVCache, position: int, token: int, blocks: list[int]) -> torch.Tensor:
    return model(Batch.build([Span(blocks, position, [token])], BLOCK), cache)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("staged", [False, True])
def test_a_unit_evicted_between_two_writes_keeps_both(granularity: Granularity, staged: bool) -> None:
    """Selections are forced away from the block being filled, so that it is evicted half full."""
    model, tokens = model_of("fp32"), random_tokens(100, SMALL)
    num_blocks, prompt = 12, 64
    plain = model.new_cache(num_blocks, BLOCK)
    cache = offloaded(model, num_blocks, 1, granularity, staged=staged)
    blocks = list(range(num_blocks))
    assert torch.equal(prefill(model, cache, tokens[:prompt], 24), prefill(model, plain, tokens[:prompt], 24))

    def elsewhere(layer_id: int, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        position = int(batch.positions[0])
        first = BLOCK * (position % 7)
        return torch.arange(first, first + BLOCK).unsqueeze(0)

    for one in (plain, cache):
        one.select_override = elsewhere
    for position in range(prompt, 80):
        expected = decode(model, plain, position, tokens[position], blocks)
        assert torch.equal(decode(model, cache, position, tokens[position], blocks), expected)
    total = cache.total
    assert total.written_units > 0
    assert (total.refilled_units > 0) == (granularity == "block"), "a row is written whole"
    for layer_id, latent in enumerate(plain.latent):  # every token, wherever it lies now
        everything = torch.arange(80).view(1, -1)
        assert torch.equal(cache.gather(layer_id, everything)[0], latent.flatten(0, 1)[:80])
    check_conservation(cache)


def test_one_batch_per_layer_and_decode_step() -> None:
    model = model_of("fp32")
    cache = offloaded(model, 24, 14)
    tables = [list(range(10)), list(range(10, 20))]
    for i, table in enumerate(tables):
        prefill(model, cache, random_tokens(70, SMALL, seed=i), 32, table)
    log = SelectionLog(model)
    seen_missed = 0
    for position in range(70, 78):
        log.clear()
        fetches: list[LayerFetch] = []
        before, batches = cache.total, cache.tiers.stats()[LOCAL].read_batches
        with cache.reporting(fetches.append):
            model(Batch.build([Span(table, position, [position]) for table in tables], BLOCK), cache)
        change = cache.total - before
        assert len(fetches) == SMALL.n_layers
        charged = useful = num_batches = 0
        for fetch, selections in zip(fetches, log.sets(), strict=True):
            assert (fetch.served_by >= 0).sum(1).tolist() == [len(positions) for positions in selections]
            units = fetch.bytes_read[:, LOCAL] // cache.unit_bytes
            tokens = fetch.bytes_useful[:, LOCAL] // cache.latent_bytes_per_token
            assert (units <= tokens).all() and (tokens <= (fetch.served_by == LOCAL).sum(1)).all()
            assert (fetch.bytes_written[:, HBM] == fetch.bytes_read[:, LOCAL]).all()
            charged, useful = charged + int(units.sum()), useful + int(tokens.sum())
            num_batches += bool(units.sum())
            assert (fetch.latency_us[LOCAL] == 0) and fetch.latency_us.shape == (3,), (
                "MemoryStore has no time"
            )
        assert charged == change.missed_units and change.refetched_units == 0
        assert change.fetched_units == change.missed_units + change.refilled_units
        assert useful == sum(int((fetch.served_by == LOCAL).sum()) for fetch in fetches), "no block is shared"
        batches = cache.tiers.stats()[LOCAL].read_batches - batches
        assert 0 <= batches - num_batches <= change.refilled_units
        seen_missed += change.missed_units
    assert seen_missed > 0


def test_a_lost_unit_is_never_read_as_something_else() -> None:
    model, tokens = model_of("fp32"), random_tokens(60, SMALL)
    cache = offloaded(model, 8, 4)
    prefill(model, cache, tokens[:56], 56)
    absent = np.flatnonzero(~cache.layers[0].is_here(np.arange(7)))
    assert len(absent) == 3
    cache.tiers.drop(0, absent)
    cache.select_override = lambda layer, batch, positions: torch.from_numpy(absent * BLOCK).unsqueeze(0)
    with pytest.raises(
        UnitsLost, match=r"layer 0: the tiers have lost what was selected \(3 units\)"
    ) as raised:
        decode(model, cache, 56, 1, list(range(8)))
    assert raised.value.block_ids == set(absent.tolist())
    assert not cache.layers[0].is_here(raised.value.units).any(), "nor is it taken for resident"


def test_a_full_store_fails_the_write_back() -> None:
    model = model_of("fp32")
    cache = offloaded(model, 8, 4, capacity=3)
    with pytest.raises(UnitsLost, match=r"the tiers do not take what leaves HBM: they are full \(\d units\)"):
        prefill(model, cache, random_tokens(60, SMALL), 16)


def test_reallocated_blocks_are_not_fetched_for_what_they_held() -> None:
    model = model_of("fp32")
    cache = offloaded(model, 8, 8)
    for seed in range(3):
        prefill(model, cache, random_tokens(64, SMALL, seed=seed), 16)
    assert cache.total.fetched_units == cache.total.written_units == 0


def test_void_blocks_are_written_nowhere() -> None:
    model = model_of("fp32")
    cache = offloaded(model, 8, 4)
    prefill(model, cache, random_tokens(32, SMALL), 16)
    cache.void([0, 1, 2, 3])
    prefill(model, cache, random_tokens(32, SMALL, seed=1), 16, [4, 5, 6, 7])
    assert cache.total.evicted_units == cache.total.written_units == 0
