"""A replay of many records: time per record, memory and files, in one process and in several.

The trace is synthetic and laid out as `dsatrace export --to replay` does: requests of 61 layers and 512
steps, 2,048 ids of a context that grows from 32,768 tokens. A tenth of a set changes per step, and of
the new ids half lie among the newest 4,096, so that a buffer has something to hold. The figures say what
a replay costs, and nothing about a model.

    python3 scripts/bench/replay_scale.py /data/scale --records 1_000_000       # writes 1.2 GB there
    python3 scripts/bench/replay_scale.py /data/scale --jobs 1,2 --policy lru   # measures it
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
from machine import announce

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.files import digest_of, write_json
from dsatrace.kv.layout import CacheLayout
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo, manifest
from dsatrace.trace.parquet.replay_layout import write_requests

NUM_LAYERS, NUM_STEPS, TOP_K = 61, 512, 2048
CONTEXT, RECENT, CHANGED = 32_768, 4_096, TOP_K // 10


@numba.njit(nogil=True)
def fill_layer(ids, context, recent, changed, seed):  # type: ignore[no-untyped-def]
    """Fills (T, K) ascending ids, of which step t can see `context + t + 1`."""
    np.random.seed(seed)
    num_steps, top_k = ids.shape
    held = np.zeros(context + num_steps, np.uint8)
    num_held = 0
    for t in range(num_steps):
        visible = context + t + 1
        if t:
            for _ in range(changed):
                held[ids[t - 1, np.random.randint(top_k)]] = 0
        num_held = 0
        for i in range(visible):
            num_held += held[i]
        while num_held < top_k:
            id_ = np.random.randint(visible)
            if np.random.random() < 0.5:
                id_ = visible - 1 - np.random.randint(recent)
            if not held[id_]:
                held[id_] = 1
                num_held += 1
        at = 0
        for i in range(visible):
            if held[i]:
                ids[t, at] = i
                at += 1


def request_table(name: str, seed: int, num_layers: int) -> pa.Table:
    """A request's records, with the columns that a replay reads."""
    ids = np.empty((num_layers, NUM_STEPS, TOP_K), np.int32)
    for layer in range(num_layers):
        fill_layer(ids[layer], CONTEXT, RECENT, CHANGED, seed * NUM_LAYERS + layer)
    num_records = num_layers * NUM_STEPS
    step = np.tile(np.arange(NUM_STEPS), num_layers)
    ends = np.arange(num_records + 1, dtype=np.int32) * TOP_K
    return pa.table(
        {
            "request_id": pa.array([name] * num_records),
            "layer_id": np.repeat(np.arange(num_layers), NUM_STEPS),
            "step_idx": step,
            "seq_len_current": CONTEXT + step + 1,
            "forward_idx": step,
            "phase": pa.array(["decode"] * num_records),
            "selected_token_pos": pa.ListArray.from_arrays(ends, ids.ravel()),
        }
    )


def write_trace(folder: Path, num_records: int) -> int:
    """Writes whole requests of at least so many records; returns how many those are."""
    num_layers = min(NUM_LAYERS, max(1, num_records // NUM_STEPS))
    num_requests = max(1, round(num_records / (num_layers * NUM_STEPS)))
    names = [f"request-{number:06}" for number in range(num_requests)]

    def tables() -> Iterator[pa.Table]:
        for number, name in enumerate(names):
            yield request_table(name, number, num_layers)

    folder.mkdir(parents=True)
    counts = write_requests(tables(), folder)
    (folder / REQUESTS_FILE).write_text("")
    files = {name: digest_of(folder / name) | count._asdict() for name, count in counts.items()}
    files[REQUESTS_FILE] = digest_of(folder / REQUESTS_FILE)
    info = RunInfo(
        model_config={"n_layers": num_layers, "index_topk": TOP_K},
        layouts=(CacheLayout("serving_fp8", 656, 132),),
        device="none",
        selections="synthetic",
    )
    record = manifest(info, TraceConfig(out=folder), "complete", key_id="00000000", files=files)
    write_json(folder / MANIFEST_FILE, {**record, "layout": "replay"})
    return sum(count.records for count in counts.values())


def measure(folder: Path, jobs: int, flags: Sequence[str]) -> dict[str, Any]:
    """One replay in processes of its own: wall and CPU seconds, and the largest of them."""
    out = folder.with_name(f"{folder.name}_replay_{jobs}")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "dsatrace", "replay", str(folder), "--no-figure"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*command, "--jobs", str(jobs), "--out", str(out), *flags],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "inference")},
        check=False,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"the replay with --jobs {jobs} ended with {done.returncode}")
    sums = json.loads((out / "replay.json").read_bytes())
    parts = [path.stat().st_size for path in (out / "parts").iterdir()]
    return {
        "jobs": jobs,
        "wall_s": wall,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "largest_process_mb": after.ru_maxrss / 1024,
        "parts": len(parts),
        "part_kb": sum(parts) / len(parts) / 1024,
        "sums": sums["sums"],
    }


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path, help="of the trace")
    parser.add_argument("--records", type=int, help="write a trace of about so many records")
    parser.add_argument("--jobs", default="", help="replay it with so many processes, such as 1,2")
    parser.add_argument("--policy", default="lru,sglang,fifo,random,opt", help="as of `dsatrace replay`")
    args = parser.parse_args(argv)
    announce("numpy", "numba", "pyarrow", threads="1 of each process")
    if args.records:
        start, before = time.perf_counter(), time.process_time()
        num_records = write_trace(args.folder, args.records)
        size = sum(path.stat().st_size for path in args.folder.rglob("*.parquet"))
        spent = f"{time.perf_counter() - start:.0f} s, {time.process_time() - before:.0f} s CPU"
        print(f"{num_records:,} records, {size / num_records:,.0f} bytes each, written in {spent}")
    files = json.loads((args.folder / MANIFEST_FILE).read_bytes())["files"]
    num_records = sum(file.get("records", 0) for file in files.values())
    sums: list[Any] = []
    for jobs in filter(None, args.jobs.split(",")):
        found = measure(args.folder, int(jobs), ["--policy", args.policy])
        wall, cpu = found["wall_s"], found["cpu_s"]
        print(
            f"--jobs {jobs}: {wall:,.0f} s, {cpu:,.0f} s CPU; per record {1e3 * wall / num_records:.3f} ms, "
            f"{1e3 * cpu / num_records:.3f} CPU; largest process {found['largest_process_mb']:,.0f} MiB; "
            f"{found['parts']} results of {found['part_kb']:,.0f} KiB",
        )
        sums.append(found["sums"])
    if any(one != sums[0] for one in sums):
        raise UserError("the results differ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
