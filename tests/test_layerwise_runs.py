"""`dsatrace layerwise` as a command: its run, its plan, its memory, kills and damage."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import INFERENCE, ROOT
from dsatrace.commands.generate import main as generate
from dsatrace.commands.layerwise import main
from dsatrace.errors import UserError
from dsatrace.layerwise import sweep
from dsatrace.layerwise.reading import read_transcripts
from dsatrace.model.shards import read_header
from dsatrace.model.tiny import write_checkpoint
from dsatrace.schema import REQUESTS_FILE, STEPS_PARQUET_FILE
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selections import read_selections
from dsatrace.verify.run import verify
from dsatrace.workloads.chat import choose_chat
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.tokenizer import choose_tokenizer
from helpers.checkpoints import TINY_CONFIG
from helpers.forked import finished, start
from helpers.layerwise import V32, in_dtype
from helpers.waiting import until

LAST = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four shards in fp8, and transcripts."""
    folder = tmp_path_factory.mktemp("layerwise_runs")
    write_checkpoint(folder / "hf", in_dtype(V32, "fp8"), weights="fp8", num_shards=4)
    generator = np.random.default_rng(5)
    lines = [{"tokens": generator.integers(0, 97, size).tolist(), "prompt_tokens": 30} for size in (60, 50)]
    (folder / "transcripts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def flags(folder: Path, out: Path, *more: str, layers: str = "0-2") -> list[str]:
    return [
        *("--weights", str(folder / "hf"), "--transcripts", str(folder / "transcripts.jsonl")),
        *("--layers", layers, "--rows", f"last:{LAST}", "--out", str(out), "--device", "cpu"),
        *("--chunk-rows", "16", "--experts", *more),
    ]


def records(out: Path) -> list[bytes]:
    return [
        (out / inner / name).read_bytes()
        for inner in (".", "experts")
        for name in (STEPS_PARQUET_FILE, REQUESTS_FILE)
    ]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    assert main(flags(folder, folder / "run")) == 0
    return folder / "run"


def test_a_run_and_its_experts_verify(undisturbed: Path) -> None:
    assert "72 records" in verify(undisturbed).text()
    assert "48 records" in verify(undisturbed / "experts").text()  # two of the three layers have any
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        *("experts", "manifest.json", "requests.jsonl", "summary.json", "trace_steps.parquet")
    ]
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["selection"]["door"] == "layerwise"
    assert manifest["selections"] == "random_weights"
    lines = [json.loads(line) for line in (undisturbed / REQUESTS_FILE).read_text().splitlines()]
    assert [line["num_prompt_tokens"] + line["num_output_tokens"] for line in lines] == [60, 50]
    assert {line["labels"]["transcript"] for line in lines} == {"foreign"}


