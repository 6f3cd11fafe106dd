"""The real configuration, built on the meta device: no memory, right numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dsatrace.model.config import ModelArgs
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.transformer import Transformer

CONFIG = Path(__file__).parents[1] / "inference" / "config_671B_v3.2.json"


@pytest.fixture(scope="module")
def args():
    return ModelArgs.from_json(CONFIG)


@pytest.fixture(scope="module")
def model(args):
    with torch.device("meta"):
        return Transformer(args)


def num_params(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith(".scale"))


def test_parameter_count_equals_transformers(args, model):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config())
    gate_biases = args.n_routed_experts * (args.n_layers - args.n_dense_layers)  # a buffer over there
    assert num_params(model) == sum(p.numel() for p in theirs.parameters()) + gate_biases
    assert 671e9 < num_params(model) < 673e9


def test_cache_bytes_per_token_and_layer(args, model):
    """1,152 latent bytes in bf16; 128 fp8 key bytes and a 4-byte scale (as stored where fp8 exists)."""
    cache = model.new_cache(4, 64, "meta")
    assert cache.latent_bytes_per_token == 1152
    per_key = args.index_head_dim * torch.float8_e4m3fn.itemsize + 4
    assert per_key == 132
    # without fp8 hardware the same values are held in bf16
    assert cache.index_bytes_per_token == args.index_head_dim * 2 + 4


@pytest.mark.parametrize("size", [2, 8, 16])
def test_a_rank_holds_its_share(args, size):
    first_layers = dataclasses.replace(args, n_layers=6)  # the others are like the last
    with torch.device("meta"):
        shard = Transformer(first_layers, group=ParallelGroup(rank=size - 1, size=size))
    assert len(shard.layers[5].ffn.experts) == 256 // size
    assert shard.layers[0].attn.wo.weight.shape == (7168, 128 * 128 // size)
    assert shard.head.weight.shape == (129280 // size, 7168)


def test_ranks_that_do_not_divide_are_refused(args):
    with pytest.raises(ValueError, match="n_heads 128 does not divide over 3 ranks"):
        Transformer(args, group=ParallelGroup(rank=0, size=3))
