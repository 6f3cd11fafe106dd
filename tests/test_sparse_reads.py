"""Sparse means sparse: a decode step reads the selected latents and nothing else, in bounded memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from conftest import INFERENCE
from dsatrace.model.batch import Batch, Span
from dsatrace.model.config import ModelArgs
from helpers.forked import call
from helpers.models import SMALL, SelectionLog, new_cache, prefill, random_model, random_tokens

CONTEXT = 400


def decode(model, cache, token):
    return model(
        Batch.build([Span(list(range(cache.num_blocks)), CONTEXT, [token])], cache.block_size), cache
    )


def test_decode_reads_only_the_selected_latents():
    """Every latent that was not selected is overwritten with NaN: the logits stay bit-identical."""
    model = random_model(SMALL)
    tokens = random_tokens(CONTEXT + 1, SMALL)
    cache = new_cache(model, CONTEXT + 1)
    prefill(model, cache, tokens[:CONTEXT], 128)
    log = SelectionLog(model)
    expected = decode(model, cache, tokens[CONTEXT])

    chosen = [selected for (selected,) in log.sets()]
    for layer, selected in enumerate(chosen):
        others = [slot for slot in range(CONTEXT + 1) if slot not in selected]
        assert len(others) == CONTEXT + 1 - SMALL.index_topk
        cache.latent[layer].view(-1, SMALL.latent_dim)[others] = float("nan")
    assert torch.equal(decode(model, cache, tokens[CONTEXT]), expected)

    cache.latent[0].view(-1, SMALL.latent_dim)[max(chosen[0] - {CONTEXT})] = float("nan")
    assert decode(model, cache, tokens[CONTEXT]).isnan().any(), "a selected one does matter"


def peak_bytes() -> int:
    """Not getrusage: its peak is inherited from the parent process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def prefill_at_32k(said: Path) -> None:
    args = ModelArgs.from_json(INFERENCE / "config_tiny.json")
    model, length, chunk = random_model(args), 32768, 256
    before = peak_bytes()
    cache = new_cache(model, length)
    for tensor in (*cache.latent, *cache.index_k, *cache.index_scale):
        tensor.normal_()
    for start in (0, length - chunk):
        span = Span(range(cache.num_blocks), start, random_tokens(chunk, args))
        assert model(Batch.build([span], cache.block_size), cache).isfinite().all()
    said.write_text(f"{peak_bytes() - before}")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_prefill_at_32k_stays_within_2_gb(tmp_path: Path) -> None:
    """The last chunk of a 32K prompt, where a chunk costs most, in a process of its own."""
    process = call(prefill_at_32k, tmp_path / "extra_bytes")
    process.join()
    assert process.exitcode == 0
    assert 10e6 < int((tmp_path / "extra_bytes").read_text()) < 2e9
