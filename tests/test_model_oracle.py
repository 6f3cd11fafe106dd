"""Our model against transformers' `DeepseekV32ForCausalLM`, same weights, fp32.

Both sides take the same path the real weights take: transformers writes a checkpoint, our
converter reads it. Ties (equal scores at the k-th place, common with few index heads) are
broken differently by transformers. So that one tie cannot hide behind the next, our model
attends to transformers' selection in every layer, while its own choice is compared: each
difference must be a tie within 1e-6, and is counted.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsatrace.model.batch import Batch, Span
from dsatrace.model.checkpoint import load_checkpoint
from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.transformer import Transformer
from models import SMALL, new_cache, without_rounding

transformers = pytest.importorskip("transformers")

TIE = 1e-6
PROMPT, DECODE_STEPS = 300, 64

CONFIGS = {
    "few heads": without_rounding(SMALL),
    "many index heads, all dense first": without_rounding(
        SMALL, n_layers=4, n_dense_layers=2, n_heads=8, index_n_heads=16, index_topk=48, q_lora_rank=48
    ),
    "wide, no dense layer, no yarn": without_rounding(
        SMALL,
        dim=128,
        n_layers=2,
        n_dense_layers=0,
        n_heads=2,
        kv_lora_rank=48,
        v_head_dim=24,
        n_routed_experts=6,
        n_expert_groups=1,
        n_limited_groups=1,
        n_activated_experts=3,
        n_shared_experts=2,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=7,
        rope_factor=1.0,
        original_seq_len=4096,
    ),
}


def reference_config(args: ModelArgs):
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.uses_yarn:
        rope |= {
            "rope_type": "yarn",
            "factor": args.rope_factor,
            "original_max_position_embeddings": args.original_seq_len,
            "beta_fast": args.beta_fast,
            "beta_slow": args.beta_slow,
            "mscale": args.mscale,
            "mscale_all_dim": args.mscale,
        }
    return transformers.DeepseekV32Config(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.inter_dim,
        moe_intermediate_size=args.moe_inter_dim,
        num_hidden_layers=args.n_layers,
        first_k_dense_replace=args.n_dense_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_heads,
        n_shared_experts=args.n_shared_experts,
        n_routed_experts=args.n_routed_experts,
        num_experts_per_tok=args.n_activated_experts,
        n_group=args.n_expert_groups,
        topk_group=args.n_limited_groups,
        routed_scaling_factor=args.route_scale,
        q_lora_rank=args.q_lora_rank,
        kv_lora_rank=args.kv_lora_rank,
        qk_nope_head_dim=args.qk_nope_head_dim,
        qk_rope_head_dim=args.qk_rope_head_dim,
        v_head_dim=args.v_head_dim,
        index_topk=args.index_topk,
        index_head_dim=args.index_head_dim,
        index_n_heads=args.index_n_heads,
        max_position_embeddings=int(args.original_seq_len * args.rope_factor),
        rope_parameters=rope,
        attn_implementation="eager",
    )


def reference_model(args: ModelArgs, seed: int):
    """transformers' model with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    reference = transformers.DeepseekV32ForCausalLM(reference_config(args)).eval()
    with torch.no_grad():
        for name, param in reference.named_parameters():
            if "norm" in name:
                param.copy_(0.1 * torch.randn_like(param) + (0 if name.endswith("bias") else 1))
            elif "embed" in name:
                param.normal_()
            else:
                param.normal_(std=param.shape[-1] ** -0.5)
        for name, buffer in reference.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return reference


class Comparison:
    """Feeds transformers' selections to our model and compares them with our own choice."""

    def __init__(self, reference, ours: Transformer, cache) -> None:
        self.theirs: dict[int, torch.Tensor] = {}
        self.first_pos = self.compared = self.ties = 0
        for layer, block in enumerate(reference.model.layers):
            block.self_attn.indexer.register_forward_hook(
                lambda module, inputs, output, layer=layer: self.theirs.__setitem__(layer, output[0].long())
            )
        for indexer in ours.indexers:
            indexer.on_select = self._compare
        cache.select_override = self._override

    def _visible(self, layer: int, batch: Batch) -> torch.Tensor:
        theirs = self.theirs[layer]
        return theirs.masked_fill(theirs > batch.positions.unsqueeze(1), -1)  # it pads with the future

    def _override(self, layer: int, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        return self._visible(layer, batch)

    def _compare(self, layer: int, selection) -> None:
        for row, ours in enumerate(selection.positions.tolist()):
            mine = {p for p in ours if p >= 0}
            hers = {p for p in self.theirs[layer][row].tolist() if p <= self.first_pos + row}
            self.compared += 1
            if mine != hers:
                assert len(mine) == len(hers)
                assert selection.margin[row] <= TIE, f"layer {layer}, row {row}: not a tie"
                self.ties += 1


@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_and_selections(name, tmp_path):
    args = CONFIGS[name]
    reference = reference_model(args, seed=len(name))
    reference.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours", args.n_routed_experts, 1)
    ours = Transformer(args)
    load_checkpoint(ours, tmp_path / "ours")

    cache = new_cache(ours, PROMPT + DECODE_STEPS)
    comparison = Comparison(reference, ours, cache)
    tokens = torch.randint(0, args.vocab_size, (PROMPT + DECODE_STEPS,)).tolist()

    def both(first: int, end: int, past) -> tuple[float, object]:
        with torch.inference_mode():
            out = reference(torch.tensor([tokens[first:end]]), past_key_values=past, use_cache=True)
        comparison.first_pos = first
        blocks = list(range(cache.num_blocks))
        logits = ours(Batch.build([Span(blocks, first, tokens[first:end])], cache.block_size), cache)
        return (logits[0] - out.logits[0, -1]).abs().max().item(), out.past_key_values

    worst, past = both(0, PROMPT, None)
    for step in range(DECODE_STEPS):
        difference, past = both(PROMPT + step, PROMPT + step + 1, past)
        worst = max(worst, difference)
    print(f"{name}: {comparison.compared} selections, {comparison.ties} ties, logits within {worst:.1e}")
    assert comparison.compared == args.n_layers * (PROMPT + DECODE_STEPS)
    assert worst < 1e-4


def test_our_configs_say_what_transformers_reads():
    """The oracle would prove little if the sparse part were never reached."""
    for args in CONFIGS.values():
        assert args.index_topk < PROMPT / 4
        assert not (args.index_fp8 or args.index_hadamard or args.latent_fp8)
    assert len({(a.n_heads, a.index_topk, a.n_dense_layers) for a in CONFIGS.values()}) == 3
    assert any(dataclasses.replace(a).uses_yarn for a in CONFIGS.values())
