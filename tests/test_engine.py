"""The serving loop: scheduling, blocks, and answers that do not depend on who shares the batch."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import INFERENCE
from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.clock import VirtualClock
from dsatrace.engine.engine import Engine
from dsatrace.engine.engine import serve as serve_arrivals
from dsatrace.engine.scheduler import Scheduler
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.errors import UserError
from dsatrace.runner.model_runner import ModelRunner
from dsatrace.runner.sampler import Sampler
from dsatrace.runner.settings import ModelSettings
from dsatrace.runner.setup import load_model, num_cache_blocks, open_engine
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.tracer import Tracer
from dsatrace.workloads.request import Request
from helpers.models import SMALL, SelectionLog, random_model, random_tokens, without_rounding
from helpers.trace_samples import RUN, SECRET

BLOCK = 16
CPU = torch.device("cpu")
NEW_TOKENS = 6
LENGTHS = (130, 1, 47, 64, 90)
TEMPERATURES = (0.0, 0.9)


def new_engine(
    model,
    num_tokens: int = 1024,
    batch_size: int = 8,
    chunk: int = 32,
    stop=frozenset(),
    tracer: Tracer | None = None,
    prefix_caching: bool = False,
) -> Engine:
    pool = new_pool(num_tokens // BLOCK, BLOCK, prefix_caching)
    cache = model.new_cache(pool.blocks.num_blocks, BLOCK)
    runner = ModelRunner(model, cache, Sampler(seed=3), tracer=tracer)
    return Engine(Scheduler(pool, batch_size, chunk, stop), runner, tracer)


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


@pytest.fixture(scope="module")
def alone(exact_model) -> dict[float, dict[str, list[int]]]:
    """The answers of each temperature, each request alone, one token a chunk."""
    return {
        temperature: {
            name: answer
            for request in requests(exact_model.args, temperature)
            for name, answer in serve(new_engine(exact_model, batch_size=1, chunk=1), [request]).items()
        }
        for temperature in TEMPERATURES
    }


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 32), (2, 7), (3, 64), (8, 1024)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_same_tokens_at_any_batch_and_chunk_size(exact_model, alone, batch_size, chunk, temperature):
    """In float64, nothing forgiven: each request alone, one token a chunk, against every batch."""
    wanted = requests(exact_model.args, temperature)
    together = serve(new_engine(exact_model, batch_size=batch_size, chunk=chunk), wanted)
    assert together == alone[temperature]
    assert {len(answer) for answer in together.values()} == {NEW_TOKENS}


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


def test_a_request_that_never_fits_is_rejected(exact_model):
    engine = new_engine(exact_model, num_tokens=64)
    wanted = requests(exact_model.args)
    live = [engine.submit(request) for request in wanted]
    for _ in engine.run():
        pass
    assert [one.state for one in live] == ["rejected", "length", "length", "rejected", "rejected"]
    assert live[0].error == (
        "request r0: prompt of 130 tokens and 6 new ones do not fit the KV cache of 64 tokens; "
        "shorten the prompt, lower --max-new-tokens or raise --cache-blocks"
    )
    assert live[0].admitted_s is None and live[0].finish_s is None
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def traced(model, folder: Path, wanted: list[Request], **changes) -> tuple[dict, dict[tuple, list], int]:
    """Answers and selections by (request, step, layer), and how often somebody was preempted."""
    config = TraceConfig(out=folder, block_size=BLOCK, prefill="last")
    with Tracer(config, RUN, secret=SECRET) as tracer:
        engine = new_engine(model, tracer=tracer, **changes)
        live = [engine.submit(request) for request in wanted]
        for _ in engine.run():
            engine.scheduler.pool.check_integrity()
    selections: dict[tuple, list] = {}
    for line in (folder / "trace_steps.jsonl").read_text().splitlines():
        record = json.loads(line)
        key = record["request_id"], record["step_idx"], record["layer_id"]
        assert key not in selections, "a step stands in the trace once, however often it was computed"
        selections[key] = [record["phase"], record["seq_len_current"], record["selected_token_pos"]]
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    assert {line["request_id"]: line["num_preemptions"] for line in lines} == {
        one.request_id: one.num_preemptions for one in live
    }
    return {one.request_id: one.answer for one in live}, selections, sum(one.num_preemptions for one in live)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_preemption_leaves_no_trace_in_tokens_and_selections(exact_model, tmp_path, temperature):
    """In float64, nothing forgiven: alone, in a batch, and in a cache so small that they give way."""
    long_answers = [
        dataclasses.replace(request, max_new_tokens=20) for request in requests(exact_model.args, temperature)
    ]
    alone: tuple[dict, dict] = {}, {}
    for request in long_answers:
        answers, selections, _ = traced(exact_model, tmp_path / request.request_id, [request], batch_size=1)
        alone[0].update(answers)
        alone[1].update(selections)
    batch = traced(exact_model, tmp_path / "batch", long_answers)
    assert batch[:2] == alone and batch[2] == 0
    for num_tokens in (160, 224):
        tight = traced(exact_model, tmp_path / f"{num_tokens}", long_answers, num_tokens=num_tokens, chunk=16)
        assert tight[:2] == alone and tight[2] == 2
    # One prefill record a prompt, and one for each token but the first, in every layer.
    assert len(alone[1]) == len(LENGTHS) * 20 * exact_model.args.n_layers


def test_who_does_not_stop_at_the_end_token_goes_on(exact_model):
    (first, *_) = requests(exact_model.args)
    (answer,) = serve(new_engine(exact_model), [first]).values()
    stop = frozenset({answer[2]})
    goes_on = dataclasses.replace(first, stop_at_eos=False)
    assert serve(new_engine(exact_model, stop=stop), [goes_on]) == {"r0": answer}


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


SETTINGS = EngineSettings(cache_block_size=16)


@pytest.mark.parametrize(
    ("cache_blocks", "longest", "budget_blocks", "num_blocks"),
    [
        (None, 100, 0, 4 * 7),  # a batch of the longest, whatever it takes
        (None, None, 1000, 4 * 64),  # any may have 1024 tokens
        (None, None, 100, 100),
        (None, None, 3, 64),  # but one of them always fits
        (9, 100, 1000, 9),
        (9, None, 1000, 9),
    ],
)
def test_how_large_the_cache_is(cache_blocks, longest, budget_blocks, num_blocks):
    settings = dataclasses.replace(SETTINGS, cache_blocks=cache_blocks)
    assert num_cache_blocks(settings, 1024, longest, 4, budget_blocks) == num_blocks


def test_a_longest_request_that_never_fits_is_refused():
    with pytest.raises(UserError, match="need 1025 tokens of KV, --max-seq-len is 1024"):
        num_cache_blocks(SETTINGS, 1024, 1025, 4, 1000)
    with pytest.raises(UserError, match=r"--cache-blocks 6: .* need 100 tokens of KV, 7 blocks of 16"):
        num_cache_blocks(dataclasses.replace(SETTINGS, cache_blocks=6), 1024, 100, 4, 1000)
    with pytest.raises(UserError, match="--cache-blocks 0: use at least 1"):
        dataclasses.replace(SETTINGS, cache_blocks=0)


def test_an_opened_engine_serves_arrivals_in_a_small_cache(tiny_checkpoint, tmp_path):
    """Requests of unknown length: one is rejected, the others give way to each other."""
    settings = ModelSettings(
        tiny_checkpoint, INFERENCE / "config_tiny.json", cache_block_size=16, cache_blocks=8
    )
    model = load_model(settings, CPU)
    arrivals = [
        Request(f"r{i}", tuple(random_tokens(n, model.args, i)), 30, arrival_s=500.0 * (n > 60))
        for i, n in enumerate((40, 50, 200, 64, 60, 64))
    ]
    arrivals.sort(key=lambda request: request.arrival_s)
    trace = TraceConfig(out=tmp_path / "run")
    serving = {"mode": "continuous", "clock": "virtual"}
    run = RunSettings(
        clock=VirtualClock(),
        judge=lambda live: 1.0,
        trace=trace,
        info=partial(RunInfo, serving=serving),
        first_forward_idx=7,
    )
    with open_engine(model, settings, CPU, run) as engine:
        assert not engine.scheduler.reserve_answer
        ended = {live.request_id: live for live in serve_arrivals(engine, arrivals)}
    assert ended.pop("r2").state == "rejected"
    assert {live.state for live in ended.values()} <= {"length", "stop"} and len(ended) == 5
    assert all(live.request.arrival_s <= live.admitted_s < live.finish_s for live in ended.values())
    assert 500 < max(live.finish_s for live in ended.values()) < 600
    assert sum(live.num_preemptions for live in ended.values()) > 0
    lines = [json.loads(line) for line in (trace.out / "requests.jsonl").read_text().splitlines()]
    assert {line["request_id"]: line["state"] for line in lines} == {
        "r2": "rejected",
        **{name: live.state for name, live in ended.items()},
    }
    assert {line["score"] for line in lines} == {None, 1.0}
    first = (trace.out / "trace_steps.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["forward_idx"] > 7
    assert json.loads((trace.out / "manifest.json").read_text())["serving"] == serving
    whole = dataclasses.replace(settings, cache_blocks=None)
    with open_engine(model, whole, CPU, RunSettings(longest=50)) as roomy:
        assert roomy.scheduler.reserve_answer
