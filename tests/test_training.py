"""Training: its forward is the one that serves, its losses reach what they should, and it resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from operator import itemgetter

import pytest
import torch

from conftest import ROOT
from dsatrace.model.batch import Batch as ServedBatch
from dsatrace.model.batch import Span
from dsatrace.workloads.encoding import Message, encode_chat
from dsatrace.workloads.ruler.generator import generate
from dsatrace.workloads.tokenizer import load_tokenizer
from helpers.models import SMALL, new_cache, random_model, random_tokens
from helpers.power import examples
from train_needle import trainer
from train_needle.batches import make_batch
from train_needle.evaluate import HELD_OUT_SEED, Measured, answer, measure, would_say
from train_needle.export import load_exported
from train_needle.forward import Attention, Sequences, forward
from train_needle.losses import index_loss
from train_needle.recipe import Phase, Recipe
from train_needle.samples import SAMPLERS, Talk
from train_needle.tokenizer import word_tokenizer, word_tokenizer_json
from train_needle.trainer import Trainer, new_model, phase_loss

FP64 = dataclasses.replace(SMALL, dtype="fp64")
LENGTH = 90


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def served_logits(model, tokens):
    """Logits of every row, by the model as it serves."""
    cache = new_cache(model, len(tokens))
    batch = ServedBatch.build([Span(list(range(cache.num_blocks)), 0, tokens)], cache.block_size)
    return model(dataclasses.replace(batch, logit_rows=torch.arange(len(tokens))), cache)


def sequences(batch_of_tokens, rows=None):
    tokens = torch.tensor(batch_of_tokens)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    rows = positions if rows is None else torch.tensor(rows).expand(len(tokens), -1)
    return Sequences(tokens, positions, rows)


@pytest.mark.parametrize("rounding", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("v_head_dim", [16, 24, 40])
def test_the_training_forward_gives_the_served_logits(sparse, rounding, v_head_dim):
    args = dataclasses.replace(
        FP64,
        v_head_dim=v_head_dim,
        index_fp8=rounding,
        index_hadamard=rounding,
        latent_fp8=rounding,
        index_topk=24 if sparse else LENGTH,
    )
    model = random_model(args)
    batch = [random_tokens(LENGTH, args, seed) for seed in (0, 1)]
    expected = torch.stack([served_logits(model, tokens) for tokens in batch])
    with torch.no_grad():
        everywhere = forward(model, sequences(batch), sparse)
        rows = [3, 50, 88, 88, 10]
        at_rows = forward(model, sequences(batch, rows), sparse)
    torch.testing.assert_close(everywhere, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(at_rows, expected[:, rows], rtol=1e-9, atol=1e-9)


def test_sparse_attention_differs_from_dense():
    model = random_model(FP64)
    batch = sequences([random_tokens(LENGTH, FP64)])
    with torch.no_grad():
        difference = (forward(model, batch, sparse=True) - forward(model, batch, sparse=False)).abs()
    assert difference[0, :24].max() < 1e-9 < difference[0, 40:].max()


TINY = dataclasses.replace(SMALL, n_layers=2, index_topk=16)
INDEXER_PHASE = Phase(
    "indexer", "indexer", 96, 2, 4, 1e-3, 1e-3, {"niah": 1.0}, index_weight=1.0, extra_rows=8
)
SPARSE_PHASE = dataclasses.replace(INDEXER_PHASE, name="sparse", mode="sparse")


def small_args(tokenizer):
    return dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)


def gradients(model, phase, tokenizer):
    """Names of the parameters that a phase's loss moves, though all of them ask for a gradient."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batch = make_batch(phase, seed=0, step=0, tokenizer=tokenizer)
    loss, _ = phase_loss(model, phase, batch)
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_the_indexer_phase_moves_the_indexer_alone(tokenizer):
    model = new_model(small_args(tokenizer), seed=0)
    moved = gradients(model, INDEXER_PHASE, tokenizer)
    assert moved == {name for name, _ in model.named_parameters() if ".indexer." in name}


def test_the_sparse_phase_moves_everything_but_what_only_chooses(tokenizer):
    model = new_model(small_args(tokenizer), seed=0)
    moved = gradients(model, SPARSE_PHASE, tokenizer)
    still = {name for name, _ in model.named_parameters()} - moved
    assert all("gate.bias" in name or ".experts." in name for name in still), still


@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_dense_phases_take_the_faster_numbers(tokenizer, tmp_path, monkeypatch, faster):
    """A resumed run keeps those it began with."""
    monkeypatch.setattr(trainer, "_matmul_s", lambda dtype: 1.0 if dtype == faster else 2.0)
    args, plan = small_args(tokenizer), recipe("dense", "sparse")
    Trainer(args, plan, tokenizer, tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["bf16"] for line in lines] == [faster == torch.bfloat16, False]
    monkeypatch.setattr(trainer, "_matmul_s", lambda dtype: 2.0 if dtype == faster else 1.0)
    assert Trainer(args, plan, tokenizer, tmp_path).bf16 == (faster == torch.bfloat16)


