"""The serving loop: scheduling, blocks, and answers that do not depend on who shares the batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsatrace.engine.engine import Engine
from dsatrace.engine.runner import ModelRunner
from dsatrace.engine.sampler import Sampler
from dsatrace.engine.scheduler import Scheduler
from dsatrace.errors import UserError
from dsatrace.kv.blocks import BlockPool
from dsatrace.workloads.request import Request
from models import SMALL, SelectionLog, random_model, random_tokens, without_rounding

BLOCK = 16
NEW_TOKENS = 6
LENGTHS = (130, 1, 47, 64, 90)


def new_engine(
    model, num_tokens: int = 1024, batch_size: int = 8, chunk: int = 32, stop=frozenset()
) -> Engine:
    pool = BlockPool(num_tokens // BLOCK, BLOCK)
    runner = ModelRunner(model, model.new_cache(pool.num_blocks, BLOCK))
    return Engine(Scheduler(pool, batch_size, chunk, stop), runner, Sampler(seed=3))


def requests(args, temperature: float = 0.0) -> list[Request]:
    return [
        Request(f"r{i}", tuple(random_tokens(n, args, seed=i)), NEW_TOKENS, temperature)
        for i, n in enumerate(LENGTHS)
    ]


def serve(engine: Engine, wanted: list[Request]) -> dict[str, list[int]]:
    live = [engine.submit(request) for request in wanted]
    for _ in engine.run():
        engine.scheduler.pool.check_integrity()
    return {one.request.request_id: one.answer for one in live}


@pytest.fixture(scope="module")
def exact_model():
    return random_model(dataclasses.replace(SMALL, dtype="fp64"))


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 32), (2, 7), (3, 64), (8, 1024)])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_same_tokens_at_any_batch_and_chunk_size(exact_model, batch_size, chunk, temperature):
    """In float64, nothing forgiven: each request alone, one token a chunk, against every batch."""
    wanted = requests(exact_model.args, temperature)
    together = serve(new_engine(exact_model, batch_size=batch_size, chunk=chunk), wanted)
    for request in wanted:
        alone = serve(new_engine(exact_model, batch_size=1, chunk=1), [request])
        assert together[request.request_id] == alone[request.request_id]
        assert len(together[request.request_id]) == NEW_TOKENS


def test_float32_first_difference_lies_within_rounding():
    """In float32 a batch may round differently; forced to the same selections and tokens, it stays close."""
    args = without_rounding(SMALL, n_heads=8)
    model = random_model(args)
    wanted = requests(args)
    record: dict[tuple, torch.Tensor] = {}
    logits: dict[tuple, torch.Tensor] = {}

    def run(engine: Engine, forced: bool) -> list[tuple[tuple, torch.Tensor]]:
        """Serves; records each row's selection and logits by (request, position), or replays them."""
        rows: list[tuple] = []
        worst: list[tuple[tuple, torch.Tensor]] = []

        def override(layer, batch, positions):
            for row, key in enumerate(rows):
                if forced:
                    replay = record[(*key, layer)]
                    positions[row] = -1
                    positions[row, : len(replay)] = replay
                else:
                    record[(*key, layer)] = positions[row][positions[row] >= 0].clone()
            return positions

        engine.runner.cache.select_override = override
        forward = engine.runner.forward

        def watched(step):
            rows[:] = [
                (w.live.request.request_id, w.first_pos + i) for w in step.work for i in range(w.num_tokens)
            ]
            out = forward(step)
            last = [(w.live.request.request_id, w.first_pos + w.num_tokens - 1) for w in step.work]
            for key, row in zip(
                [k for k, w in zip(last, step.work, strict=True) if w.wants_logits], out, strict=True
            ):
                if forced:
                    worst.append((key, (row - logits[key]).abs().max()))
                else:
                    logits[key] = row
            return out

        engine.runner.forward = watched
        answers = serve(engine, wanted)
        if forced:
            assert answers == expected
        else:
            expected.update(answers)
        return worst

    expected: dict[str, list[int]] = {}
    run(new_engine(model, batch_size=1, chunk=32), forced=False)
    worst = run(new_engine(model, batch_size=5, chunk=32), forced=True)
    assert len(worst) == len(LENGTHS) * NEW_TOKENS
    assert max(difference for _, difference in worst) < 1e-4


def test_decode_steps_and_end_states(exact_model):
    """N new tokens take N - 1 decode steps; a stop token ends early."""
    (first, *_) = requests(exact_model.args)
    engine = new_engine(exact_model)
    live = engine.submit(first)
    answer = [token for _, token in engine.run()]
    assert (live.state, live.num_decode_steps, live.answer) == ("length", NEW_TOKENS - 1, answer)

    stop = answer[2]
    engine = new_engine(exact_model, stop=frozenset({stop}))
    live = engine.submit(first)
    list(engine.run())
    assert (live.state, live.answer) == ("stop", answer[: answer.index(stop) + 1])


def test_a_full_cache_makes_requests_wait_and_frees_every_block(exact_model):
    wanted = requests(exact_model.args)
    roomy = serve(new_engine(exact_model), wanted)
    tight = new_engine(exact_model, num_tokens=144)
    assert serve(tight, wanted) == roomy
    assert tight.scheduler.pool.num_free == tight.scheduler.pool.num_blocks


def test_a_request_that_can_never_fit_is_refused(exact_model):
    engine = new_engine(exact_model, num_tokens=64)
    with pytest.raises(UserError, match=r"request r0: prompt of 130 tokens .* KV cache of 64 tokens"):
        engine.submit(requests(exact_model.args)[0])


def test_abort_ends_all_requests_and_the_engine_serves_on(exact_model):
    engine = new_engine(exact_model, batch_size=2)
    live = [engine.submit(request) for request in requests(exact_model.args)]
    for _ in range(8):
        engine.step()
    engine.request_abort()
    list(engine.run())
    assert {one.state for one in live} == {"aborted"}
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    again = [
        dataclasses.replace(request, request_id=f"again {i}") for i, request in enumerate(requests(SMALL))
    ]
    assert all(len(answer) == NEW_TOKENS for answer in serve(engine, again).values())


def test_blocks_of_a_finished_request_are_reused_without_a_trace(exact_model):
    """The second round runs in the first one's dirty blocks."""
    wanted = requests(exact_model.args)
    engine = new_engine(exact_model, num_tokens=288)
    first = serve(engine, wanted)
    again = [dataclasses.replace(request, request_id=f"again {request.request_id}") for request in wanted]
    log = SelectionLog(exact_model)
    assert list(serve(engine, again).values()) == list(first.values())
    assert log.by_layer[0]
    for indexer in exact_model.indexers:
        indexer.on_select = None