def test_some_layers_are_those_of_the_whole_run(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    assert main(flags(folder, tmp_path / "run", "--trace-format", "jsonl", layers="1-2")) == 0
    assert "48 records" in verify(tmp_path / "run").text()
    whole = {
        (one.request_id, layer): of_layer.array().tolist()
        for one in read_selections(RunReader(undisturbed))
        for (layer, _), of_layer in one.layers.items()
    }
    some = {
        (one.request_id, layer): of_layer.array().tolist()
        for one in read_selections(RunReader(tmp_path / "run"))
        for (layer, _), of_layer in one.layers.items()
    }
    assert some == {key: ids for key, ids in whole.items() if key[1] > 0}
    assert len(some) == 4


def test_scores_and_margins(folder: Path, tmp_path: Path) -> None:
    assert main(flags(folder, tmp_path / "run", "--trace-store-scores", "--trace-format", "jsonl")) == 0
    verify(tmp_path / "run")
    found = [json.loads(line) for line in (tmp_path / "run" / "trace_steps.jsonl").open()]
    assert all(len(one["scores_topk"]) == len(one["selected_token_pos"]) == 24 for one in found)
    assert all(one["kth_margin"] >= 0 for one in found)


def test_kills_at_ten_moments_change_nothing(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    draw, kills, layers_done = random.Random(1), 0, set()
    out = tmp_path / "run"
    for warm in (out, tmp_path / "again"):  # the first one waits for the server of processes
        started = time.monotonic()
        process = start(flags(folder, warm), tmp_path / "said.txt", command="layerwise")
        process.join()
        assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
        lasts = time.monotonic() - started
    progress = out / "layerwise" / "progress.json"
    while kills < 10:
        anew = kills % 2 == 1  # and killed as soon as it says how far it is; the others at any time
        if anew or not progress.is_file():  # without the file it ended, or was killed before it began
            shutil.rmtree(out, ignore_errors=True)
        resume = ["--resume"] if progress.is_file() else []
        process = start(flags(folder, out, *resume), tmp_path / "said.txt", command="layerwise")
        if anew:
            until(lambda process=process: progress.is_file() or process.exitcode is not None)
        else:
            process.join(draw.uniform(0.0, 1.0) * lasts)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            if progress.is_file():
                layers_done.add(json.loads(progress.read_text())["layers_done"])
        else:
            assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
            assert records(out) == records(undisturbed)
    assert len(layers_done) > 1
    resume = ["--resume"] if (out / "layerwise" / "progress.json").is_file() else []
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    assert main(flags(folder, out, *resume)) == 0
    assert records(out) == records(undisturbed)


@pytest.mark.parametrize("full_at", [1, 2, 5])
def test_a_full_disk_loses_no_layer(
    full_at: int,
    folder: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    taken = []

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        taken.append(size)
        if len(taken) == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, size)

    real = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    out = tmp_path / "run"
    assert main(flags(folder, out)) == 2
    assert len(taken) == full_at
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot hold" in said and "No space left on device" in said and "--resume" in said
    assert main(flags(folder, out, "--resume")) == 0
    assert records(out) == records(undisturbed)


def damaged(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "hf", tmp_path / "hf")
    shutil.copy(folder / "transcripts.jsonl", tmp_path)
    return tmp_path


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "hf" / "model.safetensors.index.json").read_text())
    return folder / "hf" / str(index["weight_map"][name])


