"""`generate.py` end to end on a tiny checkpoint: the tokens, the trace it leaves, and its error lines."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conftest import INFERENCE, ROOT
from dsatrace.commands.generate import main, read_prompts
from dsatrace.engine.engine import Engine
from dsatrace.engine.live import LiveRequest
from dsatrace.model.config import ModelArgs
from dsatrace.schema import TABLES, problems
from dsatrace.trace.reader import RunReader
from dsatrace.workloads.encoding import Message, encode_chat
from dsatrace.workloads.request import Request
from dsatrace.workloads.tokenizer import Tokenizer
from helpers.checkpoints import tiny_config
from helpers.command_runs import told_error
from helpers.forked import finished

CONFIG = INFERENCE / "config_tiny.json"
LONG = "The lighthouse keeper counted 41 ships. " * 10  # 400 tokens: two prefill chunks, sparse
SHORT = "Which ship was the last?"  # dense from first to last
PROMPTS = (LONG.strip(), SHORT)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def fp64_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that a batch's other rows cannot move a rounding: equal then means equal."""
    return tiny_config(tmp_path_factory.mktemp("fp64"), dtype="fp64")


@dataclasses.dataclass(frozen=True)
class Command:
    """`main()` in this process; `served` keeps every request with the tokens it got."""

    checkpoint: Path
    folder: Path
    served: list[LiveRequest]

    def run(self, prompts: Sequence[str], *flags: object, config: Path = CONFIG) -> int:
        """The exit code of `generate.py` over a file of `prompts`, greedy unless `flags` say otherwise."""
        self.served.clear()
        file = self.folder / "prompts.txt"
        file.write_text("\n\n".join(prompts))
        fixed = ["--ckpt-path", self.checkpoint, "--config", config, "--input-file", file]
        asked = ["--max-new-tokens", NEW_TOKENS, "--temperature", 0, *flags]
        return main([str(argument) for argument in (*fixed, *asked)])

    def answers(self, prompts: Sequence[str], *flags: object, config: Path = CONFIG) -> list[list[int]]:
        """The answers' token ids, a list a prompt."""
        assert self.run(prompts, *flags, config=config) == 0
        return [live.answer for live in self.served]


@pytest.fixture
def command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    served: list[LiveRequest] = []
    submit = Engine.submit

    def submit_and_keep(self: Engine, request: Request) -> LiveRequest:
        served.append(submit(self, request))
        return served[-1]

    monkeypatch.setattr(Engine, "submit", submit_and_keep)
    return Command(checkpoint, tmp_path, served)


# ---- tokens


def test_prompts_of_unequal_length_do_not_affect_each_other(command: Command, fp64_config: Path) -> None:
    together = command.answers(PROMPTS, config=fp64_config)
    alone = [command.answers([prompt], config=fp64_config)[0] for prompt in PROMPTS]
    assert together == alone
    assert [len(answer) for answer in together] == [NEW_TOKENS, NEW_TOKENS]
    assert together[0] != together[1]


def test_tracing_does_not_change_a_token(command: Command) -> None:
    off = command.answers(PROMPTS)
    on = command.answers(PROMPTS, "--trace-out", command.folder / "run", "--trace-store-scores")
    assert on == off


def test_sampling_repeats_and_does_not_depend_on_the_batch(command: Command, fp64_config: Path) -> None:
    def sampled(*flags: object) -> list[list[int]]:
        return command.answers(PROMPTS, "--temperature", 0.8, *flags, config=fp64_config)

    first = sampled("--seed", 7)
    assert sampled("--seed", 7) == first
    assert sampled("--seed", 7, "--max-batch-size", 1) == first
    assert sampled("--seed", 8) != first
    assert command.answers(PROMPTS, config=fp64_config) != first


def test_answers_are_printed_in_order(
    command: Command, byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = command.answers(PROMPTS)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("[")] == [
        f"[r{i}] {byte_tokenizer.decode(answer)}" for i, answer in enumerate(answers)
    ]
    assert lines[-1].startswith("2 requests, ")


# ---- the trace


