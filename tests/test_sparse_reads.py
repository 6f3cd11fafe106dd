"""Sparse means sparse: a decode step reads the selected latents and nothing else, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from conftest import INFERENCE, ROOT
from dsatrace.model.batch import Batch, Span
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


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_prefill_at_32k_stays_within_2_gb():
    """The last chunks of a 32K prompt, where a chunk costs most, in a process of their own."""
    script = f"""
        import sys, torch
        from pathlib import Path
        sys.path[:0] = [{str(INFERENCE)!r}, {str(ROOT / "tests")!r}]
        from helpers.models import ModelArgs, new_cache, random_model, random_tokens
        from dsatrace.model.batch import Batch, Span
        torch.set_num_threads(2)
        args = ModelArgs.from_json({str(INFERENCE / "config_tiny.json")!r})
        model, length, chunk = random_model(args), 32768, 256

        def peak():  # not getrusage: its peak is inherited from the parent process
            status = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

        before = peak()
        cache = new_cache(model, length)
        for tensor in (*cache.latent, *cache.index_k, *cache.index_scale):
            tensor.normal_()
        for start in (0, length - 2 * chunk, length - chunk):
            span = Span(range(cache.num_blocks), start, random_tokens(chunk, args))
            assert model(Batch.build([span], cache.block_size), cache).isfinite().all()
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    extra_bytes = int(done.stdout)
    assert 10e6 < extra_bytes < 2e9
