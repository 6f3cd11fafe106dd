"""What `gpu_checks.sh` runs: each check is a row of `CHECKS`, in the order of its value.

A check computes the same twice, on the device and where it is known to be right, and raises
`AssertionError` where both differ. With `--device cpu` all of it runs at small shapes: that tests this
script and says nothing of a GPU, and each row says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import layerwise as bench
import numpy as np
import torch

from dsatrace.commands.parser import CommandParser
from dsatrace.errors import exits_cleanly
from dsatrace.layerwise.asked import Rows
from dsatrace.layerwise.folder import WorkFolder
from dsatrace.layerwise.sweep import IDS, Sweep, SweepSettings
from dsatrace.layerwise.transcripts import Transcript, recorded_rows
from dsatrace.layerwise.weights import layers_to_compute, names_of
from dsatrace.model.batch import Batch, Span
from dsatrace.model.cache import KVCache
from dsatrace.model.checkpoint import load_transformer
from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.kernels import get_kernels
from dsatrace.model.layers import ModelSetup
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.plan import read_part
from dsatrace.model.selection import Selection
from dsatrace.model.tiny import write_checkpoint
from dsatrace.model.transformer import Transformer
from dsatrace.runner.offload.opening import offloaded_cache
from dsatrace.runner.settings import OffloadSettings
from dsatrace.trace.observe import Selected, SelectionRing

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 480.0
SMALL = dataclasses.replace(
    bench.ARGS,
    dim=256,
    n_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    moe_inter_dim=128,
    n_routed_experts=8,
    n_activated_experts=2,
    index_n_heads=4,
    index_topk=64,
    vocab_size=512,
)
TINY = ModelArgs.from_json(ROOT / "inference" / "config_tiny.json", dtype="fp32")


@dataclasses.dataclass(frozen=True)
class Where:
    """What the checks run on, and where they may write."""

    device: str
    folder: Path

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"


class Skipped(Exception):
    """Why a check cannot run here."""


def sweep_against_cpu(where: Where) -> str:
    """One MoE layer of V3.2's shapes, random fp8: the device's sets beside the CPU's."""
    args = bench.ARGS if where.is_gpu else SMALL
    num_tokens = 4096 if where.is_gpu else 160
    bench.write_layer(where.folder / "hf", args)
    tokens = np.random.default_rng(0).integers(0, args.vocab_size, num_tokens)
    recorded = recorded_rows([Transcript("r0", tokens)], Rows.of("last:64"))
    work = layers_to_compute(args, bench.LAYERS)
    stored = read_part(where.folder / "hf", args, names_of(args, work))
    ids: dict[str, list[np.ndarray]] = {}
    seconds: dict[str, float] = {}
    for device in (where.device, "cpu"):
        out = where.folder / f"{device} {len(ids)}"
        folder = WorkFolder(out, {}, resume=False)
        setup = ModelSetup(args, get_kernels("torch", device), ParallelGroup())
        chunk_rows = None if device == where.device else 64  # other products, also where both are the CPU
        started = time.monotonic()
        settings = SweepSettings(device, chunk_rows)
        Sweep(setup, recorded, bench.LAYERS, work, stored, folder, settings).run()
        name = "device" if not ids else "cpu"
        seconds[name] = time.monotonic() - started
        ids[name] = [np.sort(folder.layer_array(IDS, layer), axis=1) for layer in bench.LAYERS]
        folder.close()
    shares = [shared(mine, theirs) for mine, theirs in zip(ids["device"], ids["cpu"], strict=True)]
    said = ", ".join(f"layer {layer} {share:.2%}" for layer, share in enumerate(shares))
    # A first layer differs by near ties alone; the second follows from fp8 activations that round apart.
    assert shares[0] > 0.99 and shares[1] > 0.9, f"of the ids in common: {said}"
    speeds = [f"{name} {num_tokens / spent:,.0f}" for name, spent in seconds.items()]
    return f"ids in common: {said}; tokens/s: {', '.join(speeds)}"