def test_trace_is_whole_and_true(command: Command, tiny_args: ModelArgs, byte_tokenizer: Tokenizer) -> None:
    out = command.folder / "run"
    command.answers(PROMPTS, "--trace-out", out)
    assert {file.name for file in out.iterdir()} == set(TABLES)
    run = RunReader(out)
    assert run.state == "complete"
    assert [request["num_output_tokens"] for request in run.requests()] == [NEW_TOKENS] * 2

    prompt_len = {f"r{i}": len(prompt_ids(prompt, byte_tokenizer)) for i, prompt in enumerate(PROMPTS)}
    seen = set()
    for record in run.steps():
        assert problems(record, "full", TABLES["trace_steps.jsonl"]) == []
        request, step, layer = record["request_id"], record["step_idx"], record["layer_id"]
        seen.add((request, step, layer))
        seq_len, positions = record["seq_len_current"], record["selected_token_pos"]
        assert seq_len == prompt_len[request] + step + 1
        assert len(positions) == min(tiny_args.index_topk, seq_len)
        assert all(a < b for a, b in itertools.pairwise(positions))
        assert positions[0] >= 0 and positions[-1] <= seq_len - 1
        assert record["path"] == ("sparse" if seq_len > tiny_args.index_topk else "dense")
        assert record["kv_fetch"]["hbm"]["batch_size"] == 2
    # The first token comes from the prefill, so N tokens are N - 1 decode steps.
    steps, layers = range(NEW_TOKENS - 1), range(tiny_args.n_layers)
    assert seen == {(request, step, layer) for request in prompt_len for step in steps for layer in layers}
    assert run.summary()["counts"]["records"] == len(seen)


def test_prefill_last_adds_the_prompts_last_position(
    command: Command, tiny_args: ModelArgs, byte_tokenizer: Tokenizer
) -> None:
    command.answers(PROMPTS, "--trace-prefill", "last", "--trace-out", command.folder / "run")
    records = list(RunReader(command.folder / "run").steps())
    prefill = [record for record in records if record["phase"] == "prefill"]
    assert [(r["request_id"], r["layer_id"]) for r in prefill] == [
        (request, layer) for request in ("r0", "r1") for layer in range(tiny_args.n_layers)
    ]
    assert {record["step_idx"] for record in prefill} == {-1}
    assert {record["seq_len_current"] for record in prefill} == {
        len(prompt_ids(prompt, byte_tokenizer)) for prompt in PROMPTS
    }
    assert min(r["step_idx"] for r in records if r["phase"] == "decode") == 0


def test_sampled_steps_are_about_half_and_the_same_again(command: Command) -> None:
    def recorded(out: str, seed: int) -> list[int]:
        flags = ("--trace-out", command.folder / out, "--trace-sample-rate", 0.5, "--seed", seed)
        command.answers([SHORT], *flags, "--max-new-tokens", 61)
        run = RunReader(command.folder / out)
        assert run.manifest["trace"]["sample_rate"] == 0.5
        by_layer: dict[int, list[int]] = {}
        for record in run.steps():
            by_layer.setdefault(record["layer_id"], []).append(record["step_idx"])
        assert all(steps == by_layer[0] for steps in by_layer.values())
        return by_layer[0]

    first = recorded("first", seed=3)
    assert 18 <= len(first) <= 42  # of 60: within three standard deviations
    assert recorded("again", seed=3) == first
    assert recorded("other", seed=4) != first


