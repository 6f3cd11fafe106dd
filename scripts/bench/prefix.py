"""How fast block keys and the replay of a trace are, beside commonly written code and vLLM.

Sections, by default all: `keys` (tokens hashed per second), `replay` (the same hits by every method),
`memory` (ten million accesses). Methods take turns on the same requests, each on one thread; the
figure is CPU time, the least of several turns. Ratios are what counts: absolute times move with the
machine. The replay uses recorded requests from `--requests` (a JSON list of `{prompt, output}`,
gzipped or not) beside synthetic ones; vLLM joins if it is installed.

    python3 scripts/bench/prefix.py                    # half a minute
    python3 scripts/bench/prefix.py keys replay --requests synthetic_requests.json.gz
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import itertools
import json
import pickle
import resource
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import Rows, announce

from dsatrace.kv.blocks import BlockPool, OutOfBlocks
from dsatrace.kv.prefix import KeyChain
from dsatrace.kv.prefix_pool import HeldBlocks, PrefixPool
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay import ReplayConfig, replay

SECRET = b"a benchmark has no secrets......"
VOCABULARY = 128_000
BLOCK_SIZE, NUM_BLOCKS, CONCURRENCY = 16, 400, 8
PICKLED, DICTIONARY, PLAIN = (
    "sha256 over pickled tuples", "dictionary of hashes, LRU", "our pool in Python, sha256"
)  # fmt: skip
Requests = tuple[list[list[int]], list[list[int]]]
"""Token ids of prompts and of outputs, as Python lists."""
Row = dict[str, Any]
METHOD = f"{'method':28} "


def best_of(turns: int, methods: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Each method's least CPU time in seconds, taking turns, and what it returned last."""
    seconds = dict.fromkeys(methods, float("inf"))
    returned: dict[str, Any] = {}
    for _ in range(turns):
        for name, method in methods.items():
            returned.pop(name, None)
            start = time.process_time()
            returned[name] = method()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds, returned


def conversations(num_requests: int, seed: int) -> Requests:
    """Turns of many chats in random order. A prompt is a system prompt, all turns so far and a question."""
    rng = np.random.default_rng(seed)
    systems = [rng.integers(0, VOCABULARY, n).tolist() for n in (50, 115, 300)]
    chats: list[list[int]] = []
    prompts, outputs = [], []
    for _ in range(num_requests):
        if not chats or rng.random() < 0.3:
            chats.append(systems[rng.integers(len(systems))])
        which = int(rng.integers(max(0, len(chats) - 20), len(chats)))
        prompt = chats[which] + rng.integers(0, VOCABULARY, rng.integers(10, 120)).tolist()
        output = rng.integers(0, VOCABULARY, rng.integers(20, 150)).tolist()
        chats[which] = prompt + output
        prompts.append(prompt)
        outputs.append(output)
    return prompts, outputs