def test_the_divergence_is_zero_where_scores_are_the_attention(tokenizer):
    """Against the definition, written out for one row and layer in plain numbers."""
    model = random_model(FP64)
    batch = sequences([random_tokens(LENGTH, FP64)], rows=[70])
    seen = list[Attention]()
    with torch.no_grad():
        forward(model, batch, sparse=True, observe=seen.append)
    attention = seen[1]
    loss = index_loss(attention, batch.rows, torch.ones(1, 1))

    selected = attention.selected[0, 70]
    scores = attention.query[0, :, 70] @ attention.key[0].transpose(1, 2)  # (H, 1, T)
    scores = torch.stack([attention.query[0, h, 70] @ attention.key[0, h].T for h in range(FP64.n_heads)])
    target = (scores * attention.module.scale)[:, selected].softmax(-1).sum(0) / FP64.n_heads
    assert int(selected.sum()) == FP64.index_topk
    assert float(loss) > 0
    log_share = _index_scores(attention, 70)[selected].log_softmax(-1)
    expected = (target * (target.log() - log_share)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def _index_scores(attention, row):
    """sum_h w_h relu(q_h . k) of one row, by the serving modules without rounding."""
    indexer, args = attention.module.indexer, attention.module.setup.args
    plain = dataclasses.replace(args, index_fp8=False)
    indexer.setup = dataclasses.replace(indexer.setup, args=plain)
    rope = attention.rope.each(itemgetter(0))
    query = indexer.wq_b(attention.q_latent[0]).view(-1, args.index_n_heads, args.index_head_dim)
    query, _ = indexer._rotate_and_quantise(query, rope.per_head)
    key, _ = indexer._rotate_and_quantise(indexer.k_norm(indexer.wk(attention.x[0])), rope)
    weights = indexer.weights_proj(attention.x[0, row]) * indexer.score_scale
    return sum(weights[h] * (key @ query[row, h]).relu() for h in range(args.index_n_heads))


def recipe(*modes):
    phases = [
        Phase(f"{i}-{mode}", mode, 96, 2, 3, 1e-3, 1e-4, {"recital": 1.0, "niah": 1.0}, extra_rows=4,
              index_weight=float(mode != "dense"), reach=200)
        for i, mode in enumerate(modes)
    ]  # fmt: skip
    return Recipe(tuple(phases))


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tokenizer, tmp_path):
    args, plan = small_args(tokenizer), recipe("dense", "indexer", "sparse")
    whole = Trainer(args, plan, tokenizer, tmp_path / "whole")
    assert whole.run()
    for _ in range(20):  # a budget of no time at all: one step a run
        if Trainer(args, plan, tokenizer, tmp_path / "parts").run(minutes=0):
            break
    resumed = Trainer(args, plan, tokenizer, tmp_path / "parts")
    assert (resumed.phase, resumed.step) == (3, 0)
    for (name, expected), (_, actual) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(expected, actual), name
        moments, kept = whole.optimizer.state[expected], resumed.optimizer.state[actual]
        assert set(moments) == set(kept)
        assert all(torch.equal(moments[key], kept[key]) for key in moments), name


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samples_fit_and_say_what_stands_in_their_context(kind, tokenizer):
    for i in range(5):
        sample = SAMPLERS[kind](random.Random(f"test/{i}"), tokenizer, 512)
        assert len(sample.ids) <= 512
        assert sample.answers
        first_answer = sample.answers[0][0]
        context = tokenizer.decode(sample.ids[:first_answer])
        for start, end in sample.answers:
            assert first_answer <= start < end <= len(sample.ids)
            if kind not in ("units", "copying") and not kind.endswith("repeats"):
                said = tokenizer.decode(sample.ids[start : end - 1]).strip(" .")
                assert all(word.strip(",") in context for word in said.split() if word != "and")


def test_a_talk_has_the_form_of_the_chat(tokenizer):
    talk = Talk(tokenizer)
    talk.ask("First?", " It is", " one.")
    expected = encode_chat([Message("user", "First?")], tokenizer, answer_prefix=" It is")
    assert talk.ids[: len(expected)] == expected
    talk.ask("Second?", " Now", " two.")
    turns = [Message("user", "First?"), Message("assistant", " It is one."), Message("user", "Second?")]
    expected = encode_chat(turns, tokenizer, answer_prefix=" Now")
    assert talk.ids[: len(expected)] == expected


def test_a_batch_depends_on_its_step(tokenizer):
    phase = SPARSE_PHASE
    first, again, other = (make_batch(phase, 0, step, tokenizer) for step in (5, 5, 6))
    assert torch.equal(first.sequences.tokens, again.sequences.tokens)
    assert torch.equal(first.sequences.rows, again.sequences.rows)
    assert first.sequences.tokens.tolist() != other.sequences.tokens.tolist()


