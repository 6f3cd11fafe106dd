"""`run_dataset.py` on the tiny checkpoint: each data set end to end, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from conftest import INFERENCE, ROOT
from dsatrace.commands.run_dataset import main
from dsatrace.model.convert import convert_checkpoint
from dsatrace.schema import TABLES, problems
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from dsatrace.workloads.catalog import DATA_SETS
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import Find, Flag, OpenedWorkload, PromptSettings
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.sharegpt import SHAREGPT, ShareGPTLoader, ShareGPTWorkload
from helpers.checkpoints import tiny_config
from helpers.command_runs import runs_below, told_error, until_lines
from helpers.forked import Started, finished
from helpers.json_lines import read_json_lines
from helpers.ranks import on_ranks
from helpers.real_data import real_file

SMALL = ("--max-new-tokens", 4, "--no-hub")
RULER = ("--dataset", "ruler", "--ruler-generate", "--ruler-length", 500, *SMALL)


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that selects 32 tokens."""
    return tiny_config(tmp_path_factory.mktemp("run_dataset"), index_topk=32)


@pytest.fixture
def run(checkpoint: Path, config: Path, tmp_path: Path) -> Run:
    return runs_below(tmp_path, main, "--ckpt-path", checkpoint, "--config", config)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_json_lines(folder / name)


def summary(folder: Path) -> dict[str, Any]:
    return RunReader(folder).summary()


def test_ruler_is_traced_scored_and_verified(run: Run) -> None:
    tasks = ("--ruler-task", "niah_single_1,vt", "--ruler-task", "fwe")
    folder = run(*RULER, *tasks, "--ruler-length", 1250, "--limit-per-task", 2)
    done = verify(folder)
    assert done.state == "complete"
    requests = lines(folder, "requests.jsonl")
    assert [r["request_id"] for r in requests] == [
        f"{task}.1250.row{row}" for task in ("niah_single_1", "vt", "fwe") for row in range(2)
    ]
    said = summary(folder)
    assert set(said["scores"]["by"]["task"]) == {"niah_single_1", "vt", "fwe"}
    assert said["scores"]["num_scored"] == 6
    assert said["workload"]["counts"]["examples"] == 6
    assert said["needle_recall"]["per_layer"] is not None
    assert len(said["needle_recall"]["per_layer"]) == 4
    steps = lines(folder, "trace_steps.jsonl")
    with_needle = {record["request_id"].split(".")[0] for record in steps if "needle" in record}
    assert with_needle == {"niah_single_1", "vt"}


@pytest.mark.parametrize(
    ("flags", "tasks"),
    [
        (("--limit", 3), {"niah_single_1": 2, "vt": 1}),  # spread over the tasks
        (("--limit", 3, "--limit-per-task", 5), {"niah_single_1": 3}),
        (("--limit-per-task", 1), {"niah_single_1": 1, "vt": 1}),
    ],
)
def test_rulers_limit_counts_requests_in_all(
    tmp_path: Path, flags: tuple[object, ...], tasks: dict[str, int]
) -> None:
    fixed = (
        "--dataset",
        "ruler",
        "--ruler-generate",
        "--ruler-task",
        "niah_single_1,vt",
        "--ruler-length",
        500,
    )
    argv = [*fixed, "--runner", "simulator", "--no-hub", "--trace-out", tmp_path / "run", *flags]
    assert main([str(argument) for argument in argv]) == 0
    counts = summary(tmp_path / "run")["workload"]["counts"]
    assert counts == {"examples": sum(tasks.values()), **tasks}


def test_a_limit_per_task_is_rulers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dataset", "sharegpt", "--runner", "simulator", "--limit-per-task", "1"]
    assert "--limit-per-task belongs to --dataset ruler" in told_error(capsys, lambda: main(argv))
    argv = ["--dataset", "ruler", "--runner", "simulator", "--no-hub", "--limit-per-task", "0"]
    assert "--limit-per-task" in told_error(capsys, lambda: main(argv))


@pytest.mark.parametrize("kind", ["gone", "empty"])
@pytest.mark.parametrize("dataset", ["ruler", "sharegpt"])
def test_a_wrong_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, dataset: str
) -> None:
    (tmp_path / "empty").mkdir()
    argv = ["--dataset", dataset, "--no-hub", "--ckpt-path", str(tmp_path / kind)]
    said = told_error(capsys, lambda: main(argv))
    assert f"--ckpt-path {tmp_path / kind}: " in said and "tokenizer" not in said


