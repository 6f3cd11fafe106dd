"""The training loop: phase after phase, seeded, saved every minute, resumed where it stood.

One line of JSON per log interval goes to `log.jsonl`. Knows no text; `batches` makes it.

    trainer = Trainer(args, Recipe.tiny(), word_tokenizer(), Path("run"))
    trainer.run(minutes=60)            # True once every phase is done
"""

from __future__ import annotations

import collections
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsatrace.model.config import ModelArgs
from dsatrace.model.transformer import Transformer
from dsatrace.workloads.tokenizer import Tokenizer
from train_needle.batches import Batch, make_batch
from train_needle.forward import Attention, forward
from train_needle.losses import answer_loss, index_loss
from train_needle.recipe import Phase, Recipe
from train_needle.state import STATE, load_state, save_state

LOG_STEPS = 20
SAVE_S = 60.0
EMBEDDING_STD = 0.5
FIRST_LOGIT_SCALE = 0.25
"""The last norm's first weight: tied logits start small."""

Report = Callable[[Phase, int, dict[str, Any]], None]
"""Told (phase, steps done in it, the last log line)."""


def new_model(args: ModelArgs, seed: int) -> Transformer:
    """Weights of std 1/sqrt(fan in), a branch's output smaller by sqrt(2 layers).

    The head starts as the embedding and stays tied to it while training, so that what copying needs
    is learnt once for all tokens; a checkpoint holds both.
    """
    model = Transformer(args)
    generator = torch.Generator().manual_seed(seed)
    branch = (2 * args.n_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
        elif parameter.dim() == 1:
            parameter.data.fill_(FIRST_LOGIT_SCALE if name == "norm.weight" else 1.0)
        else:
            is_branch = name.endswith(("wo.weight", "w2.weight"))
            std = EMBEDDING_STD if name == "embed.weight" else parameter.shape[-1] ** -0.5
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(values * std * (branch if is_branch else 1.0))
    model.head.weight = model.embed.weight
    return model


class Trainer:
    """Owns model, optimiser and where in the recipe they stand."""

    def __init__(
        self,
        args: ModelArgs,
        recipe: Recipe,
        tokenizer: Tokenizer,
        folder: Path,
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts anew, or from the state that `folder` holds."""
        self.recipe, self.tokenizer, self.folder = recipe, tokenizer, folder
        self.device = torch.device(device)
        self.model = new_model(args, recipe.seed).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, betas=recipe.betas)
        self.phase, self.step, self.running = 0, 0, 0.0
        self.seconds = dict[str, float]()
        self.bf16 = is_bf16_faster(self.device)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).exists():
            progress = load_state(folder, self.model, self.optimizer)
            self.phase, self.step, self.running = progress["phase"], progress["step"], progress["running"]
            self.seconds, self.bf16 = progress["seconds"], progress["bf16"]

    def run(self, minutes: float = math.inf, report: Report | None = None) -> bool:
        """Trains until the recipe or the time is over; True in the first case."""
        started = saved = time.monotonic()
        sums, log_started = collections.Counter[str](), started
        while self.phase < len(self.recipe.phases):
            phase = self.recipe.phases[self.phase]
            begun = time.monotonic()
            sums.update(self._train_step(phase))
            now = time.monotonic()
            self.seconds[phase.name] = self.seconds.get(phase.name, 0.0) + now - begun
            self.step += 1
            is_over = self.step >= phase.num_steps or self.running >= phase.enough
            if self.step % LOG_STEPS == 0 or is_over:
                line = self._line(phase, sums, now - log_started)
                if report is not None:
                    report(phase, self.step, line)
                sums, log_started = collections.Counter(), now
            if is_over:
                self.phase, self.step, self.running = self.phase + 1, 0, 0.0
            if is_over or now - saved > SAVE_S:
                self.save()
                saved = now
            if now - started > 60 * minutes:
                self.save()
                return self.phase >= len(self.recipe.phases)
        return True

    def save(self) -> None:
        """Puts the state into the run's folder."""
        names = ("phase", "step", "running", "seconds", "bf16")
        progress = {name: getattr(self, name) for name in names}
        save_state(self.folder, self.model, self.optimizer, progress)

    def _train_step(self, phase: Phase) -> dict[str, float]:
        """One update; sums for the log."""
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = learning_rate(phase, self.step), phase.decay
        batch = make_batch(phase, self.recipe.seed, self.step, self.tokenizer).to(self.device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trains(phase, name))
        self.optimizer.zero_grad(set_to_none=True)
        loss, sums = phase_loss(self.model, phase, batch, self.bf16)
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        self.optimizer.step()
        if sums["answers"]:
            share = sums["right"] / sums["answers"]
            self.running += 0.02 * (share - self.running)
        return sums | {"steps": 1.0, "tokens": float(batch.sequences.tokens.numel())}

    def _line(self, phase: Phase, sums: collections.Counter[str], seconds: float) -> dict[str, Any]:
        line: dict[str, Any] = {"phase": phase.name, "step": self.step, "running": round(self.running, 4)}
        line["tokens_per_s"] = round(sums["tokens"] / max(seconds, 1e-9))
        line["loss"] = round(sums["loss"] / sums["steps"], 4)
        line |= {
            name: round(sums[name] / sums["steps"], 4) for name in sorted(sums) if name.startswith("kl_")
        }
        for name in sorted(sums):
            if name.startswith("answers_"):
                kind = name.removeprefix("answers_")
                line[kind] = round(sums[f"right_{kind}"] / sums[name], 3)
        line["lr"] = learning_rate(phase, max(0, self.step - 1))
        line["bf16"] = self.bf16 and phase.mode == "dense"
        line["seconds"] = round(sum(self.seconds.values()), 1)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        return line


def trains(phase: Phase, name: str) -> bool:
    """Whether a phase trains the parameter of this name."""
    is_indexer = ".indexer." in name
    return {"dense": not is_indexer, "indexer": is_indexer, "sparse": True}[phase.mode]


def learning_rate(phase: Phase, step: int) -> float:
    """Up over the warm-up, then along a cosine from `lr` to `last_lr`."""
    if step < phase.warmup:
        return phase.lr * (step + 1) / phase.warmup
    share = step / max(1, phase.num_steps)
    return phase.last_lr + (phase.lr - phase.last_lr) * 0.5 * (1 + math.cos(math.pi * share))


def phase_loss(
    model: Transformer, phase: Phase, batch: Batch, bf16: bool = False
) -> tuple[torch.Tensor, dict[str, float]]:
    """The phase's loss on a batch, and sums for the log; `bf16` is for dense phases."""
    attentions = list[Attention]()
    observe = attentions.append if phase.index_weight else None
    # bf16 only where nothing is selected: a selection is to be the one that serves.
    half = torch.autocast(batch.targets.device.type, torch.bfloat16, enabled=bf16 and phase.mode == "dense")
    with torch.set_grad_enabled(phase.mode != "indexer"), half:
        logits = forward(model, batch.sequences, phase.mode == "sparse", observe)
        loss = answer_loss(logits, batch.targets, batch.weights)
    sums = {"loss": float(loss.detach()), **_right_answers(logits, batch)}
    if phase.mode == "indexer":
        loss = torch.zeros((), dtype=loss.dtype, device=loss.device)
    for attention in attentions:
        divergence = index_loss(attention, batch.sequences.rows, batch.index_weights)
        sums[f"kl_{attention.layer_id}"] = float(divergence.detach())
        loss = loss + phase.index_weight * divergence
    return loss, sums


def is_bf16_faster(device: torch.device) -> bool:
    """Whether the device multiplies bf16 faster than fp32: a CPU without units for it emulates them."""
    return device.type != "cpu" or _matmul_s(torch.bfloat16) < _matmul_s(torch.float32)


def _matmul_s(dtype: torch.dtype) -> float:
    """The fastest of a few products of the size that training takes."""
    a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return min(times)


@torch.no_grad()
def _right_answers(logits: torch.Tensor, batch: Batch) -> dict[str, float]:
    """How many answers were wholly right, each token the likeliest; in all and by kind."""
    wrong = (logits.argmax(-1) != batch.targets) & (batch.weights > 0)
    missed = set(batch.answers[wrong].tolist())
    sums = collections.Counter[str]()
    for i, kind in enumerate(batch.kinds):
        right = i not in missed
        sums.update({"answers": 1, "right": right, f"answers_{kind}": 1, f"right_{kind}": right})
    totals = {name: float(value) for name, value in sums.items()}
    if all(kind.endswith("repeats") for kind in batch.kinds):  # long copies: count their tokens
        said = float((batch.weights > 0).sum())
        totals |= {"right": said - float(wrong.sum()), "answers": said}
    return totals