def test_a_nan_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = damaged(folder, tmp_path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    path = shard_of(copy, name)
    with path.open("r+b") as file:
        file.seek(read_header(path)[name].begin)
        file.write(b"\x7f" * 64)  # e4m3's NaN
    assert main(flags(copy, tmp_path / "run")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: {path}: {name} (layer 1) holds NaN or infinity; fetch it again"


def test_a_shard_that_is_cut_short_is_named_before_anything_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged(folder, tmp_path)
    path = shard_of(copy, "model.layers.1.mlp.experts.3.up_proj.weight")
    os.truncate(path, path.stat().st_size - 8)
    assert main(flags(copy, tmp_path / "run")) == 2
    assert f"{path}: truncated: holds" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_shard_that_is_cut_short_while_it_runs_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = damaged(folder, tmp_path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    path, begin = shard_of(copy, name), sweep.Sweep.run

    def cut_and_run(self: sweep.Sweep) -> None:
        os.truncate(path, read_header(path)[name].begin + 5)
        begin(self)

    monkeypatch.setattr(sweep.Sweep, "run", cut_and_run)
    assert main(flags(copy, tmp_path / "run")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}: ends within model.layers." in said


def test_a_wrong_shape_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = damaged(folder, tmp_path)
    config = json.loads((copy / "hf" / "config.json").read_text())
    (copy / "hf" / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 48}))
    assert main(flags(copy, tmp_path / "run")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "model.layers.1.mlp.shared_experts.gate_proj.weight has shape [32, 64]" in said


def test_the_plan_names_what_is_missing_and_a_run_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged(folder, tmp_path)
    gone = shard_of(copy, "model.layers.1.mlp.experts.3.up_proj.weight")
    gone.unlink()
    assert main(flags(copy, tmp_path / "run", "--plan")) == 0
    said = capsys.readouterr().out
    assert f"{gone.name}: " in said and said.count("MISSING") == 1 and "time, calculated:" in said
    assert main(flags(copy, tmp_path / "run")) == 2
    assert gone.name in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_first_layer_alone_reads_the_first_shard_alone(folder: Path, tmp_path: Path) -> None:
    """And says that it stands for no other."""
    copy = damaged(folder, tmp_path)
    needed = shard_of(copy, "model.layers.0.self_attn.indexer.wk.weight")
    for path in (copy / "hf").glob("*.safetensors"):
        if path not in (needed, shard_of(copy, "model.embed_tokens.weight")):
            path.unlink()
    command = [one for one in flags(copy, tmp_path / "run", layers="0") if one != "--experts"]
    process = start(command, tmp_path / "said.txt", command="layerwise")
    process.join()
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 0, said
    assert "reported to select near chance" in said
    assert "24 records" in verify(tmp_path / "run").text()


@pytest.mark.parametrize("rows", ["every:4", "range:0-100:4", "last:0", "range:9-3", "answer "])
def test_rows_that_are_not_consecutive_are_refused(
    rows: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = flags(folder, tmp_path / "run")
    command[command.index("--rows") + 1] = rows
    assert main(command) == 2
    assert f"--rows {rows}".strip() in capsys.readouterr().err


def test_a_resume_with_other_flags_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: sweep.Sweep) -> None:
        raise UserError("stopped")

    monkeypatch.setattr(sweep.Sweep, "run", stop)
    assert main(flags(folder, tmp_path / "run")) == 2
    assert main(flags(folder, tmp_path / "run", "--resume", layers="0-1")) == 2
    assert "layers was '0-2' and is '0-1' now" in capsys.readouterr().err
    assert main(flags(folder, tmp_path / "run")) == 2
    assert "go on with it by --resume" in capsys.readouterr().err


PEAK = """
import sys
from pathlib import Path
sys.path[:0] = [{bench!r}, {inference!r}]
import layerwise
from dsatrace.model.config import ModelArgs
args = ModelArgs(dim=2048, n_heads=16, q_lora_rank=512, moe_inter_dim=4096, n_routed_experts=8,
                 n_expert_groups=4, n_limited_groups=2, n_activated_experts=2, index_n_heads=16,
                 index_topk=512, n_layers=2, n_dense_layers=0, vocab_size=4096)
folder = Path({folder!r})
if sys.argv[1] == "write":
    layerwise.write_layer(folder / "hf", args)
else:
    measured = layerwise.sweep(folder / "hf", folder / "run", 256, "cpu", args)
    print(measured["peak_bytes"], measured["planned_peak_bytes"])
"""


def test_the_planned_memory_holds(tmp_path: Path) -> None:
    """The plan is of the most: a sweep in which the reader happens to lag holds one expert less."""
    bench = ROOT / "scripts" / "bench"
    program = tmp_path / "peak.py"
    program.write_text(PEAK.format(bench=str(bench), inference=str(INFERENCE), folder=str(tmp_path)))
    assert finished(program, "write").returncode == 0
    peaks: list[int] = []
    for _ in range(6):
        command = [sys.executable, str(program), "sweep"]  # not forked: its memory is measured
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        measured, planned = map(int, told.split())
        shutil.rmtree(tmp_path / "run")
        peaks.append(measured)
        assert 100e6 < measured < 1.1 * planned, f"{measured / 1e6:.0f} MB, planned {planned / 1e6:.0f}"
        if measured > 0.9 * planned:
            return
    raise AssertionError(f"{peaks}, planned {planned}")


def test_a_run_with_its_tokens_is_a_transcript(tiny_hf: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Layer by layer its own selections come out again, step by step."""
    (tmp_path / "prompts.txt").write_text("One two three four five six seven\n\nEight nine\n")
    served = tmp_path / "served"
    generated = generate(
        [
            *("--ckpt-path", str(tiny_checkpoint), "--input-file", str(tmp_path / "prompts.txt")),
            *("--max-new-tokens", "12", "--temperature", "0", "--save-tokens", "--trace-out", str(served)),
            *("--config", str(TINY_CONFIG), "--device", "cpu", "--ignore-eos"),
        ]
    )
    assert generated == 0
    verify(served)
    out = tmp_path / "swept"
    command = [
        *("--weights", str(tiny_hf), "--config", str(TINY_CONFIG), "--transcripts", str(served)),
        *("--layers", "0-3", "--rows", "answer", "--out", str(out), "--device", "cpu"),
    ]
    assert main(command) == 0
    verify(out)
    both = [
        {
            (one.request_id, layer, step): frozenset(ids.tolist())
            for one in read_selections(RunReader(folder))
            for (layer, _), of_layer in one.layers.items()
            for step, ids in zip(of_layer.step_idx.tolist(), of_layer.rows(), strict=True)
        }
        for folder in (served, out)
    ]
    assert both[0].keys() == both[1].keys()
    different = sum(both[0][key] != both[1][key] for key in both[0])
    assert different < len(both[0]) / 4  # near ties, and their consequences
    lines = [json.loads(line) for line in (out / REQUESTS_FILE).read_text().splitlines()]
    assert {line["labels"]["transcript"] for line in lines} == {"own"}


def shards_to_go(folder: Path) -> tuple[set[str], set[str]]:
    """Those of layers 0 and 1 alone, which layer 2 needs whole; and the others."""
    places = json.loads((folder / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    others = (".layers.2.", "lm_head", "model.norm")
    kept = {file for name, file in places.items() if any(other in name for other in others)}
    return set(places.values()) - kept, kept


def test_shards_are_deleted_once_their_layers_are_done(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = damaged(folder, tmp_path)
    gone, kept = shards_to_go(copy)
    assert gone and kept
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    assert main(flags(copy, tmp_path / "refused", "--delete-shards")) == 2
    assert all((copy / "hf" / file).exists() for file in gone)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    assert main(flags(copy, tmp_path / "run", "--delete-shards")) == 0
    assert {path.name for path in (copy / "hf").glob("*.safetensors")} == kept
    assert records(tmp_path / "run") == records(undisturbed)


def test_a_link_out_of_the_folder_is_not_deleted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged(folder, tmp_path)
    path = copy / "hf" / min(shards_to_go(copy)[0])
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert main(flags(copy, tmp_path / "run", "--delete-shards")) == 2
    assert "is a link to another place" in capsys.readouterr().err
    assert (tmp_path / "elsewhere").exists()


def test_text_and_messages_become_ids_by_the_checkpoints_form(tiny_hf: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "One two three", "answer": " four five", "id": "plain"},
        {
            "messages": [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}],
            "own": True,
        },
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    chat = choose_chat(choose_tokenizer(None, tiny_hf), tiny_hf)
    plain, said = read_transcripts(path, lambda: chat)
    assert (plain.request_id, plain.written_by, said.request_id, said.written_by) == (
        *("plain", "foreign"),
        *("r1", "own"),
    )
    assert chat.tokenizer.decode(plain.token_ids.tolist()) == "One two three four five"
    assert plain.prompt_tokens == len(chat.tokenizer.encode("One two three"))
    prompt = chat.encode([Message("user", "One")])
    assert said.token_ids.tolist() == prompt + chat.tokenizer.encode("Two")
    assert said.prompt_tokens == len(prompt)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"tokens": [1, 2], "prompt": 1}, "prompt"),
        ({"tokens": [1, -2]}, "tokens"),
        ({"tokens": [1, 2], "prompt_tokens": 3}, "prompt_tokens"),
        ({"tokens": [1], "text": "a"}, "one of tokens, text, messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ({"tokens": [1, 200]}, "token 1 is 200"),
    ],
)
def test_a_bad_line_is_named(
    line: dict[str, object],
    reason: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(line) + "\n")
    command = flags(folder, tmp_path / "run")
    command[command.index("--transcripts") + 1] = str(path)
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert reason in said and ("row 0 (line 1)" in said or "transcript r0" in said)


SAMPLES = ROOT / "inference" / "dsatrace" / "workloads" / "samples"


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("sharegpt", ("--sharegpt-json", SAMPLES / "sharegpt_sample.json"), "sharegpt_sample.json"),
        (
            "longbenchv2",
            ("--longbenchv2-json", SAMPLES / "longbench_v2_sample.json"),
            "longbench_v2_sample.json",
        ),
        ("ruler", ("--ruler-generate", "--ruler-length", "512"), "generator"),
    ],
    ids=["sharegpt", "longbenchv2", "ruler"],
)
def test_a_data_set_by_name_has_its_recorded_answers(
    tiny_hf: Path, tmp_path: Path, name: str, source: tuple[object, ...], said: str
) -> None:
    command = [
        *("--weights", str(tiny_hf), "--transcripts", name, "--no-hub", "--limit", "2"),
        *("--layers", "0", "--rows", "answer", "--out", str(tmp_path / "run"), "--device", "cpu"),
        *map(str, source),
    ]
    assert main(command) == 0
    verify(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / REQUESTS_FILE).read_text().splitlines()]
    assert len(lines) == 2 and all(line["num_output_tokens"] > 1 for line in lines)
    assert [line["labels"]["transcript"] for line in lines] == ["foreign", "foreign"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert said in manifest["data_source"]