def test_records_hold_to_the_schema(run: Run) -> None:
    folder = run(*RULER, "--limit", 1)
    for record in lines(folder, "trace_steps.jsonl"):
        assert problems(record, "full") == []
    for record in lines(folder, "requests.jsonl"):
        assert problems(record, "full", TABLES["requests.jsonl"]) == []


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rulers_splits_are_one(run: Run, split: str) -> None:
    assert len(lines(run(*RULER, "--limit", 1, "--split", split), "requests.jsonl")) == 1


def test_longbench_v2_from_the_embedded_sample(run: Run) -> None:
    folder = run("--dataset", "longbenchv2", "--max-prompt-tokens", 600, *SMALL)
    assert verify(folder).state == "complete"
    manifest = RunReader(folder).manifest
    assert manifest["data_source"].startswith("embedded longbench_v2_sample.json sha256:")
    said = summary(folder)
    assert said["scores"]["num_scored"] == 3
    assert set(said["scores"]["by"]) == {"difficulty", "length"}
    assert said["workload"]["counts"]["truncated"] == 3
    assert {r["num_prompt_tokens"] for r in lines(folder, "requests.jsonl")} == {600}


@pytest.mark.parametrize("dataset", ["longbenchv2", "ruler"])
def test_what_follows_the_thoughts_is_judged(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that gets it wrong, then right, in its thoughts; once they end, once they do not."""
    say = Chat.as_generated
    written: list[str] = []

    def think_first(chat: Chat, answer: str) -> tuple[int, ...]:
        written.append(answer)
        number = len(written)
        thoughts = {1: "The correct answer is (A) or 12345. ", 2: answer, 3: answer}[number]
        answer = {1: answer, 2: "I do not know", 3: ""}[number]
        said = (*chat.tokenizer.encode(thoughts), *say(chat, answer))
        return said if number < 3 else said[:-1]  # the third thinks to the end

    monkeypatch.setattr(Chat, "as_generated", think_first)
    flags = ["--dataset", dataset, "--runner", "simulator", "--thinking", "--limit", "3", "--no-hub"]
    flags += ["--max-new-tokens", "200", "--save-text", "--trace-out", str(tmp_path / "run")]
    assert main([*flags, *(["--ruler-generate"] if dataset == "ruler" else [])]) == 0
    full = 100 if dataset == "ruler" else 1
    requests = {r["request_id"]: r for r in lines(tmp_path / "run", "requests.jsonl")}
    assert [r["score"] for _, r in sorted(requests.items())] == [full, 0, 0]
    said = summary(tmp_path / "run")
    assert said["workload"]["counts"]["only_thoughts"] == 1
    assert "answers of thoughts alone, which never ended: 1, judged as empty" in capsys.readouterr().out
    assert verify(tmp_path / "run").state == "complete"


def test_sharegpt_turns_find_their_prefix_again(run: Run) -> None:
    folder = run("--dataset", "sharegpt", "--sharegpt-turn-mode", "per_user_turn", "--batch-size", 1, *SMALL)
    assert verify(folder).state == "complete"
    hits = {r["request_id"]: r["prefix"]["prefix_cached_blocks"] for r in lines(folder, "trace_steps.jsonl")}
    assert hits["row0.turn0"] == 0
    assert hits["row0.turn1"] > 0
    assert summary(folder)["workload"]["counts"]["single_entry"] == 1
    assert summary(folder)["scores"] is None


def test_real_files_of_each_data_set(run: Run) -> None:
    ruler = run(
        "--dataset", "ruler", "--ruler-path", real_file("ruler"), "--ruler-task", "niah_single_1",
        "--ruler-length", 1024, "--limit", 1, *SMALL,
    )  # fmt: skip
    assert summary(ruler)["needle_recall"] is not None
    row = real_file("longbench_v2/data_one_row_context_cut.json")
    longbench = run("--dataset", "longbenchv2", "--longbenchv2-json", row, *SMALL)
    assert summary(longbench)["scores"]["num_scored"] == 1
    sharegpt = run(
        "--dataset", "sharegpt", "--sharegpt-json", real_file("sharegpt/ShareGPT_V3_tiny40.json"),
        "--limit", 2, *SMALL,
    )  # fmt: skip
    assert len(lines(sharegpt, "requests.jsonl")) == 2
    for folder in (ruler, longbench, sharegpt):
        assert verify(folder).state == "complete"
        assert RunReader(folder).manifest["data_source"].startswith(("file ", "folder "))


def test_no_trace_changes_no_answer(run: Run) -> None:
    traced, untraced = (run(*RULER, "--limit", 2, "--save-text", *flags) for flags in ((), ("--no-trace",)))
    assert (untraced / "trace_steps.jsonl").read_bytes() == b""
    assert summary(untraced)["scores"] == summary(traced)["scores"]
    assert verify(untraced).state == "complete"
    texts = [[(r["request_id"], r["text"]) for r in lines(f, "requests.jsonl")] for f in (traced, untraced)]
    assert texts[0] == texts[1]


def test_no_prompt_text_reaches_the_folder_unasked(run: Run, tmp_path: Path) -> None:
    chats = tmp_path / "chats.json"
    turns = [{"from": "human", "value": "xylophone canary " * 8}, {"from": "gpt", "value": "zebra canary"}]
    chats.write_text(json.dumps([{"id": "secret canary", "conversations": turns}]))
    folder = run("--dataset", "sharegpt", "--sharegpt-json", chats, *SMALL)
    for file in folder.iterdir():
        assert b"canary" not in file.read_bytes(), file


def test_a_prompt_that_cannot_fit_is_rejected(run: Run) -> None:
    folder = run("--dataset", "sharegpt", "--max-seq-len", 420, *SMALL)
    states = {r["request_id"]: (r["state"], r.get("error")) for r in lines(folder, "requests.jsonl")}
    rejected = {error for state, error in states.values() if state == "rejected"}
    assert rejected
    assert all("420" in error for error in rejected)
    assert any(state == "length" for state, _ in states.values())
    assert verify(folder).state == "complete"


def test_an_explicit_source_never_falls_back(
    checkpoint: Path, config: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--dataset", "sharegpt", "--sharegpt-json", str(tmp_path / "nowhere.json")]
    code = main(["--ckpt-path", str(checkpoint), "--config", str(config), *flags])
    assert code == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_bad_rows_are_named_or_counted(run: Run, tmp_path: Path, capsys: Any) -> None:
    rows = json.loads(sample_file("sharegpt").read_text())
    rows.insert(1, {"id": "x", "conversations": [{"from": "human"}]})
    chats = tmp_path / "chats.json"
    chats.write_text(json.dumps(rows))
    flags = ("--dataset", "sharegpt", "--sharegpt-json", chats, "--limit", 2, *SMALL)
    run(*flags, code=2)
    assert "row 1" in (said := capsys.readouterr().err)
    assert "'value'" in said
    assert "--bad-rows skip" in said
    skipped = summary(run(*flags, "--bad-rows", "skip"))["workload"]["bad_rows"]
    assert skipped == {"policy": "skip", "num_skipped": 1, "by_reason": {"missing column": 1}}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dataset", "sharegpt", "--ruler-length", 99), "--ruler-length belongs to --dataset ruler"),
        (("--dataset", "ruler", "--split", "test"), "--split test"),
        (("--dataset", "ruler", "--ruler-task", "niah"), "niah_single_1"),
        (("--dataset", "ruler", "--ruler-task", "qa_1", "--ruler-generate"), "SQuAD"),
        (("--dataset", "ruler", "--limit", 0), "--limit"),
        (("--dataset", "ruler", "--max-new-tokens", 0), "--max-new-tokens 0"),
        (("--dataset", "ruler", "--temperature", "nan"), "--temperature nan"),
        (("--dataset", "ruler", "--haystack", "nowhere.txt"), "nowhere.txt"),
        (("--dataset", "longbenchv2", "--max-prompt-tokens", 3), "3"),
    ],
)
def test_a_mistake_is_one_clear_line(run: Run, capsys: Any, flags: tuple[object, ...], said: str) -> None:
    run("--no-hub", *flags, code=2)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert error.startswith("error: ")
    assert said in error


def test_an_entry_in_the_table_is_all_that_a_data_set_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def open_talks(args: Any, chat: Chat, find: Find) -> OpenedWorkload:
        source = find()
        loader = ShareGPTLoader(source.file, max_conversations=args.talks_rows)
        return OpenedWorkload(
            ShareGPTWorkload(loader, PromptSettings.from_args(args, chat)), source.description, source.text()
        )

    flags = (
        Flag("--talks-json", "rows", type=Path),
        Flag("--talks-rows", "how many", type=int, default=2),
    )
    talks = dataclasses.replace(
        SHAREGPT, name="talks", title="Talks", flags=flags, file_flag="--talks-json", open=open_talks
    )
    monkeypatch.setitem(DATA_SETS, "talks", talks)
    run = ["--runner", "simulator", "--no-hub", "--trace-out", str(tmp_path / "run")]
    assert main(["--dataset", "talks", "--talks-json", str(sample_file("sharegpt")), *run]) == 0
    assert "talks: file sharegpt_sample.json sha256:" in capsys.readouterr().out
    assert len(lines(tmp_path / "run", "requests.jsonl")) == 2
    again = ["--runner", "simulator", "--trace-out", str(tmp_path / "again")]
    assert main(["--dataset", "ruler", "--talks-rows", "3", *again]) == 2
    assert "--talks-rows belongs to --dataset talks, not ruler" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "how many (default: 2)" in capsys.readouterr().out


# ---- processes


@pytest.mark.parametrize("folder", [ROOT, INFERENCE], ids=["root", "inference"])
def test_runs_from_the_root_and_from_inference(
    folder: Path, checkpoint: Path, config: Path, tmp_path: Path
) -> None:
    """The model from the root; the simulator, which imports no torch, from `inference`."""
    model = ("--ckpt-path", checkpoint, "--config", config)
    how = model if folder == ROOT else ("--runner", "simulator", "--tokenizer", checkpoint)
    script = os.path.relpath(INFERENCE / "run_dataset.py", folder)
    done = finished(script, *how, "--trace-out", tmp_path / "r", *RULER, "--limit", 1, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "ruler: generator" in done.stdout
    assert str(tmp_path / "r") in done.stdout


def test_two_ranks_serve_the_same_requests(
    tiny_hf: Path, config: Path, tmp_path: Path, tiny_args: Any
) -> None:
    converted = tmp_path / "mp2"
    convert_checkpoint(tiny_hf, converted, tiny_args.n_routed_experts, model_parallel=2)
    flags = (*RULER, "--limit", 2)
    where = ("--ckpt-path", converted, "--config", config, "--trace-out", tmp_path / "two")
    done = on_ranks(2, "run_dataset", (*where, *flags), tmp_path / "said")
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "two").state == "complete"
    assert RunReader(tmp_path / "two").manifest["world_size"] == 2
    assert len(lines(tmp_path / "two", "requests.jsonl")) == 2


def test_ctrl_c_leaves_a_run_that_resume_completes(
    checkpoint: Path, config: Path, tmp_path: Path, run: Run
) -> None:
    flags = (*RULER, "--limit", 4, "--batch-size", 1, "--max-new-tokens", 16)
    folder = tmp_path / "stopped"
    where = ("--ckpt-path", checkpoint, "--config", config, "--trace-out", folder)
    process = Started((*where, *flags), tmp_path / "said")
    until_lines(process, folder / "requests.jsonl", 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, (out, err)
    assert "--resume" in err
    assert RunReader(folder).state == "incomplete"
    assert verify(folder).state == "incomplete"

    with mock.patch("dsatrace.trace.config.default_run_folder", side_effect=AssertionError("another folder")):
        assert main(["--resume", str(folder)]) == 0
    assert verify(folder).state == "complete"
    whole = run(*flags)
    key = ("request_id", "step_idx", "layer_id")
    content = (*key, "selected_token_pos", "prefix", "needle")
    both = [
        sorted([record[name] for name in content] for record in lines(f, "trace_steps.jsonl"))
        for f in (folder, whole)
    ]
    assert both[0] == both[1]
    states = [{r["request_id"]: r["state"] for r in lines(f, "requests.jsonl")} for f in (folder, whole)]
    assert states[0] == states[1]
    assert main(["--resume", str(folder)]) == 2  # complete: nothing is left to do


def test_the_simulator_needs_no_torch_and_no_checkpoint(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from dsatrace.commands.run_dataset import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    flags = ("--runner", "simulator", "--dataset", "ruler", "--ruler-generate", "--limit", "2", "--no-hub")
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--trace-out", str(tmp_path / "sim")],
        env={**os.environ, "PYTHONPATH": str(INFERENCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = summary(tmp_path / "sim")
    assert said["selections"] == "none"
    assert said["scores"]["mean"] == 100  # it says what the references say
    assert verify(tmp_path / "sim").state == "complete"
