"""How long `dsatrace study size` takes once its requests are tokenised, and how much memory.

Requests are synthetic ids: conversations of several turns, each prompt all tokens so far. CPU seconds
count all processes; resident memory is the largest of one process.

    python3 scripts/bench/size.py                               # 100,000 requests of 2,000 tokens
    python3 scripts/bench/size.py --requests 10000 --block-size 16
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
from machine import announce

from dsatrace.kv.model_layout import MODELS, model_layout
from dsatrace.study.requests import StudyRequests
from dsatrace.study.size import (
    SizeCurve,
    default_sizes,
    recommendation,
    replica_traces,
    settings_of,
    size_cells,
)

TURNS = 5
ANSWER_TOKENS = 200
MEDIAN_DELAY_S = 60.0  # from turn to turn, log-normal; two conversations begin per second


def requests_of(num: int, prompt_tokens: int) -> StudyRequests:
    """Conversations of `TURNS` turns that interleave; prompts have `prompt_tokens` on average."""
    draw = np.random.default_rng(0)
    num_conversations = -(-num // TURNS)
    step = prompt_tokens * 2 // (TURNS + 1)  # tokens that a turn adds, its answer before it included
    turn = np.tile(np.arange(TURNS), num_conversations)[:num]
    conversation = np.repeat(np.arange(num_conversations), TURNS)[:num]
    delay = np.exp(draw.normal(np.log(MEDIAN_DELAY_S), 1.2, (num_conversations, TURNS)))
    begins = draw.uniform(0, num_conversations / 2, (num_conversations, 1))
    arrival = (begins + np.cumsum(delay, axis=1)).ravel()[:num]
    order = np.argsort(arrival, kind="stable")
    turn, conversation, arrival = turn[order], conversation[order], arrival[order]
    lengths = ((turn + 1) * step).astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    ids = np.empty(offsets[-1], np.int32)
    for at in range(num):  # the tokens of a conversation are consecutive numbers of its own
        first = int(conversation[at]) * (TURNS * step + ANSWER_TOKENS)
        ids[offsets[at] : offsets[at + 1]] = np.arange(first, first + lengths[at])
    answers = (offsets[1:, None] * 0 + lengths[:, None]) + np.arange(ANSWER_TOKENS)
    answers += (conversation * (TURNS * step + ANSWER_TOKENS))[:, None]
    zeros = np.zeros(num, np.int32)
    return StudyRequests(
        arrival_s=arrival,
        conversation=conversation.astype(np.int32),
        turn=turn.astype(np.int32),
        workload=zeros,
        mode=zeros,
        num_prompt_tokens=lengths,
        num_response_tokens=np.full(num, ANSWER_TOKENS, np.int32),
        prompt_offsets=offsets,
        prompt_ids=ids,
        response_offsets=np.arange(num + 1, dtype=np.int64) * ANSWER_TOKENS,
        response_ids=answers.astype(np.int32).ravel(),
        conversation_ids=tuple(map(str, range(num_conversations))),
        workload_names=("chats",),
        mode_names=("",),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=2000, help="of a prompt, on average")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    announce("numpy", "numba", threads=f"1 of each of {args.workers} processes")
    requests = requests_of(args.requests, args.tokens)
    print(f"{len(requests):,} requests, {requests.num_prompt_tokens.sum():,} prompt tokens")
    _take_time("drawn")
    layout = model_layout("deepseek-v3.2", MODELS["deepseek-v3.2"])
    block_bytes = args.block_size * layout.bytes_per_token
    traces = replica_traces(requests, args.block_size, 1, "round-robin")
    _take_time("blocks")
    sizes = default_sizes(traces, block_bytes)
    settings = settings_of(sizes, block_bytes, by_conversation=True)
    cells = size_cells(traces, settings, args.workers, lambda: _take_time("replay", quiet=True))
    _take_time("replays")
    curve = SizeCurve.of(block_bytes, sizes, [cells], "conversations")
    print(recommendation(curve, 0.9).text("per device"))
    _take_time("curve")


_last = [time.perf_counter(), 0.0]


def _take_time(what: str, *, quiet: bool = False) -> None:
    if quiet:
        return
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    memory = max(each.ru_maxrss for each in used) / 2**20
    now = time.perf_counter()
    print(f"{what}: {now - _last[0]:.1f} s, {cpu - _last[1]:.1f} CPU s; {memory:.2f} GiB at most")
    _last[:] = [now, cpu]


if __name__ == "__main__":
    main()