def shared(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the ids (R, K), ascending, that both rows hold."""
    both = sum(len(np.intersect1d(x, y)) for x, y in zip(a, b, strict=True))
    return both / a.size


def tilelang_against_torch(where: Where) -> str:
    """The device kernels beside the reference: the tests that are skipped elsewhere."""
    if not where.is_gpu:
        raise Skipped("needs a CUDA device")
    if importlib.util.find_spec("tilelang") is None:
        raise Skipped("tilelang is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        str(ROOT / "tests" / "test_tilelang.py"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, check=False)
    last = (ran.stdout.strip().splitlines() or ["said nothing"])[-1]
    assert ran.returncode == 0 and " passed" in last, last
    return last.strip("= ")


def pinned_ring(where: Where) -> str:
    """What layers select, through staging buffer and pinned slot, equals the tensors; and its cost."""
    layers, rows, top_k, steps = 61, 4, 2048, 24 if where.is_gpu else 3
    ring = SelectionRing(layers, rows, top_k, where.device, with_scores=True, num_slots=3)
    generator = torch.Generator().manual_seed(0)
    spent = []
    for _ in range(steps):
        selections = [random_selection(rows, top_k, where.device, generator) for _ in range(layers)]
        synchronise(where)
        started = time.perf_counter()
        recording = ring.record(rows)
        assert recording is not None
        for layer, selection in enumerate(selections):
            recording.on_select(layer, cast(Selected, selection))
        recording.finish()
        spent.append(time.perf_counter() - started)
        recording.wait()
        positions, stats, scores = recording.arrays()
        assert stats is not None and scores is not None
        for layer, selection in enumerate(selections):
            assert np.array_equal(positions[layer], selection.positions.int().cpu().numpy()), f"layer {layer}"
            assert np.array_equal(scores[layer], selection.scores.cpu().numpy()), f"scores of layer {layer}"
            assert np.array_equal(stats[layer, :, 3], selection.margin.cpu().numpy()), (
                f"margin of layer {layer}"
            )
        recording.release()
    return f"{steps} steps of {layers} layers equal; hand-over {np.median(spent) * 1e6:,.0f} us a step"


def random_selection(rows: int, top_k: int, device: str, generator: torch.Generator) -> Selection:
    positions = torch.stack([torch.randperm(32768, generator=generator)[:top_k] for _ in range(rows)])
    scores = torch.rand(rows, top_k, generator=generator).sort(descending=True).values
    positions, scores = positions.to(device), scores.to(device)
    return Selection(positions, scores, scores[:, -1] * 0.01, positions)


def offload_staged(where: Where) -> str:
    """Latents that lie in host memory beside latents on the device: the same selections and logits."""
    args = dataclasses.replace(TINY, index_topk=16)
    write_checkpoint(where.folder / "tiny", args)
    convert_checkpoint(where.folder / "tiny", where.folder / "tiny_mp1", None, 1)
    device = torch.device(where.device)
    model = load_transformer(args, where.folder / "tiny_mp1", device=device)
    num_blocks, steps = 40, 24
    block_size, prompt = (8, 296) if where.is_gpu else (2, 56)
    tokens = np.random.default_rng(1).integers(0, args.vocab_size, prompt + steps).tolist()
    plain = decode(model, model.new_cache(num_blocks, block_size, device), tokens, prompt)
    settings = OffloadSettings(hbm_blocks=num_blocks // 2)
    with offloaded_cache(model, settings, num_blocks, block_size, device) as cache:
        offloaded = decode(model, cache, tokens, prompt)
    for step, (mine, theirs) in enumerate(zip(plain, offloaded, strict=True)):
        assert torch.equal(mine, theirs), f"step {step}: logits differ by {(mine - theirs).abs().max():.2e}"
    return f"{len(plain)} steps bit-equal with half of the blocks in host memory alone"


def decode(model: Transformer, cache: KVCache, tokens: list[int], prompt: int) -> list[torch.Tensor]:
    """Logits of each token after the prompt."""
    blocks, device = list(range(cache.num_blocks)), cache.latent[0].device
    size, found = cache.block_size, []
    for position in range(len(tokens)):  # one by one: a row reads few blocks
        span = Span(blocks, position, tokens[position : position + 1])
        logits = model(Batch.build([span], size, device), cache)[0]
        if position >= prompt:
            found.append(logits.cpu())
    return found


def tracing_overhead(where: Where) -> str:
    """A decode step of 61 layers with its selections recorded, and without."""
    layers, rows, top_k, rounds = 61, 4, 2048, 40 if where.is_gpu else 6
    size = 4096 if where.is_gpu else 256
    weight = torch.rand(size, size, device=where.device)
    x = torch.rand(rows, size, device=where.device)
    generator = torch.Generator().manual_seed(0)
    selections = [random_selection(rows, top_k, where.device, generator) for _ in range(layers)]
    ring = SelectionRing(layers, rows, top_k, where.device, num_slots=8)

    def step(traced: bool) -> float:
        synchronise(where)
        started = time.perf_counter()
        recording = ring.record(rows) if traced else None
        for layer in range(layers):
            (x @ weight).softmax(-1)
            if recording is not None:
                recording.on_select(layer, cast(Selected, selections[layer]))
        if recording is not None:
            recording.finish()
        synchronise(where)
        spent = time.perf_counter() - started
        if recording is not None:
            recording.wait()
            recording.release()
        return spent

    both = [(step(False), step(True)) for _ in range(rounds)]
    without, with_ = (np.median(times) * 1e6 for times in zip(*both, strict=True))
    if where.is_gpu:
        assert with_ - without < 2000, f"{with_ - without:,.0f} us a step; at most 2,000 at batch 4"
    return f"{without:,.0f} us a step, {with_:,.0f} recorded: {with_ - without:+,.0f} us at batch {rows}"


def synchronise(where: Where) -> None:
    if where.is_gpu:
        torch.cuda.synchronize()


CHECKS: tuple[tuple[str, Callable[[Where], str]], ...] = (
    ("layerwise, V3.2 shapes", sweep_against_cpu),
    ("tilelang kernels", tilelang_against_torch),
    ("pinned ring", pinned_ring),
    ("offload, staged", offload_staged),
    ("tracing at 61 layers", tracing_overhead),
)
"""In the order of their value, for the eight minutes may end first."""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints a row per check as it ends; returns the exit code."""
    parser = CommandParser(
        "gpu-checks", "Run every check that needs a GPU.", script="gpu_checks.py", examples="%(prog)s"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tests this script only"
    )
    parser.add_argument("--folder", type=Path, help="for 12 GB of random weights (default: a temporary one)")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    print(
        f"device: {torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu, small shapes: no claim'}"
    )
    print(f"{'check':24} {'result':7} {'s':>6}  figures", flush=True)
    started, num_open = time.monotonic(), 0  # that failed, or were not begun
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="gpu_checks_") as folder:
        for i, (name, check) in enumerate(CHECKS):
            begun = time.monotonic()
            if begun - started > BUDGET_S:
                print(f"{name:24} {'left':7} {0:6.1f}  the {BUDGET_S / 60:.0f} minutes are over", flush=True)
                num_open += 1
                continue
            result, said = "passed", ""
            own = Path(folder) / f"{i}"
            own.mkdir()
            try:
                said = check(Where(args.device, own))
            except Skipped as reason:
                result, said = "skipped", f"{reason}"
            except Exception as error:  # the next check may pass
                result, said = "FAILED", f"{type(error).__name__}: {error}".splitlines()[0]
                num_open += 1
            print(f"{name:24} {result:7} {time.monotonic() - begun:6.1f}  {said}", flush=True)
    return int(num_open > 0)


if __name__ == "__main__":
    sys.exit(main())
