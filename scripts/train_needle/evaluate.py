"""What the trained model can do, held out by seed: RULER accuracy, needle recall, the shuffled control.

Sparse figures come from the served modules: paged cache, the indexer's choice, greedy decoding,
RULER's score. Dense ones come from `forward` without a selection: an answer is right if each of its
tokens is the likeliest after those before, which is what greedy decoding would write. For tasks with
one reference, whose answer is a space and then the needle's tokens. Knows no training.

    measure(model, tokenizer, "niah_single_1", 2048, num_examples=100).accuracy
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dsatrace.model.batch import Batch, Span
from dsatrace.model.transformer import Transformer
from dsatrace.workloads.encoding import Message, encode_chat
from dsatrace.workloads.ruler.example import Example, score
from dsatrace.workloads.ruler.generator import generate
from dsatrace.workloads.tokenizer import Tokenizer
from train_needle.forward import Sequences, forward

HELD_OUT_SEED = 900_000
"""Evaluation draws from this seed on; training's draws are named otherwise (`batches.TRAINING`)."""

CHUNK = 512
_OVERHEAD = 4  # BOS, User, Assistant and </think>, of which none is text
_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Measured:
    """Means over the examples, and over the steps that say the answer's tokens.

    `recall`: the share of all the needle's tokens that a layer selected. `recall_due`: whether
    it selected the one to be said next.
    """

    task: str
    length: int
    attention: str
    num_examples: int
    accuracy: float
    mean_context: float
    recall: tuple[float, ...] = ()  # a layer each
    recall_due: tuple[float, ...] = ()  # a layer each
    chance: float | None = None  # k / N

    @property
    def interval(self) -> tuple[float, float]:
        """Of `accuracy`, at 95 %."""
        low, high = wilson_interval(self.accuracy / 100, self.num_examples)
        return round(100 * low, 2), round(100 * high, 2)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "interval_95": self.interval}

    def line(self) -> str:
        """All of it for a person."""
        low, high = self.interval
        text = f"{self.task:16} {self.length:6} {self.attention:9} {self.accuracy:6.1f} %"
        text += f" ({low:.1f} to {high:.1f} at 95 %, {self.num_examples} prompts)"
        if self.chance is not None:
            whole, due = (" ".join(f"{r:.3f}" for r in each) for each in (self.recall, self.recall_due))
            text += f"  recall by layer {whole}, of the token due {due}, k/N {self.chance:.3f}"
        return text


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """The 95 % interval of a share of `num` trials, by Wilson's score: true to 0 and to 1 as well."""
    z = 1.959964  # the normal distribution's 97.5 % quantile
    middle = share + z * z / (2 * num)
    half = z * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    whole = 1 + z * z / num
    return max(0.0, middle - half) / whole, (middle + half) / whole


@dataclasses.dataclass(frozen=True)
class Asked:
    """One example as the model gets it; `needle` are absolute positions."""

    example: Example
    ids: list[int]
    needle: list[int]
    answer: list[int]  # what a model that is right would say, up to the last token asked for


def examples(
    tokenizer: Tokenizer, task: str, length: int, num_examples: int, seed: int = HELD_OUT_SEED
) -> Iterator[Asked]:
    """RULER examples in the chat form; prompt, prefix and room to answer are `length` tokens at most."""
    made = generate(task, length, tokenizer, num_examples, seed=seed, overhead_tokens=_OVERHEAD)
    for example in made:
        messages = [Message("user", example.prompt)]
        ids = encode_chat(messages, tokenizer, answer_prefix=example.answer_prefix)
        needle = [p + 2 for place in example.answer_positions or () for p in place]  # behind BOS and User
        yield Asked(example, ids, needle, tokenizer.encode(f" {' '.join(example.references)}"))


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    task: str,
    length: int,
    num_examples: int,
    shuffled: bool = False,
    seed: int = HELD_OUT_SEED,
) -> Measured:
    """The served model with its own selection, or with each row's scores `shuffled` over what it sees."""
    scores, contexts = list[float](), list[int]()
    recalls, dues, chances = list[list[float]](), list[list[float]](), list[float]()
    for asked in examples(tokenizer, task, length, num_examples, seed):
        text, selections = answer(model, tokenizer, asked.ids, len(asked.answer) + 4, shuffled)
        scores.append(score(asked.example, text))
        contexts.append(len(asked.ids))
        for step, due in zip(selections, asked.needle, strict=False):  # a step says one token of the needle
            needle = set(asked.needle)
            recalls.append([len(needle.intersection(chosen)) / len(needle) for chosen in step.chosen])
            dues.append([float(due in chosen) for chosen in step.chosen])
            chances.append(len(step.chosen[0]) / step.num_visible)
    return Measured(
        task,
        length,
        "shuffled" if shuffled else "sparse",
        len(scores),
        sum(scores) / len(scores),
        sum(contexts) / len(contexts),
        _means(recalls),
        _means(dues),
        sum(chances) / len(chances) if chances else None,
    )


