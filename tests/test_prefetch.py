"""Prefetching: what a guess brings in time, and what it brings in vain."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dsatrace.kv.tiers.fetches import FetchCounters
from dsatrace.kv.tiers.stack import TierStack
from dsatrace.model.batch import Batch, Span
from dsatrace.runner.offload.cache import OffloadedCache, unit_bytes
from dsatrace.runner.offload.prefetch import Prefetcher
from dsatrace.runner.settings import PrefetchKind
from helpers.memory_store import MemoryStore
from helpers.models import SMALL, prefill, random_model, random_tokens

BLOCK, NUM_BLOCKS, HBM_BLOCKS = 8, 16, 6
PROMPT = 100
MODEL = random_model(dataclasses.replace(SMALL, index_topk=6))


def decode_with(
    kind: PrefetchKind, chosen: Callable[[int], list[int]], num_steps: int = 6
) -> tuple[Prefetcher, list[FetchCounters]]:
    """Decodes with forced selections: in step s every layer selects a token of each block `chosen(s)`.

    Returns what each layer did in these steps.
    """
    tiers = TierStack(
        MemoryStore(unit_bytes(MODEL.setup, BLOCK, "block")),
        None,
        num_layers=SMALL.n_layers,
        units_per_layer=NUM_BLOCKS,
    )
    cache = OffloadedCache(MODEL.setup, NUM_BLOCKS, BLOCK, tiers=tiers, hbm_blocks=HBM_BLOCKS, prefetch=kind)
    prefill(MODEL, cache, random_tokens(PROMPT, SMALL), 32)
    before = [dataclasses.replace(layer.counters) for layer in cache.layers]

    def select(layer_id: int, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        step = int(batch.positions[0]) - PROMPT
        return torch.tensor([[block * BLOCK for block in chosen(step)]])

    cache.select_override = select
    for step in range(num_steps):
        MODEL(Batch.build([Span(range(NUM_BLOCKS), PROMPT + step, [step])], BLOCK), cache)
    cache.prefetcher.close()
    return cache.prefetcher, [layer.counters - then for layer, then in zip(cache.layers, before, strict=True)]


def test_the_layer_before_is_a_perfect_guess_where_layers_agree() -> None:
    """All but layer 0 find everything in HBM."""

    def chosen(step: int) -> list[int]:
        return [2 * (step % 4), 2 * (step % 4) + 1]

    prefetcher, guessed = decode_with("previous-layer", chosen)
    nobody, plain = decode_with("none", chosen)
    assert guessed[0].missed_units == plain[0].missed_units > 0
    for with_guess, without in zip(guessed[1:], plain[1:], strict=True):
        assert with_guess.missed_units == 0
        assert with_guess.used_units == with_guess.prefetched_units == without.missed_units
    told = prefetcher.to_json()
    assert told is not None and told["precision"] == 1.0
    misses = sum(counters.missed_units for counters in plain)
    assert told["recall"] == (misses - plain[0].missed_units) / misses
    assert nobody.to_json() is None


def test_the_step_before_is_no_guess_where_it_is_still_in_hbm() -> None:
    """Least recently used, so what the last step selected is the last to go: there is nothing to fetch."""

    def chosen(step: int) -> list[int]:
        return [2 * (step % 4), 2 * (step % 4) + 1]

    prefetcher, guessed = decode_with("previous-step", chosen)
    _, plain = decode_with("none", chosen)
    told = prefetcher.to_json()
    assert told == {
        "units": 0,
        "used_units": 0,
        "missed_units": sum(counters.missed_units for counters in plain),
        "recall": 0.0,
        "precision": None,
    }
    assert guessed == plain


def test_a_guess_is_fetched_in_a_thread_and_join_raises_its_error() -> None:
    threads = []

    def fetch(layer_id: int, units: np.ndarray) -> np.ndarray:
        threads.append(threading.current_thread())
        if layer_id == 2:
            raise RuntimeError("the store is gone")
        return units

    prefetcher = Prefetcher("previous-layer", 3, fetch)
    prefetcher.start(0)  # nothing to go by
    prefetcher.join()
    prefetcher.selected(0, np.array([1, 2]), num_missed=2)
    prefetcher.start(1)
    prefetcher.join()
    prefetcher.selected(1, np.array([2, 3]), num_missed=1)
    assert (prefetcher.fetched_units, prefetcher.used_units) == ([0, 2, 0], [0, 1, 0])
    assert threads[0] is not threading.current_thread()
    prefetcher.start(2)
    prefetcher.wait()  # raises nothing: that is for who joins
    with pytest.raises(RuntimeError, match="the store is gone"):
        prefetcher.join()
    prefetcher.join()  # it is not raised twice
    prefetcher.close()
