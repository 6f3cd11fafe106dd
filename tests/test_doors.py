"""How one gets in: `dsatrace VERB`, `python -m dsatrace`, the scripts; their names, help and usage errors."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from conftest import INFERENCE
from dsatrace import __version__
from dsatrace.cli import VERBS, main
from dsatrace.commands.parser import CommandParser
from dsatrace.commands.progress import totals_bar
from dsatrace.commands.run import DATA_SETS
from dsatrace.commands.study import VERBS as STUDY_VERBS
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify

COMMANDS = [
    *([verb] for verb in VERBS if verb not in ("run", "study")),
    *(["study", verb] for verb in STUDY_VERBS),
    *(["run", name] for name in DATA_SETS),
]


def help_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exited:
        main([*argv, "--help"])
    assert exited.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_help_has_one_name_and_ends_on_examples(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(argv, capsys)
    name = "dsatrace " + (" ".join(argv) if argv[0] != "run" or argv[1] == "burstgpt" else "run DATASET")
    assert text.startswith(f"usage: {name} ")
    usage, _, rest = text.partition("\n\n")
    assert "[flags]" in usage and len(usage.splitlines()) <= 3
    examples = rest.rpartition("\nexamples:\n")[2].splitlines()
    assert 1 <= len(examples) <= 3
    assert all(line.startswith("  ") for line in examples)
    assert "%" not in "".join(examples)


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_every_flag_is_explained(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, _argv: list[str]) -> NoReturn:
        parsers.append(parser)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    assert main(argv) == 130
    (parser,) = parsers
    assert isinstance(parser, CommandParser)
    assert not [action.option_strings for action in parser._actions if not action.help]


def test_a_default_is_told_in_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(["generate"], capsys).split())
    assert "requests at a time (default: 8)" in text and "0 is greedy (default: 0.6)" in text
    assert "--seed SEED seed of the sampling (default: 0)" in text
    assert "(default: False)" not in text and "(default: None)" not in text and "(default: [])" not in text


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("generate.py", []),
        ("convert.py", ["--save-path", "x"]),
        ("run_dataset.py", []),
        ("sanity_trace_no_torch.py", ["--nothing"]),
    ],
)
def test_a_usage_error_is_one_line_that_names_the_script(script: str, argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, INFERENCE / script, *argv], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(f"; see {script} --help")


def test_a_usage_error_of_a_verb_names_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["report"])
    assert exited.value.code == 2
    required = "the following arguments are required: RUN"
    assert capsys.readouterr().err == f"error: {required}; see dsatrace report --help\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["reprot"], "dsatrace has no verb 'reprot'; did you mean report? see dsatrace --help"),
        (["run", "shargpt"], "dsatrace run has no data set 'shargpt'; did you mean sharegpt?"),
        (["study", "compar"], "dsatrace study has no verb 'compar'; did you mean compare?"),
        (["zzz"], "dsatrace has no verb 'zzz'; choose one of generate,"),
    ],
)
def test_a_mistyped_verb(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dsatrace {__version__}\n"


def test_python_m_dsatrace() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsatrace", "--version"],
        cwd=INFERENCE,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert done.stdout == f"dsatrace {__version__}\n"


@pytest.mark.parametrize("name", ["sharegpt", "burstgpt"])
def test_run_serves_a_data_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--runner", "simulator", "--no-hub", "--limit", "2"]
    assert main(["run", name, *flags, "--trace-out", "run"]) == 0
    assert len(list(RunReader(tmp_path / "run").requests())) == 2
    assert verify(tmp_path / "run").state == "complete"


def test_estimate_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(INFERENCE / "config_tiny.json")
    assert main(["estimate", "--config", config, "--steps", "3", "--batch", "2", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["num_records"] == 3 * estimate["records_per_step"]
    assert {size["level"] for size in estimate["sizes"]} == {"full", "blocks", "stats"}


def test_loading_is_one_line_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with totals_bar("load", shown=shown, elsewhere="loading {} of weights ...") as progress:
            progress(1, 671_000_000)
            progress(671_000_000, 671_000_000)
    assert capsys.readouterr().err == "loading 639.9 MiB of weights ...\n"