def test_no_training_sample_holds_a_held_out_needle(tokenizer):
    """Other names for the draws: the same key with the same number would be a coincidence of 1 in 10^12."""
    held_out = {
        (example.references, example.prompt[:400])
        for task in ("niah_single_1", "niah_multikey_2")
        for example in generate(task, 512, tokenizer, 10, seed=HELD_OUT_SEED)
    }
    numbers = {reference for references, _ in held_out for reference in references}
    for step in range(20):
        batch = make_batch(dataclasses.replace(SPARSE_PHASE, length=512, batch_size=4), 0, step, tokenizer)
        for ids in batch.sequences.tokens.tolist():
            text = tokenizer.decode(ids)
            assert not any(number in text for number in numbers)


def test_the_served_model_says_what_the_training_forward_expects(tokenizer):
    """Greedy decoding through the paged cache writes the very tokens that one forward finds likeliest."""
    model = random_model(dataclasses.replace(FP64, vocab_size=tokenizer.vocab_size))
    ids = random_tokens(80, model.args)
    said, steps = answer(model, tokenizer, ids, max_new_tokens=5)
    assert len(steps) == 5
    assert [step.num_visible for step in steps] == [81, 82, 83, 84, 85]
    assert all(len(chosen) == model.args.index_topk for step in steps for chosen in step.chosen)
    expected = list[int]()
    for _ in range(5):
        rows = [len(ids) + len(expected) - 1]
        with torch.no_grad():
            logits = forward(model, sequences([ids + expected], rows), sparse=True)
        expected.append(int(logits[0, 0].argmax()))
    assert said == tokenizer.decode(expected)
    assert would_say(model, ids, expected, sparse=True)
    assert not would_say(model, ids, [*expected[:4], expected[4] ^ 1], sparse=True)


@pytest.mark.parametrize(("right", "num"), [(0, 16), (3, 16), (55, 60), (198, 200), (200, 200)])
def test_an_accuracy_comes_with_its_interval(right, num):
    """Its ends are the true shares of which the measured one is 1.96 standard errors off."""
    measured = Measured("niah_single_1", 2048, "sparse", num, 100 * right / num, 1901.0)
    low, high = measured.interval
    for true in (low / 100, high / 100):
        errors_off = 1.96**2 * true * (1 - true)
        assert num * (right / num - true) ** 2 == pytest.approx(errors_off, abs=2e-3)
    assert low <= measured.accuracy <= high and 0 <= low < high <= 100
    assert measured.to_json()["interval_95"] == measured.interval
    assert f"({low:.1f} to {high:.1f} at 95 %, {num} prompts)" in measured.line()


def test_a_shuffled_indexer_selects_as_many_but_others(tokenizer):
    model = random_model(dataclasses.replace(FP64, vocab_size=tokenizer.vocab_size))
    ids = random_tokens(80, model.args)
    _, own = answer(model, tokenizer, ids, max_new_tokens=1)
    _, shuffled = answer(model, tokenizer, ids, max_new_tokens=1, shuffled=True)
    for mine, other in zip(own[0].chosen, shuffled[0].chosen, strict=True):
        assert len(other) == len(mine) == model.args.index_topk
        assert max(other) <= 80 and other != mine


SHIPPED = ROOT / "data" / "models" / "needle-2k"
TASKS = ("niah_single_1", "niah_multikey_2")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return load_exported(SHIPPED, tmp_path_factory.mktemp("shipped"))


def test_the_shipped_checkpoint_answers_held_out_needles(shipped):
    """Through conversion, paged cache and the indexer's own top-k, at the trained length."""
    tokenizer = load_tokenizer(SHIPPED)
    measured = [
        measure(shipped, tokenizer, task, 2048, examples(3)) for task in ("niah_single_1", "niah_multikey_2")
    ]
    assert shipped.args.index_topk <= 2048 // 8
    assert sum(each.accuracy for each in measured) / 2 >= 90
    for each in measured:  # 9 steps each; the card's 0.97 and 0.96 are of 600
        assert each.chance <= 0.125
        assert max(each.recall_due) >= 0.85, each.line()
        assert max(each.recall) >= 0.6, each.line()


def test_the_shipped_checkpoint_fails_when_its_indexer_is_shuffled(shipped):
    measured = measure(shipped, load_tokenizer(SHIPPED), "niah_single_1", 2048, 2, shuffled=True)
    assert measured.accuracy == 0
    assert max(*measured.recall, *measured.recall_due) < 0.5


def test_the_shipped_folder_is_whole():
    lines = (SHIPPED / "SHA256SUMS").read_text().splitlines()
    sums = dict(reversed(line.split("  ")) for line in lines)
    files = {file.name for file in SHIPPED.iterdir()} - {"SHA256SUMS"}
    assert set(sums) == files >= {"model.safetensors", "config.json", "serving_config.json", "README.md"}
    for name, digest in sums.items():
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == digest, name
    assert (SHIPPED / "model.safetensors").stat().st_size <= 8_000_000
    assert (SHIPPED / "tokenizer.json").read_text() == json.dumps(
        word_tokenizer_json(), ensure_ascii=False, indent=1
    ) + "\n"
