"""The live tier and the offline replay check each other: needle-2k with a small HBM, rows moved one by one.

The replay begins with what HBM held when decoding began, oldest first, and counts each written token as
a use; from then on both must miss the same number of ids in every step of every layer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from dsatrace.commands.generate import main as generate
from dsatrace.model.convert import convert_checkpoint
from dsatrace.runner.offload.cache import OffloadedCache
from dsatrace.selection_replay.policies import misses
from dsatrace.selection_replay.steps import Steps
from dsatrace.trace.reader import RunReader

NEEDLE = ROOT / "data" / "models" / "needle-2k"
TOP_K, HBM_BLOCKS, BLOCK = 192, 18, 16
HBM_ROWS = HBM_BLOCKS * BLOCK
NUM_TOKENS = 20


def resident_rows(layer: object) -> list[int]:
    """The rows that a layer's HBM holds, the one that would leave first at the beginning."""
    residency = layer._residency  # type: ignore[attr-defined]
    held = np.flatnonzero(residency.unit_of >= 0)
    return residency.unit_of[held[np.argsort(residency._order._stamp[held])]].tolist()


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_replay_misses_what_the_tier_missed(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[int, list[int]] = {}
    real = OffloadedCache.write_latent

    def write_latent(cache: OffloadedCache, layer_id: int, batch: object, latent: object) -> None:
        if cache._write_of(batch).is_decode and layer_id not in held:  # type: ignore[arg-type]
            held[layer_id] = resident_rows(cache.layers[layer_id])
        real(cache, layer_id, batch, latent)  # type: ignore[arg-type]

    monkeypatch.setattr(OffloadedCache, "write_latent", write_latent)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The lighthouse keeper counted 41 ships and wrote the number down. " * 40)
    convert_checkpoint(NEEDLE, tmp_path / "model", 4, model_parallel=1)
    flags = ["--granularity", "row", "--tier-policy", policy, "--hbm-blocks", str(HBM_BLOCKS)]
    flags += ["--cache-block-size", str(BLOCK), "--max-batch-size", "1", "--ignore-eos", "--temperature", "0"]
    model = [
        "--ckpt-path",
        str(tmp_path / "model"),
        "--config",
        str(NEEDLE / "serving_config.json"),
    ]
    out = tmp_path / "run"
    run = ["--input-file", str(prompt), "--max-new-tokens", str(NUM_TOKENS), "--trace-out", str(out)]
    assert generate([*model, *flags, *run]) == 0

    missed: dict[int, list[int]] = {}
    selected: dict[int, list[list[int]]] = {}
    lengths: dict[int, list[int]] = {}
    for record in RunReader(out).steps():
        layer = record["layer_id"]
        assert record["path"] == "sparse" and record["unique_token_pos_count"] == TOP_K
        missed.setdefault(layer, []).append(record["kv_fetch"]["hbm"]["missed_tokens"])
        selected.setdefault(layer, []).append(record["selected_token_pos"])
        lengths.setdefault(layer, []).append(record["seq_len_current"])
    assert len(missed) == 4 and all(len(steps) == NUM_TOKENS - 1 for steps in missed.values())
    for layer, sets in selected.items():
        assert len(held[layer]) == HBM_ROWS, "HBM is full when decoding begins"
        warm = [[row] for row in held[layer]]
        written = [[length - 1] for length in lengths[layer]]
        steps = Steps.of([*warm, *(one for pair in zip(written, sets, strict=True) for one in pair)])
        replayed = misses(steps, policy, HBM_ROWS).misses[len(warm) + 1 :: 2]
        assert replayed.tolist() == missed[layer]
    assert sum(map(sum, missed.values())) > 4 * TOP_K, "and there was something to miss"
