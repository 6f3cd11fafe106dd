"""One mixture-of-experts layer at DeepSeek-V3.2's own shapes through `dsatrace layerwise`, on random fp8.

Writes a checkpoint of one whole layer and of what the next one needs to select (11.6 GB, removed at the
end), sweeps one transcript over it in a process of its own, and prints its peak memory beside what the plan
says, bytes and tokens per second, and where the time went.

    python3 scripts/bench/layerwise.py --folder /data/v32-layer --rows 512
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from machine import announce

from dsatrace.commands.parser import CommandParser, count
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.files import write_json
from dsatrace.layerwise.asked import Rows
from dsatrace.layerwise.folder import WorkFolder
from dsatrace.layerwise.plan import peak_bytes
from dsatrace.layerwise.sweep import Sweep, SweepSettings
from dsatrace.layerwise.transcripts import Transcript, recorded_rows
from dsatrace.layerwise.weights import layers_to_compute, names_of
from dsatrace.model.config import ModelArgs
from dsatrace.model.kernels import get_kernels
from dsatrace.model.layers import ModelSetup
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.plan import read_part
from dsatrace.model.shards import ShardWriter
from dsatrace.model.tiny import hf_config, layout_of
from dsatrace.units import size_text

ARGS = ModelArgs(n_layers=2, n_dense_layers=0, vocab_size=4096)
"""V3.2's shapes; two layers, and a smaller vocabulary, whose rows alone are read anyway."""
LAYERS = range(2)


def write_layer(folder: Path, args: ModelArgs = ARGS) -> None:
    """What a sweep of `LAYERS` reads, in one file: fp8 with scales, the rest in bf16 and fp32."""
    work = layers_to_compute(args, LAYERS)
    names, whole = set(names_of(args, work)), layout_of(args, "fp8")
    layout = {name: whole[name] for name in whole if name.removesuffix("_scale_inv") in names}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(1 << 24, generator=generator).to(torch.float8_e4m3fn)
    with ShardWriter(folder / "model-00001-of-00001.safetensors", layout) as writer:
        for i, (name, (dtype, shape)) in enumerate(layout.items()):
            size = int(np.prod(shape))
            if dtype == "F8_E4M3":
                begin = i * 7919 % (1 << 20)  # other numbers for each tensor, drawn once
                repeats = -(-size // (len(codes) - begin))
                values = codes[begin:].repeat(repeats)[:size].view(shape)
            elif name.endswith("_scale_inv"):
                values = torch.full(shape, layout[name.removesuffix("_scale_inv")][1][-1] ** -0.5)
            else:
                values = torch.randn(shape, generator=generator)
                values = values * 0.1 + 1 if len(shape) == 1 else values * shape[-1] ** -0.5
            writer.write(name, values if values.dtype == torch.float8_e4m3fn else _as(values, dtype))
    index = {"weight_map": dict.fromkeys(layout, "model-00001-of-00001.safetensors")}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", hf_config(args, "fp8"))


def _as(values: torch.Tensor, dtype: str) -> torch.Tensor:
    return values.to(torch.bfloat16 if dtype == "BF16" else torch.float32)


def sweep(weights: Path, out: Path, num_tokens: int, device: str, args: ModelArgs = ARGS) -> dict[str, float]:
    """Sweeps `LAYERS` over one random transcript, all rows but a few below them recorded; what it took."""
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, num_tokens)
    recorded = recorded_rows([Transcript("r0", tokens)], Rows.of(f"last:{min(num_tokens // 2, 512)}"))
    work = layers_to_compute(args, LAYERS)
    stored = read_part(weights, args, names_of(args, work))
    setup = ModelSetup(args, get_kernels("torch", device), ParallelGroup())
    before, started = memory_bytes("VmRSS"), time.monotonic()
    folder = WorkFolder(out, {}, resume=False)
    Sweep(setup, recorded, LAYERS, work, stored, folder, SweepSettings(device)).run()
    seconds = time.monotonic() - started
    num_bytes = int(folder.progress["bytes_read"])
    return {
        "tokens": num_tokens,
        "seconds": seconds,
        "cpu_seconds": sum(os.times()[:2]),
        "tokens_per_s": num_tokens / seconds,
        "read_bytes": num_bytes,
        "gb_per_s": num_bytes / seconds / 1e9,
        "peak_bytes": memory_bytes("VmHWM") - before,
        "planned_peak_bytes": peak_bytes(args, work, recorded, SweepSettings(device)).total,
    }


def memory_bytes(name: str) -> int:
    """`VmRSS`, or `VmHWM` at the most, of this program alone: `ru_maxrss` begins with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) << 10


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line of JSON, and the profile's head; returns the exit code."""
    parser = CommandParser(
        "bench-layerwise",
        "Sweep one layer at DeepSeek-V3.2's shapes.",
        script="layerwise.py",
        examples="%(prog)s --folder /data/v32-layer --rows 512",
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="a new folder for 11.6 GB, removed at the end")
    add("--rows", type=count, default=512, help="tokens of the transcript")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the layer is computed")
    add("--threads", type=count, help="of torch (default: its own)")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        if args.threads:
            torch.set_num_threads(args.threads)
        announce("torch", threads=torch.get_num_threads())
        profile = cProfile.Profile()
        measured = profile.runcall(sweep, args.folder / "hf", args.folder / "run", args.rows, args.device)
        print(json.dumps(measured))
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(14)
        return 0
    if args.folder.exists():
        raise UserError(f"--folder {args.folder}: exists already; name a new one")
    if shutil.disk_usage(args.folder.parent).free < 14e9:
        raise UserError(f"--folder {args.folder}: its disk has less than {size_text(14e9)} left")
    try:
        write_layer(args.folder / "hf")
        threads = ["--threads", str(args.threads)] if args.threads else []
        command = [sys.executable, __file__, "--child", "--folder", str(args.folder), *threads]
        command += ["--rows", str(args.rows), "--device", args.device]
        return subprocess.run(command, check=False).returncode
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
