"""What `dsatrace.attach` costs the model per layer and decode step, beside no hook and the usual one.

A small random model of DeepSeek-V3.2's family generates on the CPU, with top-k and context as they are in
practice; the prompt is computed once, and each turn goes on from its cache. Ways take turns: nothing
attached; an empty hook on every indexer; the naive hook (`.tolist()` of each output, a line of JSON); and
`attach`. Two figures, both of the thread that runs the model: the processor time inside the hooks that a way
registers, and how much longer a step takes, from one forward's begin to the next one's, in processor time and
on the clock. The second holds what the first leaves out (caches, waiting for the writer's thread), and needs
an idle machine. All are lower quartiles.

    python3 scripts/bench/attach.py
    python3 scripts/bench/attach.py --layers 16 --context 8192 --turns 10
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import Rows, announce

import dsatrace
from helpers.families import VOCABULARY, tiny_model

Way = Callable[[Any, Path], contextlib.AbstractContextManager[Any]]


class StepTimes(NamedTuple):
    """Of one `generate`, step by step, in microseconds."""

    cpu: list[float]
    wall: list[float]
    hooks: list[float]


def main() -> int:
    """Measures, prints the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--context", type=int, default=2200, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80, help="decode steps per turn")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = announce("torch", "transformers", threads=1)
    model = tiny_model(
        "deepseek_v32",
        num_hidden_layers=args.layers,
        index_topk=args.top_k,
        max_position_embeddings=2 * args.context,
    )
    prompt = torch.randint(3, VOCABULARY, (args.batch, args.context))
    ways: dict[str, Way] = {"nothing": nothing, "hook alone": empty_hook, "naive": naive, "attach": attached}
    with torch.inference_mode():
        cache = model(input_ids=prompt[:, :-1], use_cache=True).past_key_values
    times = {name: StepTimes([], [], []) for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns + 1):
            for name, way in ways.items():
                found = measure(model, prompt, cache, args.steps, way, Path(folder) / f"{name}{turn}")
                if turn:  # the first one warms up
                    for kept, new in zip(times[name], found, strict=True):
                        kept.extend(new)
    record = {
        "machine": about,
        **{name: getattr(args, name) for name in ("layers", "top_k", "context", "batch", "steps", "turns")},
        "step_us": {name: lower_quartiles(of_way) for name, of_way in times.items()},
    }
    plain = record["step_us"]["nothing"]
    record["us_per_layer_and_step"] = {
        name: {clock: (step[clock] - plain[clock]) / args.layers for clock in step}
        for name, step in record["step_us"].items()
        if name != "nothing"
    }
    title = f"us per layer and step; a step with nothing attached takes {plain['wall'] / 1000:.2f} ms"
    table = Rows(title, "way        ", "in hooks", "cpu", "wall", "ms a step")
    for name, cost in record["us_per_layer_and_step"].items():
        cells = (f"{cost[clock]:.1f}" for clock in ("hooks", "cpu", "wall"))
        table.add(name, *cells, f"{record['step_us'][name]['wall'] / 1000:.2f}")
    print(json.dumps(record))
    return 0


def measure(
    model: Any, prompt: torch.Tensor, cache: Any, num_steps: int, way: Way, folder: Path
) -> StepTimes:
    """Times between the forwards of one `generate`; the prompt's and the first step's are left out."""
    cache = copy.deepcopy(cache)
    begins: list[tuple[int, int, int]] = []
    in_hooks = [0]

    def begin(*args: Any) -> None:
        begins.append((time.thread_time_ns(), time.perf_counter_ns(), in_hooks[0]))

    handle = model.register_forward_pre_hook(begin)
    with timed_hooks(in_hooks), way(model, folder), torch.inference_mode():
        model.generate(
            input_ids=prompt,
            cache=cache,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_steps + 3,
            do_sample=False,
        )
    handle.remove()
    kept = begins[2:]
    spans = [
        [(after[clock] - before[clock]) / 1000 for before, after in itertools.pairwise(kept)]
        for clock in range(3)
    ]
    return StepTimes(*spans)


@contextlib.contextmanager
def timed_hooks(total_ns: list[int]) -> Iterator[None]:
    """Adds up the thread's time in every hook that is registered inside."""
    names = ("register_forward_hook", "register_forward_pre_hook")
    plain = {name: getattr(torch.nn.Module, name) for name in names}

    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.thread_time_ns()
            try:
                return hook(*args)
            finally:
                total_ns[0] += time.thread_time_ns() - start

        return call

    for name, register in plain.items():
        setattr(
            torch.nn.Module,
            name,
            lambda module, hook, register=register, **how: register(module, timed(hook), **how),
        )
    try:
        yield
    finally:
        for name, register in plain.items():
            setattr(torch.nn.Module, name, register)


def lower_quartiles(times: StepTimes) -> dict[str, float]:
    return {clock: statistics.quantiles(getattr(times, clock), n=4)[0] for clock in StepTimes._fields}


@contextlib.contextmanager
def nothing(model: Any, folder: Path) -> Iterator[None]:
    yield


@contextlib.contextmanager
def hooks(model: Any, hook: Callable[..., None]) -> Iterator[None]:
    """`hook(layer, output)` on every indexer."""

    def on(layer: int) -> Callable[..., None]:
        return lambda module, args, output: hook(layer, output)

    indexers = [module for module in model.modules() if type(module).__name__.endswith("Indexer")]
    handles = [indexer.register_forward_hook(on(layer)) for layer, indexer in enumerate(indexers)]
    yield
    for handle in handles:
        handle.remove()


def empty_hook(model: Any, folder: Path) -> contextlib.AbstractContextManager[None]:
    return hooks(model, lambda layer, output: None)


@contextlib.contextmanager
def naive(model: Any, folder: Path) -> Iterator[None]:
    """As it is usually written: ids to a list, a list to JSON, a line to a file."""
    with folder.open("w", encoding="utf-8") as file:

        def hook(layer: int, output: torch.Tensor) -> None:
            if output.shape[1] == 1:  # decode steps, as the other way records
                file.write(json.dumps({"layer": layer, "ids": output.tolist()}) + "\n")

        with hooks(model, hook):
            yield


def attached(model: Any, folder: Path) -> contextlib.AbstractContextManager[Any]:
    return dsatrace.attach(model, folder, selections="random_weights")


if __name__ == "__main__":
    sys.exit(main())
