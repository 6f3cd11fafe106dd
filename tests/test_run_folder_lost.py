"""A run whose files or folder are taken away under it: one line, an exit code, no foreign file touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsatrace.commands.generate import main as generate
from dsatrace.commands.run_burstgpt import main as run_burstgpt
from dsatrace.commands.run_dataset import main as run_dataset
from dsatrace.engine.engine import Engine
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE
from dsatrace.trace.reader import RunReader
from helpers.checkpoints import tiny_config

LOST = "was deleted, moved or replaced while the run wrote it; start the run again"
THEIRS = {MANIFEST_FILE: b'{"theirs": 1}', STEPS_FILE: b"theirs\n", REQUESTS_FILE: b"", SUMMARY_FILE: b"{}"}


def delete_steps(folder: Path) -> None:
    (folder / STEPS_FILE).unlink()


def replace_steps(folder: Path) -> None:
    other = folder / "other"
    shutil.copy(folder / STEPS_FILE, other)
    other.replace(folder / STEPS_FILE)


def delete_requests(folder: Path) -> None:
    (folder / REQUESTS_FILE).unlink()


def delete_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def move_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replace_folder(folder: Path) -> None:
    """By another run's, as one that was told the same name after an `rm -r`."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name, data in THEIRS.items():
        (folder / name).write_bytes(data)


ACTS = (delete_steps, replace_steps, delete_requests, delete_folder, move_folder, replace_folder)
Act = Callable[[Path], None]


@pytest.fixture
def after_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`after_steps(3, act, folder)` acts on a run's folder once, after its third step."""

    def arrange(number: int, act: Act, folder: Path) -> list[str]:
        step, done, acted = Engine.step, iter(range(number)), list[str]()

        def counted(self: Engine, next_arrival_ns: int | None = None) -> Any:
            progress = step(self, next_arrival_ns)
            if next(done, None) is None and not acted:
                acted.append(act.__name__)
                act(folder)
            return progress

        monkeypatch.setattr(Engine, "step", counted)
        return acted

    return arrange


def check_lost(folder: Path, act: Act, out: str, err: str) -> None:
    (said,) = [line for line in err.splitlines() if "error" in line or "warning" in line]
    assert said.startswith(f"error: {folder}")
    assert LOST in said
    assert "dsatrace report" not in out
    assert "trace: " not in out
    if act is replace_folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == THEIRS
    elif act in (delete_folder, move_folder):
        assert not folder.exists()
    else:
        manifest = RunReader(folder).manifest
        assert manifest["state"] == "incomplete"
        assert LOST in manifest["error"]
    if act is move_folder:
        assert RunReader(folder.with_name("moved")).state == "incomplete"


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("command", ["generate", "run_dataset"])
def test_of_a_model(
    command: str,
    act: Act,
    checkpoint: Path,
    tmp_path: Path,
    after_steps: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, config = tmp_path / "run", tiny_config(tmp_path, index_topk=16)
    acted = after_steps(3, act, folder)
    model = ("--ckpt-path", checkpoint, "--config", config, "--trace-out", folder, "--max-new-tokens", 9)
    if command == "generate":
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("Which ship was the last?")
        main, own = generate, ("--input-file", prompts)
    else:
        main = run_dataset
        own = ("--dataset", "ruler", "--ruler-generate", "--ruler-length", 500, "--limit", 1, "--no-hub")
    assert main([str(flag) for flag in (*model, *own)]) == 2
    assert acted == [act.__name__]
    check_lost(folder, act, *capsys.readouterr())


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_of_the_simulator(
    act: Act,
    tmp_path: Path,
    after_steps: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It writes no step, so the steps file is looked at with the requests' lines."""
    folder = tmp_path / "run"
    acted = after_steps(2, act, folder)
    flags = ("--runner", "simulator", "--burstgpt-generate", "--limit", 40, "--no-hub", "--trace-out", folder)
    assert run_burstgpt([str(flag) for flag in flags]) == 2
    assert acted == [act.__name__]
    check_lost(folder, act, *capsys.readouterr())


def test_a_run_told_to_go_on_ends_with_1(
    checkpoint: Path,
    tmp_path: Path,
    after_steps: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("Which ship was the last?")
    acted = after_steps(3, delete_steps, folder)
    config = tiny_config(tmp_path, index_topk=16)
    model = ("--ckpt-path", checkpoint, "--config", config, "--trace-out", folder, "--max-new-tokens", 9)
    own = ("--input-file", prompts, "--trace-on-error", "continue")
    assert generate([str(flag) for flag in (*model, *own)]) == 1
    assert acted
    err = capsys.readouterr().err
    assert err.count("warning: ") == err.count(LOST) == 1
    assert RunReader(folder).manifest["state"] == "incomplete"