def pickled_keys(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """sha256 over the pickled tuple of parent and tokens: vLLM's default."""
    keys: list[bytes] = []
    parent = b""
    for end in range(block_size, len(tokens) + 1, block_size):
        block = (parent, tuple(tokens[end - block_size : end]), None)
        parent = hashlib.sha256(pickle.dumps(block, protocol=pickle.HIGHEST_PROTOCOL)).digest()
        keys.append(parent)
    return keys


def chained_keys(tokens: Sequence[int], block_size: int) -> list[bytes]:
    chain = KeyChain(block_size, SECRET)
    chain.extend(tokens)
    return chain.keys


def bench_keys(flags: argparse.Namespace) -> Iterator[Row]:
    """Tokens hashed per second, by block size."""
    sequences = [prompt + output for prompt, output in zip(*flags.made, strict=True)]
    arrays = [np.array(tokens, np.int32) for tokens in sequences]
    num_tokens = sum(map(len, sequences))
    for block_size in (16, 64):
        methods: dict[str, Callable[[], Any]] = {
            PICKLED: partial(_each, pickled_keys, sequences, block_size),
            "keyed chain (live)": partial(_each, chained_keys, sequences, block_size),
            "exact ids, from lists": partial(BlockTrace.from_tokens, sequences, block_size=block_size),
            "exact ids, from arrays": partial(BlockTrace.from_tokens, arrays, block_size=block_size),
        }
        seconds, named = best_of(flags.turns, methods)
        first, *others = named.values()
        distinct = len({key for keys in first for key in keys})
        assert len({key for keys in others[0] for key in keys}) == others[1].num_keys == distinct
        for name, took in seconds.items():
            yield {"block_size": block_size, "method": name, "mtokens_per_s": num_tokens / took / 1e6,
                   "ratio": seconds[PICKLED] / took}  # fmt: skip


def _each(
    keys_of: Callable[[Sequence[int], int], list[bytes]], sequences: Sequence[list[int]], block_size: int
) -> list[list[bytes]]:
    return [keys_of(tokens, block_size) for tokens in sequences]


def dictionary_lru(prompts: Sequence[Sequence[int]]) -> list[int | None]:
    """What is commonly written: a dictionary of hashes in LRU order, one request at a time, no pins and
    no partial blocks."""
    cached: OrderedDict[bytes, None] = OrderedDict()
    hits: list[int | None] = []
    for tokens in prompts:
        keys = pickled_keys(tokens, BLOCK_SIZE)
        num_hits = next((i for i, key in enumerate(keys) if key not in cached), len(keys))
        for key in reversed(keys):
            cached[key] = None
            cached.move_to_end(key)
        while len(cached) > NUM_BLOCKS:
            cached.popitem(last=False)
        hits.append(min(num_hits, (len(tokens) - 1) // BLOCK_SIZE) * BLOCK_SIZE)
    return hits


def python_pool(requests: Requests, decode: bool) -> list[int | None]:
    """vLLM's rules in plain Python, over the engine's pool, with keys hashed as in vLLM."""
    pool = PrefixPool(BlockPool(NUM_BLOCKS, BLOCK_SIZE, null_block=True, free_order="new"))
    live: deque[HeldBlocks] = deque()
    answers: list[int | None] = []

    def with_room(act: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            try:
                return act(*arguments)
            except OutOfBlocks:
                if not live:
                    raise
                pool.release(live.popleft())

    for prompt, output in zip(*requests, strict=True):
        if len(live) == CONCURRENCY:
            pool.release(live.popleft())
        keys = pickled_keys(prompt + output if decode else prompt, BLOCK_SIZE)
        try:
            held = with_room(pool.admit, keys, len(prompt))
        except OutOfBlocks:
            answers.append(None)
            continue
        for n in range(len(output) if decode else 0):
            with_room(pool.grow, held, len(prompt) + n + 1)
        answers.append(held.num_hit_tokens)
        live.append(held)
    return answers


def fast_replay(
    prompts: Sequence[Any], outputs: Sequence[Any], decode: bool, trace: BlockTrace | None = None
) -> list[int | None]:
    """Our replay; `trace`: ids made before, so that only the replay is timed."""
    made = trace or BlockTrace.from_tokens(prompts, outputs if decode else None, block_size=BLOCK_SIZE)
    result = replay(made, ReplayConfig(NUM_BLOCKS, CONCURRENCY, decode=decode, null_block=True))
    pairs = zip(result.hit_tokens.tolist(), result.served.tolist(), strict=True)
    return [hits if served else None for hits, served in pairs]


def vllm_manager(requests: Requests, decode: bool) -> list[int | None]:
    from helpers.vllm_manager import RealManager

    found: list[int | None] = RealManager(BLOCK_SIZE, NUM_BLOCKS).run(requests, CONCURRENCY, decode)
    return found


def replay_methods(requests: Requests, decode: bool) -> dict[str, Callable[[], Any]]:
    prompts, outputs = requests
    arrays = [[np.array(tokens, np.int32) for tokens in part] for part in requests]
    trace = BlockTrace.from_tokens(prompts, outputs, block_size=BLOCK_SIZE)
    methods: dict[str, Callable[[], Any]] = {
        DICTIONARY: partial(dictionary_lru, prompts),
        PLAIN: partial(python_pool, requests, decode),
        "replay, from lists": partial(fast_replay, prompts, outputs, decode),
        "replay, from arrays": partial(fast_replay, arrays[0], arrays[1], decode),
        "replay, ids made before": partial(fast_replay, prompts, outputs, decode, trace),
    }
    if importlib.util.find_spec("vllm") is not None:
        methods["vLLM's KVCacheManager"] = partial(vllm_manager, requests, decode)
    return methods


def bench_replay(flags: argparse.Namespace) -> Iterator[Row]:
    """Prompt tokens per second; all methods but `DICTIONARY` have the same hits."""
    sources = {"made": flags.made}
    if flags.requests is not None:
        sources = {flags.requests.name: read_requests(flags.requests), **sources}
    for (source, requests), decode in itertools.product(sources.items(), (False, True)):
        num_tokens = sum(map(len, requests[0]))
        seconds, answers = best_of(flags.turns, replay_methods(requests, decode))
        for name, took in seconds.items():
            same = answers[name] == answers[PLAIN]
            assert same or name == DICTIONARY, f"{name}: other hits"
            yield {"requests": source, "decode": decode, "method": name,
                   "mtokens_per_s": num_tokens / took / 1e6, "ratio": seconds[DICTIONARY] / took,
                   "hit_tokens": sum(hits or 0 for hits in answers[name]), "same_hits": same}  # fmt: skip


def long_trace(num_accesses: int, seed: int) -> BlockTrace:
    """Chats of growing prompts as block ids alone: about `num_accesses` blocks in all."""
    rng = np.random.default_rng(seed)
    turns, step = 10, 18  # a chat's turn t has up to t * step blocks, half on average
    num_chats = max(1, round(num_accesses / (turns * (turns + 1) / 2 * step / 2)))
    grown = np.cumsum(rng.integers(1, step, (num_chats, turns)), axis=1)
    starts = np.concatenate([[0], np.cumsum(grown[:, -1])])
    order = np.argsort(rng.integers(0, num_chats, (num_chats, turns)) + 5 * np.arange(turns), axis=None)
    lengths, chat = grown.ravel()[order], order // turns
    key_ptr = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(key_ptr[-1]) - np.repeat(key_ptr[:-1], lengths)
    keys = (np.repeat(starts[chat], lengths) + within).astype(np.int32)
    parents = np.arange(-1, starts[-1] - 1, dtype=np.int32)
    parents[starts[:-1]] = -1
    none = np.zeros(len(lengths), np.int64)
    return BlockTrace(16, lengths * 16 + 1, none, keys, key_ptr, parents, np.arange(len(lengths)) / 2)


def bench_memory(flags: argparse.Namespace) -> Iterator[Row]:
    """Bytes and time per access, with and without a record of every access."""
    trace = long_trace(200_000 if flags.quick else 10_000_000, seed=0)
    for record in (False, True):
        config = ReplayConfig(trace.num_keys // 4, 16, record_events=record)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, results = best_of(min(flags.turns, 3), {"replay": partial(replay, trace, config)})
        result = results["replay"]
        accesses = int(result.key_accesses.sum())
        recorded = 0 if result.events is None else result.events.nbytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield {"accesses": accesses, "blocks": trace.num_keys, "requests": trace.num_requests,
               "recorded": record, "maccesses_per_s": accesses / seconds["replay"] / 1e6,
               "event_bytes_per_access": recorded / accesses,
               "trace_bytes_per_access": trace.keys.nbytes / accesses,
               "peak_rss_mb": peak / 1024, "peak_rss_grew_mb": (peak - before) / 1024}  # fmt: skip


def read_requests(path: Path) -> Requests:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = json.loads(text)
    return [row["prompt"] for row in rows], [row["output"] for row in rows]


class Section(NamedTuple):
    run: Callable[[argparse.Namespace], Iterator[Row]]
    title: str
    columns: dict[str, tuple[str, str]]  # heading: key of the row, format

    def show(self, rows: Iterable[Row]) -> list[Row]:
        """Prints each row as it comes."""
        table, shown = Rows(self.title, *self.columns), []
        words = {True: "yes", False: "no"}
        for row in rows:
            values = [(row[key], spec) for key, spec in self.columns.values()]
            table.add(*(words[v] if isinstance(v, bool) else format(v, spec) for v, spec in values))
            shown.append(row)
        return shown


SECTIONS = {
    "keys": Section(
        bench_keys,
        "keys of full blocks: Mtokens/s (times sha256 over pickled tuples)",
        {"block size": ("block_size", ""), METHOD: ("method", ""), "Mtokens/s": ("mtokens_per_s", ".1f"),
         "ratio": ("ratio", ".1f")},
    ),
    "replay": Section(
        bench_replay,
        "replay, 400 blocks of 16, 8 live requests: prompt Mtokens/s",
        {"requests": ("requests", ""), "decode": ("decode", ""), METHOD: ("method", ""),
         "Mtokens/s": ("mtokens_per_s", ".1f"), "ratio": ("ratio", ".1f"), "hit tokens": ("hit_tokens", ""),
         "same hits": ("same_hits", "")},
    ),
    "memory": Section(
        bench_memory,
        "one long trace, a cache of a quarter of its blocks",
        {"accesses": ("accesses", ""), "recorded": ("recorded", ""),
         "Maccesses/s": ("maccesses_per_s", ".1f"),
         "bytes/access recorded": ("event_bytes_per_access", ".1f"),
         "trace": ("trace_bytes_per_access", ".1f"), "peak RSS MiB": ("peak_rss_mb", ".0f")},
    ),
}  # fmt: skip


def main() -> int:
    """Measures, prints the tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--requests", type=Path, help="recorded requests for the replay")
    parser.add_argument("--quick", action="store_true", help="fewer requests and turns")
    flags = parser.parse_args()
    unknown = set(flags.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    flags.turns = 2 if flags.quick else 5
    flags.made = conversations(300 if flags.quick else 2000, seed=42)
    record: dict[str, Any] = {"machine": announce("numpy", "numba", threads=1)}
    for name in flags.sections or SECTIONS:
        record[name] = SECTIONS[name].show(SECTIONS[name].run(flags))
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
