"""Two ranks over gloo serve arrivals in real time: one clock, one order of steps, one decision to stop."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dsatrace.engine.clock import RealClock, to_ns
from dsatrace.engine.engine import SingleProcess, Word, serve
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.engine.simulator import StepTime, open_simulator
from dsatrace.model.parallel import ParallelGroup
from dsatrace.runner.distributed import BroadcastRanks, choose_ranks
from dsatrace.workloads.request import Request
from helpers.forked import call_on_ranks

ARRIVALS = (0.0, 0.01, 0.02, 0.3, 1000.0)


def test_two_ranks_decide_alike_though_their_clocks_differ(tmp_path):
    """Rank 1's clock is 0.2 s ahead of rank 0's and it would go on; rank 0 stops, waiting for an arrival."""
    call_on_ranks(2, _serve, str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert first == second
    assert [state for _, state, *_ in first["served"]] == ["length"] * 4
    assert max(finish_s for *_, finish_s in first["served"]) >= 0.3
    assert first["word"] == [False, to_ns(1e10) + 7, [[5], [6]]]


def _serve(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ranks = BroadcastRanks(ParallelGroup(rank, 2), torch.device("cpu"))
    requests = [
        Request(f"r{i}", (1, 2, 3), 6, arrival_s=s, stop_at_eos=False) for i, s in enumerate(ARRIVALS)
    ]
    step_time = StepTime(step_ns=3_000_000, prefill_token_ns=0, decode_token_ns=0, context_token_ns=0)
    clock = RealClock(start_s=0.2 * rank)
    run = RunSettings(stop_tokens=frozenset({0}), clock=clock)
    with open_simulator(EngineSettings(max_batch_size=2), run, step_time=step_time) as engine:
        engine.ranks = ranks
        served = []
        for live in serve(engine, requests):
            served.append([live.request_id, live.state, live.admitted_s, live.first_token_s, live.finish_s])
            if rank == 0 and len(served) == 4:
                engine.request_abort()
    # Beyond an int64 in nanoseconds, and rank 1's own view is another.
    word = ranks.agree(Word(rank == 1, to_ns(1e10) + 7 + rank, [[5 + rank], [6 + rank]]))
    (Path(folder) / f"rank{rank}").write_text(json.dumps({"served": served, "word": word}))
    dist.destroy_process_group()


def test_a_taken_port_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        program = (
            "import sys\n"
            "from dsatrace.errors import exits_cleanly\n"
            "from dsatrace.runner.distributed import process_group\n"
            "@exits_cleanly\n"
            "def main():\n"
            "    with process_group('cpu'): pass\n"
            "sys.exit(main())\n"
        )
        env = os.environ | place | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    port = place["MASTER_PORT"]
    assert line.startswith(f"error: the ranks cannot meet at 127.0.0.1:{port}: the port is taken; ")
    assert "--standalone" in line and "Traceback" not in done.stderr


def test_a_single_process_agrees_with_itself():
    ranks = choose_ranks(ParallelGroup(), torch.device("cpu"))
    assert isinstance(ranks, SingleProcess)
    word = Word(True, 3, [[1], [2, 3]])
    assert ranks.agree(word) is word
