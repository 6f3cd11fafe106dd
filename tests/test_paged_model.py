"""The paged cache, chunked prefill and mixed batches change nothing about what is computed.

In float64 with nothing forgiven: selections and logits' argmax are compared exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.model.batch import Batch, Span
from helpers.models import SMALL, SelectionLog, new_cache, prefill, random_model, random_tokens
from helpers.power import examples

ARGS = dataclasses.replace(SMALL, dtype="fp64")


@pytest.fixture(scope="module")
def model():
    return random_model(ARGS)


def selections_by_step(model, tokens):
    """The reference: one token a forward, blocks in order."""
    log = SelectionLog(model)
    cache = new_cache(model, len(tokens))
    logits = [prefill_one(model, cache, tokens, i) for i in range(len(tokens))]
    return log.sets(), torch.stack(logits)


def prefill_one(model, cache, tokens, i):
    span = Span(list(range(cache.num_blocks)), i, [tokens[i]])
    return model(Batch.build([span], cache.block_size), cache)[0]


@pytest.fixture(scope="module")
def by_step(model):
    """`selections_by_step` of `random_tokens(160)` by seed; of a beginning they are a beginning."""
    return functools.cache(lambda seed: selections_by_step(model, random_tokens(160, ARGS, seed)))


@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 160])
def test_chunks_of_any_size_select_what_decode_selects(model, by_step, chunk):
    tokens = random_tokens(160, ARGS)
    expected, logits = by_step(0)
    log = SelectionLog(model)
    last = prefill(model, new_cache(model, 160), tokens, chunk)
    assert log.sets() == expected
    torch.testing.assert_close(last, logits[-1], rtol=0, atol=1e-10)


@settings(max_examples=examples(6))
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    block=st.integers(1, 24),
    seed=st.integers(0, 99),
)
def test_any_batch_over_scattered_blocks(model, by_step, lengths, block, seed):
    """Requests of any lengths, prefilled and decoded together in shuffled blocks, equal each alone."""
    rng = random.Random(seed)
    num_steps = 3
    prompts = [random_tokens(160, ARGS, seed=i)[: n + num_steps] for i, n in enumerate(lengths)]
    needed = [-(-len(p) // block) for p in prompts]
    ids = list(range(sum(needed)))
    rng.shuffle(ids)
    tables = [[ids.pop() for _ in range(n)] for n in needed]
    cache = model.new_cache(sum(needed), block)

    log = SelectionLog(model)
    spans = [Span(t, 0, p[:n]) for t, p, n in zip(tables, prompts, lengths, strict=True)]
    model(Batch.build(spans, block), cache)
    together = [log.sets()]
    for step in range(num_steps):
        log.clear()
        spans = [Span(t, n + step, [p[n + step]]) for t, p, n in zip(tables, prompts, lengths, strict=True)]
        logits = model(Batch.build(spans, block), cache)
        together.append(log.sets())

    row = 0
    for i, length in enumerate(lengths):
        expected, alone_logits = by_step(i)
        for layer in range(ARGS.n_layers):
            assert together[0][layer][row : row + length] == expected[layer][:length]
            for step in range(num_steps):
                assert together[1 + step][layer][i] == expected[layer][length + step]
        torch.testing.assert_close(logits[i], alone_logits[length + num_steps - 1], rtol=0, atol=1e-10)
        row += length


def test_no_path_returns_a_future_position(model):
    log = SelectionLog(model)
    prefill(model, new_cache(model, 120), random_tokens(120, ARGS), 40)
    for layer in log.sets():
        for position, selected in enumerate(layer):
            assert max(selected) <= position
            assert len(selected) == min(ARGS.index_topk, position + 1)


def test_forced_selections_enter_at_resolve(model):
    """Replaying recorded selections through `select_override` gives the same logits, other ones do not."""
    tokens = random_tokens(90, ARGS)
    log = SelectionLog(model)
    expected = prefill(model, new_cache(model, 90), tokens, 90)
    recorded = [selections[0].positions for selections in log.by_layer]

    cache = new_cache(model, 90)
    cache.select_override = lambda layer, batch, positions: recorded[layer]
    assert torch.equal(prefill(model, cache, tokens, 90), expected)

    cache = new_cache(model, 90)
    cache.select_override = lambda layer, batch, positions: batch.positions.unsqueeze(1)  # itself only
    assert not torch.allclose(prefill(model, cache, tokens, 90), expected)


def test_yarn_comes_from_the_model_not_from_the_cache_length():
    tokens = random_tokens(60, ARGS)
    logits = []
    for max_seq_len in (64, 4096):
        model = random_model(dataclasses.replace(ARGS, max_seq_len=max_seq_len))
        logits.append(prefill(model, new_cache(model, 60), tokens, 60))
    assert torch.equal(*logits)


def test_the_two_rotary_layouts_differ():
    """DeepSeek's first demo rotated the indexer in interleaved pairs: other selections, same shapes."""
    tokens = random_tokens(120, ARGS)
    found = []
    for layout in ("half_split", "interleaved"):
        model = random_model(dataclasses.replace(ARGS, index_rope=layout))
        log = SelectionLog(model)
        prefill(model, new_cache(model, 120), tokens, 120)
        found.append(log.sets()[0][ARGS.index_topk :])
    assert found[0] != found[1]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_cache_takes_the_memory_of_what_was_written(model):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    cache = model.new_cache(num_blocks=1 << 17, block_size=16)
    whole = (1 << 21) * cache.bytes_per_token
    assert whole > 1 << 30
    prefill(model, cache, random_tokens(16, ARGS), chunk=16)
    assert resident() - before < whole / 16
    assert cache.latent[0][0].any() and not cache.latent[0][-1].any() and not cache.index_k[0][-1].any()
