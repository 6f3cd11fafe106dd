"""One step's batch: samples drawn from the phase's mixture, as tensors.

The batch of a step depends on seed, phase and step alone, so a run that resumes sees what it
would have seen. Knows no model.

    batch = make_batch(recipe.phases[0], recipe.seed, step=0, tokenizer=word_tokenizer())
"""

from __future__ import annotations

import dataclasses
import random

import torch

from dsatrace.workloads.tokenizer import PAD, Tokenizer
from train_needle.drills import Sample
from train_needle.forward import Sequences
from train_needle.recipe import Phase
from train_needle.samples import SAMPLERS

TRAINING = "train"
"""Prefix of the names of all training draws."""

LONG_ANSWER = 64
"""An answer of more tokens weighs no more: one long copy must not outweigh a hundred needles."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """`sequences.rows (B, M)`: answers' rows first, then rows of weight 0, for the indexer alone."""

    sequences: Sequences
    targets: torch.Tensor  # (B, M) int64
    weights: torch.Tensor  # (B, M) fp32, above 0 at an answer's rows
    answers: torch.Tensor  # (B, M) int64, which of the batch's answers a row belongs to, -1 none
    kinds: list[str]  # sampler of each answer

    @property
    def index_weights(self) -> torch.Tensor:
        """(B, M): half for the answers' rows and half for the others."""
        said = (self.weights > 0).to(self.weights.dtype)
        others = 1 - said
        return said / said.sum().clamp_min(1) + others / others.sum().clamp_min(1)

    def to(self, device: torch.device) -> Batch:
        moved = Sequences(
            *(getattr(self.sequences, name).to(device) for name in ("tokens", "positions", "rows"))
        )
        return dataclasses.replace(
            self,
            sequences=moved,
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            answers=self.answers.to(device),
        )


def make_batch(phase: Phase, seed: int, step: int, tokenizer: Tokenizer) -> Batch:
    """The samples of one step, padded to the longest."""
    names, shares = list(phase.mixture), list(phase.mixture.values())
    samples, kinds, gaps = list[Sample](), list[str](), list[list[int]]()
    breaks = {tokenizer.encode("\n")[0], tokenizer.encode(".")[0]}
    for i in range(phase.batch_size):
        draw = random.Random(f"{TRAINING}/{seed}/{phase.name}/{step}/{i}")
        kind = draw.choices(names, shares)[0]
        sample = SAMPLERS[kind](draw, tokenizer, phase.length)
        samples.append(sample)
        kinds.append(kind)
        gaps.append(_positions(draw, sample, phase.reach, breaks))
    generator = random.Random(f"{TRAINING}/{seed}/{phase.name}/{step}/rows")
    return _stack(samples, kinds, gaps, phase.extra_rows, generator, tokenizer.special_id(PAD))


def _positions(draw: random.Random, sample: Sample, reach: int, breaks: set[int]) -> list[int]:
    """0, 1, 2, ..., in half of the samples with up to four gaps after sentences of the context."""
    length = len(sample.ids)
    positions = list(range(length))
    if reach <= length or draw.random() < 0.5:
        return positions
    first = sample.answers[0][0] if sample.answers else length
    places = [i + 1 for i, token in enumerate(sample.ids[: first - 1]) if token in breaks]
    room = draw.randrange(reach - length)
    for place in draw.sample(places, min(4, len(places))):
        gap = draw.randrange(room + 1)
        room -= gap
        for i in range(place, length):
            positions[i] += gap
    return positions


def _stack(
    samples: list[Sample],
    kinds: list[str],
    positions: list[list[int]],
    extra_rows: int,
    draw: random.Random,
    pad: int,
) -> Batch:
    length = max(len(sample.ids) for sample in samples)
    num_said = max(sum(end - start for start, end in sample.answers) for sample in samples)
    num_rows = max(1, num_said) + extra_rows
    shape = len(samples), num_rows
    tokens = torch.full((len(samples), length), pad)
    places = torch.zeros(len(samples), length, dtype=torch.int64)
    rows, targets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    weights, answers = torch.zeros(shape), torch.full(shape, -1)
    answer_kinds = list[str]()
    for i, (sample, kind) in enumerate(zip(samples, kinds, strict=True)):
        size = len(sample.ids)
        tokens[i, :size] = torch.tensor(sample.ids)
        places[i, :size] = torch.tensor(positions[i])
        places[i, size:] = torch.arange(1, length - size + 1) + positions[i][-1]
        said = [place for start, end in sample.answers for place in range(start, end)]
        others = [draw.randrange(size) for _ in range(num_rows - len(said))]
        rows[i] = torch.tensor([place - 1 for place in said] + others)
        targets[i, : len(said)] = tokens[i, said]
        column = 0
        for start, end in sample.answers:
            columns = slice(column, column + end - start)
            answers[i, columns] = len(answer_kinds)
            weights[i, columns] = min(1.0, LONG_ANSWER / (end - start))
            answer_kinds.append(kind)
            column += end - start
    return Batch(Sequences(tokens, places, rows), targets, weights, answers, answer_kinds)