def test_an_existing_run_is_never_overwritten(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    out = command.folder / "run"
    command.answers([SHORT], "--trace-out", out)
    before = contents(out)
    assert command.run([SHORT], "--trace-out", out) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert contents(out) == before


def test_a_relative_folder_follows_the_working_directory(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = command.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    command.answers([SHORT], "--trace-out", "here/run")
    assert RunReader(elsewhere / "here" / "run").state == "complete"
    assert f"trace: {elsewhere / 'here' / 'run'}" in capsys.readouterr().out


CANARY = "PLOVER-9417"
SYSTEM_CANARY = "-- be brief, says HERON-2206"  # argparse takes it for a value, as it holds a space
TOKEN_CANARY = "hf_nightjarnightjarnightjar"


@pytest.mark.parametrize(
    "system", [("--system-prompt", SYSTEM_CANARY), (f"--system-prompt={SYSTEM_CANARY}",)]
)
def test_no_text_reaches_the_folder_unasked(
    system: tuple[str, ...],
    command: Command,
    byte_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN_CANARY)
    out, asked_for = command.folder / "run", command.folder / "with_text"
    prompt = f"The password is {CANARY}; repeat it."
    answer = command.answers([prompt], *system, "--trace-out", out)[0]
    command.answers([prompt], *system, "--trace-out", asked_for, "--save-text")
    text, ids = byte_tokenizer.decode(answer), byte_tokenizer.encode(CANARY)
    assert len(text) == NEW_TOKENS

    written = b"".join(contents(out).values()).decode()
    for secret in (CANARY, "HERON-2206", TOKEN_CANARY, text, ",".join(map(str, ids)), str(ids)[1:-1]):
        assert secret not in written
    assert all("text" not in request for request in RunReader(out).requests())
    assert [request["text"] for request in RunReader(asked_for).requests()] == [text]
    with_text = b"".join(contents(asked_for).values()).decode()
    assert CANARY not in with_text and TOKEN_CANARY not in with_text
    shown = capsys.readouterr()
    assert text in shown.out, "the answer, and nothing else of these"
    assert not [secret for secret in (CANARY, "HERON-2206", TOKEN_CANARY) if secret in shown.out + shown.err]


# ---- as a program


@pytest.mark.parametrize("folder", [ROOT, INFERENCE], ids=["root", "inference"])
def test_runs_from_the_root_and_from_inference(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Without `--trace-out` the run lands under the checkout's outputs/, wherever one stands."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(SHORT)
    script, config = (os.path.relpath(path, folder) for path in (INFERENCE / "generate.py", CONFIG))
    flags = ("--ckpt-path", checkpoint, "--config", config, "--input-file", prompts)
    flags += ("--max-new-tokens", 3, "--temperature", 0, "--trace-enable")
    done = finished(script, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    out = Path(done.stdout.splitlines()[-1].removeprefix("trace: "))
    try:
        assert out.parent == ROOT / "outputs"
        assert out.name.startswith("generate_")
        assert RunReader(out).state == "complete"
    finally:
        if out.parent == ROOT / "outputs":
            shutil.rmtree(out)


# ---- mistakes


def other_mp(command: Command) -> list[object]:
    folder = command.folder / "mp2"
    shutil.copytree(command.checkpoint, folder)
    (folder / "model0-mp1.safetensors").rename(folder / "model0-mp2.safetensors")
    return ["--ckpt-path", folder]


def unknown_key(command: Command) -> list[object]:
    return ["--config", tiny_config(command.folder, n_heds=8)]


def latin_1(command: Command) -> list[object]:
    file = command.folder / "latin1.txt"
    file.write_bytes("Grüße".encode("latin-1"))
    return ["--input-file", file]


def empty_file(command: Command) -> list[object]:
    file = command.folder / "empty.txt"
    file.write_text("\n \n\n")
    return ["--input-file", file]


def checkpoint_without_weights(command: Command) -> list[object]:
    folder = command.folder / "no_weights"
    shutil.copytree(command.checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return ["--ckpt-path", folder]


def flags(*values: object) -> Callable[[Command], list[object]]:
    return lambda command: list(values)


MISTAKES: dict[str, tuple[Callable[[Command], list[object]], str]] = {
    "prompt longer than the cache": (flags("--max-seq-len", 64), "--max-seq-len is 64"),
    "empty input": (empty_file, "holds no prompt"),
    "missing input": (flags("--input-file", "nowhere.txt"), "nowhere.txt: cannot read"),
    "input is a folder": (flags("--input-file", ROOT), "cannot read the prompts"),
    "input not UTF-8": (latin_1, "is not UTF-8"),
    "missing checkpoint": (flags("--ckpt-path", "nowhere"), "nowhere"),
    "checkpoint without weights": (checkpoint_without_weights, "holds no model0-mp1.safetensors"),
    "checkpoint of another mp": (other_mp, "run with 2 ranks or convert again"),
    "missing config": (flags("--config", "nowhere.json"), "nowhere.json: cannot read"),
    "config of another model": (
        flags("--config", INFERENCE / "config_671B_v3.2.json"),
        "vocab_size is 129280, but",
    ),
    "config key that is not there": (flags("--ignore-config-key", "no"), "--ignore-config-key no:"),
    "unknown config key": (unknown_key, "unknown model config keys n_heds"),
    "tilelang on CPU": (flags("--device", "cpu", "--kernel-backend", "tilelang"), "tilelang"),
    "no new tokens": (flags("--max-new-tokens", 0), "--max-new-tokens 0"),
    "new tokens not a number": (flags("--max-new-tokens", "many"), "--max-new-tokens"),
    "negative temperature": (flags("--temperature", -0.1), "--temperature -0.1"),
    "temperature not a number": (flags("--temperature", "nan"), "--temperature nan"),
    "infinite temperature": (flags("--temperature", "inf"), "--temperature inf"),
    "no batch": (flags("--max-batch-size", 0), "--max-batch-size 0"),
    "no share of steps": (flags("--trace-sample-rate", 0), "--trace-sample-rate 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(
    mistake: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, expected = MISTAKES[mistake]
    out = command.folder / "run"
    assert_error(capsys, lambda: command.run(PROMPTS, *wrong(command), "--trace-out", out), expected)
    assert not out.exists()


def test_cuda_without_cuda_is_one_clear_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_error(capsys, lambda: command.run(PROMPTS, "--device", "cuda"), "--device cuda: no CUDA device")


def test_trace_flags_without_tracing_are_a_mistake(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_error(capsys, lambda: command.run(PROMPTS, "--trace-store-scores"), "--trace-enable")


def assert_error(capsys: pytest.CaptureFixture[str], run: Callable[[], int], expected: str) -> None:
    """Exit code 2, and on stderr one `error:` line that says what is expected; argparse adds its usage."""
    assert expected in told_error(capsys, run)


def test_blank_lines_separate_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"one\r\nstill one\r\n\r\ntwo\n \t\nthree\n\n\n\n")
    assert read_prompts(file) == ["one\nstill one", "two", "three"]


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    return encode_chat([Message("user", prompt)], tokenizer)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
