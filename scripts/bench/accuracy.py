"""bf16 and fp8 against fp32 on one checkpoint: logits, and what each layer selects.

The same prompts go through one model in each dtype. Compared are the logits of every token, and the
selections of every row that sees more tokens than it may select. fp8 weights are quantised as in a
release, in blocks of 128 x 128. "fp8 weights" is fp32 arithmetic on those: it tells the weights'
rounding from the arithmetic's. Two more are fp32 with one change: without the released model's
roundings, and with another eps of the latent norms. Prints the tables of docs/accuracy.md.

    python3 scripts/bench/accuracy.py                   # needle-2k, which is trained
    python3 scripts/bench/accuracy.py --random          # a larger shape, random weights
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from machine import announce, flag_parser

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.model.batch import Batch, Span
from dsatrace.model.checkpoint import load_transformer
from dsatrace.model.config import PLAIN_NUMERICS, ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.hf_config import WeightDtype
from dsatrace.model.selection import Selection
from dsatrace.model.tiny import quantise, write_checkpoint
from dsatrace.model.transformer import Transformer
from dsatrace.workloads.needle import needle_prompt
from dsatrace.workloads.tokenizer import load_tokenizer

NEEDLE = Path(__file__).resolve().parents[2] / "data" / "models" / "needle-2k"
CHUNK = 256  # rows of one forward
BLOCK_SIZE = 64
RANDOM = ModelArgs(
    vocab_size=4096,
    dim=512,
    inter_dim=1024,
    moe_inter_dim=256,
    n_layers=6,
    n_dense_layers=1,
    n_heads=8,
    n_routed_experts=16,
    n_activated_experts=4,
    n_expert_groups=4,
    n_limited_groups=2,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    dtype="fp32",
    index_n_heads=16,
    index_head_dim=64,
    index_topk=256,
)


@dataclasses.dataclass(frozen=True)
class Computed:
    """One prompt of T tokens through one model; S of its rows select fewer tokens than they see."""

    logits: torch.Tensor  # (T, vocabulary)
    selected: torch.Tensor  # (L, S, T) bool
    margin: torch.Tensor  # (L, S), k-th minus (k+1)-th score


@torch.inference_mode()
def compute(model: Transformer, tokens: Sequence[int]) -> Computed:
    selections: list[list[Selection]] = [[] for _ in model.layers]
    for indexer in model.indexers:
        indexer.on_select = lambda layer, selection: selections[layer].append(selection)
    cache = model.new_cache(-(-len(tokens) // BLOCK_SIZE), BLOCK_SIZE)
    logits = []
    for first in range(0, len(tokens), CHUNK):
        span = Span(range(cache.num_blocks), first, tokens[first : first + CHUNK])
        batch = Batch.build([span], BLOCK_SIZE)
        logits.append(model(dataclasses.replace(batch, logit_rows=torch.arange(len(span.tokens))), cache))
    layers = [_selected(layer, len(tokens), model.args.index_topk) for layer in selections]
    selected, margin = (torch.stack(parts) for parts in zip(*layers, strict=True))
    return Computed(torch.cat(logits).double(), selected, margin)


def _selected(selections: Sequence[Selection], length: int, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen positions (S, T) and margins (S,) of the rows at `topk` and beyond."""
    mask = torch.zeros(length, length + 1, dtype=torch.bool)
    row = 0
    for selection in selections:
        padded = selection.positions < 0
        chosen = selection.positions.masked_fill(padded, length)  # the last column is dropped
        mask[row : row + len(chosen)].scatter_(1, chosen, True)
        row += len(chosen)
    margin = torch.cat([selection.margin for selection in selections])
    return mask[topk:, :length], margin[topk:].double()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One model against the fp32 one, all prompts together: R rows of logits, S rows of selections."""

    difference: torch.Tensor  # (R, vocabulary), absolute
    logits: torch.Tensor  # (R, vocabulary), of fp32, absolute
    same_best: torch.Tensor  # (R,) bool
    same_set: torch.Tensor  # (L, S) bool
    common: torch.Tensor  # (L, S), share of the positions that both selected
    margin: torch.Tensor  # (L, S), of fp32

    @classmethod
    def of(cls, exact: Sequence[Computed], other: Sequence[Computed]) -> Comparison:
        rows = zip(exact, other, strict=True)
        parts = [
            (
                (a.logits - b.logits).abs(),
                a.logits.abs(),
                a.logits.argmax(-1) == b.logits.argmax(-1),
                (a.selected == b.selected).all(-1).T,
                ((a.selected & b.selected).sum(-1) / a.selected.sum(-1)).T,
                a.margin.T,
            )
            for a, b in rows
        ]
        difference, logits, best, same, common, margin = map(torch.cat, zip(*parts, strict=True))
        return cls(difference, logits, best, same.T, common.T, margin.T)

    def overall(self) -> list[str]:
        return [
            f"{float(self.difference.max() / self.logits.max()):.2%}",
            f"{float(self.difference.amax(-1).median() / self.logits.max()):.2%}",
            f"{float(self.difference.mean() / self.logits.mean()):.2%}",
            f"{float(self.same_best.double().mean()):.1%}",
            *self.selections(self.same_set, self.common, self.margin),
        ]

    def by_layer(self) -> list[list[str]]:
        return [self.selections(*rows) for rows in zip(self.same_set, self.common, self.margin, strict=True)]

    @staticmethod
    def selections(same: torch.Tensor, common: torch.Tensor, margin: torch.Tensor) -> list[str]:
        medians = (
            f"{float(rows.median()):.1e}" if len(rows) else "" for rows in (margin[~same], margin[same])
        )
        return [f"{float(same.double().mean()):.1%}", f"{float(common.mean()):.2%}", *medians]


SELECTIONS = ("same set", "common positions", "margin where they differ", "where they agree")
OVERALL = ("against fp32", "logits, max", "max of the median row", "mean", "same best token", *SELECTIONS)


def models(checkpoint: Path, args: ModelArgs) -> Iterator[tuple[str, Transformer]]:
    """fp32 first. One at a time is in memory beside that."""
    exact = loaded(checkpoint, args, "fp32")
    yield "fp32", exact
    yield "bf16", loaded(checkpoint, args, "bf16")
    fp8 = quantised(exact)
    yield "fp8", fp8
    yield "fp8 weights, fp32 arithmetic", dequantised(fp8)
    yield "fp32, --numerics plain", loaded(checkpoint, dataclasses.replace(args, **PLAIN_NUMERICS), "fp32")
    other_eps = dataclasses.replace(args, latent_norm_eps=1e-5)
    yield "fp32, latent norms' eps 1e-5", loaded(checkpoint, other_eps, "fp32")


def loaded(checkpoint: Path, args: ModelArgs, dtype: WeightDtype) -> Transformer:
    return load_transformer(dataclasses.replace(args, dtype=dtype), checkpoint)


def quantised(exact: Transformer) -> Transformer:
    """The same model with fp8 weights, and all else in the types it has beside them."""
    model = Transformer(dataclasses.replace(exact.args, dtype="fp8"))
    weights = exact.state_dict()
    for name, target in model.state_dict().items():
        if target.dtype is torch.float8_e4m3fn:
            values, scale = quantise(weights[name], exact.args.scale_fmt)
            target.copy_(values)
            model.get_parameter(name.removesuffix("weight") + "scale").data.copy_(scale)
        elif name in weights:
            target.copy_(weights[name])
    return model


def dequantised(fp8: Transformer) -> Transformer:
    model = Transformer(dataclasses.replace(fp8.args, dtype="fp32"))
    weights = fp8.state_dict()
    for name, target in model.state_dict().items():
        weight = weights[name]
        if weight.dtype is torch.float8_e4m3fn:
            scale = weights[name.removesuffix("weight") + "scale"]
            weight = fp8.setup.kernels.dequantise_weight(weight, scale, torch.float32)
        target.copy_(weight)
    return model


def needle_tokens(flags: argparse.Namespace) -> list[list[int]]:
    tokenizer = load_tokenizer(NEEDLE)
    prompts = [
        needle_prompt(flags.tokens, lambda text: len(tokenizer.encode(text)), (i + 0.5) / flags.prompts, i)
        for i in range(flags.prompts)
    ]
    return [tokenizer.encode(prompt.text) for prompt in prompts]


def random_tokens(flags: argparse.Namespace) -> list[list[int]]:
    draw = partial(torch.randint, RANDOM.vocab_size, (flags.tokens,))
    return [draw(generator=torch.Generator().manual_seed(i)).tolist() for i in range(flags.prompts)]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In Markdown."""
    print("|", " | ".join(header), "|")
    print("|---" + "|---:" * (len(header) - 1) + "|")
    for row in rows:
        print("|", " | ".join(row), "|")
    print()


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Computes every prompt in every dtype; prints a table of all layers, and one by layer."""
    flags = _parser().parse_args(argv)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    announce("torch", threads=torch.get_num_threads())
    args = RANDOM if flags.random else ModelArgs.from_json(NEEDLE / "serving_config.json")
    if flags.prompts < 1 or flags.tokens <= args.index_topk:
        raise UserError(f"use at least 1 prompt, of more than {args.index_topk} tokens, the top-k")
    prompts = random_tokens(flags) if flags.random else needle_tokens(flags)
    with tempfile.TemporaryDirectory() as folder:
        hf = NEEDLE
        if flags.random:
            hf = Path(folder, "hf")
            write_checkpoint(hf, args, weights="bf16")
        converted = Path(folder, "converted")
        convert_checkpoint(hf, converted, args.n_routed_experts, 1)
        computed = {
            name: [compute(model, tokens) for tokens in prompts] for name, model in models(converted, args)
        }
    exact = computed.pop("fp32")
    compared = {name: Comparison.of(exact, other) for name, other in computed.items()}
    num_rows = sum(len(each.logits) for each in exact)
    print(f"{len(prompts)} prompts, {num_rows} rows, top-{args.index_topk}, {args.n_layers} layers\n")
    print_table(OVERALL, [[name, *each.overall()] for name, each in compared.items()])
    for name, each in compared.items():
        rows = [[str(layer), *cells] for layer, cells in enumerate(each.by_layer())]
        print_table((f"{name}, layer", *SELECTIONS), rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = flag_parser(__doc__)
    parser.add_argument("--random", action="store_true", help="random weights, 6 layers of width 512")
    parser.add_argument("--prompts", type=int, default=4, help="number of prompts")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens per prompt, at most")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's choice)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
