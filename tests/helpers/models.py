"""Small random models for the tests: real architecture, seconds to build."""

from __future__ import annotations

import dataclasses

import torch

from dsatrace.model.batch import Batch, Span
from dsatrace.model.cache import KVCache
from dsatrace.model.config import ModelArgs
from dsatrace.model.indexer import Indexer
from dsatrace.model.selection import Selection
from dsatrace.model.transformer import Transformer

SMALL = ModelArgs(
    vocab_size=97,
    dim=64,
    inter_dim=96,
    moe_inter_dim=32,
    n_layers=3,
    n_dense_layers=1,
    n_heads=4,
    n_routed_experts=8,
    n_shared_experts=1,
    n_activated_experts=2,
    n_expert_groups=4,
    n_limited_groups=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    dtype="fp32",
    index_n_heads=4,
    index_head_dim=16,
    index_topk=24,
    max_seq_len=4096,
    original_seq_len=512,
    rope_factor=8.0,
)
"""Shape of most tests: three layers, top-24, so a context of 100 is sparse."""


def without_rounding(args: ModelArgs, **changes: object) -> ModelArgs:
    """The same shape with fp8 and Hadamard off, as transformers computes it."""
    plain = {"index_fp8": False, "index_hadamard": False, "latent_fp8": False}
    return dataclasses.replace(args, **{**plain, **changes})


def random_model(args: ModelArgs, seed: int = 0) -> Transformer:
    """Weights scaled by fan-in, norms near one, a gate bias that matters."""
    model = Transformer(args)
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        if "norm" in name or name.endswith("bias"):
            noise = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif name != "embed.weight":
            noise = noise * param.shape[-1] ** -0.5
        param.data.copy_(noise)
    return model


def random_tokens(num_tokens: int, args: ModelArgs, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, args.vocab_size, (num_tokens,), generator=generator).tolist()


def new_cache(model: Transformer, num_tokens: int, block_size: int = 16) -> KVCache:
    return model.new_cache(-(-num_tokens // block_size), block_size)


def prefill(
    model: Transformer, cache: KVCache, tokens: list[int], chunk: int, blocks: list[int] | None = None
) -> torch.Tensor:
    """Runs a prompt through in chunks; returns the last token's logits `(vocabulary,)`."""
    blocks = list(range(cache.num_blocks)) if blocks is None else blocks
    for start in range(0, len(tokens), chunk):
        span = Span(blocks, start, tokens[start : start + chunk])
        logits = model(Batch.build([span], cache.block_size), cache)
    return logits[0]


class SelectionLog:
    """Keeps every selection of a model: `log[layer]` is a list of `(rows, K)` selections in call order."""

    def __init__(self, model: Transformer) -> None:
        self.by_layer: list[list[Selection]] = [[] for _ in model.layers]
        for indexer in model.indexers:
            self._attach(indexer)

    def _attach(self, indexer: Indexer) -> None:
        indexer.on_select = lambda layer, selection: self.by_layer[layer].append(selection)

    def sets(self) -> list[list[frozenset[int]]]:
        """Selected sets, a list a layer, one set a row in call order."""
        return [
            [frozenset(p for p in row if p >= 0) for s in selections for row in s.positions.tolist()]
            for selections in self.by_layer
        ]

    def clear(self) -> None:
        for selections in self.by_layer:
            selections.clear()