def _means(rows: list[list[float]]) -> tuple[float, ...]:
    """Of each column; nothing when no step was made."""
    return tuple(torch.tensor(rows, dtype=torch.float64).mean(0).tolist()) if rows else ()


def measure_dense(
    model: Transformer,
    tokenizer: Tokenizer,
    task: str,
    length: int,
    num_examples: int,
    seed: int = HELD_OUT_SEED,
) -> Measured:
    """The same weights with everything selected."""
    right, contexts = list[bool](), list[int]()
    for asked in examples(tokenizer, task, length, num_examples, seed):
        right.append(would_say(model, asked.ids, asked.answer, sparse=False))
        contexts.append(len(asked.ids))
    accuracy = 100.0 * sum(right) / len(right)
    return Measured(task, length, "dense", len(right), accuracy, sum(contexts) / len(contexts))


@torch.no_grad()
def would_say(model: Transformer, ids: Sequence[int], expected: Sequence[int], sparse: bool) -> bool:
    """Whether greedy decoding after `ids` writes `expected`, found in one forward."""
    tokens = torch.tensor([[*ids, *expected]])
    rows = torch.arange(len(ids) - 1, tokens.shape[1] - 1).unsqueeze(0)
    logits = forward(model, Sequences(tokens, torch.arange(tokens.shape[1]).unsqueeze(0), rows), sparse)
    return logits.argmax(-1)[0].tolist() == list(expected)


@dataclasses.dataclass(frozen=True)
class Step:
    """One decode step: how much it saw, and what each layer selected of it."""

    num_visible: int
    chosen: list[set[int]]


class _Watch:
    """Notes what is resolved at each layer, and shuffles it first where that is asked for."""

    def __init__(self, num_layers: int, shuffled: bool) -> None:
        self.chosen: list[set[int]] = [set() for _ in range(num_layers)]
        self.shuffle = torch.Generator().manual_seed(0) if shuffled else None

    def __call__(self, layer_id: int, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        if self.shuffle is not None:
            positions = self._shuffled(batch, positions)
        self.chosen[layer_id] = {p for p in positions[-1].tolist() if p >= 0}
        return positions

    def _shuffled(self, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """As many of each row's visible positions, but any: the places of the row's scores permuted."""
        visible = batch.positions + 1  # (N,)
        noise = torch.rand(len(positions), int(visible.max()), generator=self.shuffle)
        noise = noise.masked_fill(torch.arange(noise.shape[1]) >= visible.unsqueeze(1), 2.0)
        return noise.argsort(dim=1)[:, : positions.shape[1]].masked_fill(positions < 0, -1)


def answer(
    model: Transformer, tokenizer: Tokenizer, ids: Sequence[int], max_new_tokens: int, shuffled: bool = False
) -> tuple[str, list[Step]]:
    """Greedy text after `ids` by the served model, and a `Step` for every decode step."""
    total = len(ids) + max_new_tokens
    cache = model.new_cache(-(-total // _BLOCK), _BLOCK)
    watch = _Watch(model.args.n_layers, shuffled)
    cache.select_override = watch
    blocks = list(range(cache.num_blocks))

    def run(first: int, tokens: Sequence[int]) -> int:
        logits = model(Batch.build([Span(blocks, first, tokens)], _BLOCK), cache)
        return int(logits[0].argmax())

    for first in range(0, len(ids), CHUNK):
        token = run(first, ids[first : first + CHUNK])
    said, steps = list[int](), list[Step]()
    while token != tokenizer.eos_id and len(said) < max_new_tokens:
        said.append(token)
        position = len(ids) + len(said) - 1
        token = run(position, [token])
        steps.append(Step(position + 1, [set(chosen) for chosen in watch.chosen]))
    return tokenizer.decode(said), steps
