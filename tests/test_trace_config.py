"""The trace flags: what they mean, what they refuse, and where a run goes."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsatrace.errors import UserError
from dsatrace.trace.config import (
    TraceConfig,
    add_trace_arguments,
    default_run_folder,
    is_sampled,
    run_config_from_args,
    trace_config_from_args,
)

ROOT = Path(__file__).resolve().parents[1]


def parse_always(*argv: str) -> TraceConfig:
    parser = argparse.ArgumentParser()
    add_trace_arguments(parser, always=True)
    return run_config_from_args(parser.parse_args(argv), "ruler")


def parse(*argv: str) -> TraceConfig | None:
    parser = argparse.ArgumentParser()
    add_trace_arguments(parser)
    return trace_config_from_args(parser.parse_args(argv), "generate", seed=3)


def test_off_by_default() -> None:
    assert parse() is None
    assert parse("--kv-block-size", "32") is None


def test_flags_and_dataclass_have_the_same_defaults(tmp_path: Path) -> None:
    config = parse("--trace-out", str(tmp_path))
    assert config == TraceConfig(out=tmp_path, seed=3)


def test_every_flag_arrives(tmp_path: Path) -> None:
    config = parse(
        *("--trace-out", str(tmp_path), "--kv-block-size", "24", "--trace-sample-rate", "0.5"),
        *("--trace-store-scores", "--trace-keep-order", "--trace-prefix-key-tokens", "7"),
        *("--trace-no-sync-cuda", "--trace-prefill", "last", "--trace-queue-policy", "drop"),
        *("--trace-queue-steps", "3", "--trace-on-error", "continue"),
    )
    assert config == TraceConfig(
        out=tmp_path,
        block_size=24,
        sample_rate=0.5,
        store_scores=True,
        keep_order=True,
        prefix_key_tokens=7,
        sync_cuda=False,
        prefill="last",
        queue_policy="drop",
        queue_steps=3,
        on_error="continue",
        seed=3,
    )
    assert config.needs_scores


def test_default_folder_lies_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse("--trace-enable")
    assert config is not None
    assert config.out.parent == ROOT / "outputs"
    assert config.out.name.startswith("generate_")
    assert list(config.out.iterdir()) == []


def test_default_folders_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "20260101_000000")
    monkeypatch.setattr("dsatrace.trace.config.__file__", str(tmp_path / "lib" / "a" / "b" / "config.py"))
    monkeypatch.chdir(tmp_path)
    first = default_run_folder("x")
    assert first == tmp_path / "outputs" / "x_20260101_000000"  # installed elsewhere: the working directory
    with ThreadPoolExecutor(8) as pool:
        names = {folder.name for folder in pool.map(lambda _: default_run_folder("x"), range(8))}
    assert names == {f"x_20260101_000000_{i}" for i in range(2, 10)}
    assert all((tmp_path / "outputs" / name).is_dir() for name in names)


def test_an_unused_default_folder_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys; from dsatrace.trace import config\n"
        "config.__file__ = sys.argv[1]\n"
        "unused, used = config.default_run_folder('x'), config.default_run_folder('x')\n"
        "(used / 'manifest.json').touch()\n"
        "assert unused.is_dir(); print(used.name)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a" / "b" / "c" / "config.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [folder.name for folder in (tmp_path / "outputs").iterdir()] == [done.stdout.strip()]


def test_outputs_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsatrace.trace.config.__file__", str(tmp_path / "lib" / "a" / "b" / "config.py"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").symlink_to("nowhere")
    with pytest.raises(
        UserError, match=r"outputs: cannot make a folder there: .*; name one with --trace-out"
    ):
        default_run_folder("x")


def test_a_relative_folder_follows_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse("--trace-out", "here")
    assert config is not None
    assert config.out == tmp_path / "here"


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds files already"):
        parse("--trace-out", str(tmp_path))
    with pytest.raises(UserError, match="not a folder"):
        parse("--trace-out", str(tmp_path / "manifest.json"))
    (tmp_path / "manifest.json").rename(tmp_path / ".manifest.json.tmp")  # of a start that was killed
    assert parse("--trace-out", str(tmp_path)) is not None
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="holds files already"):
        parse("--trace-out", str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--kv-block-size", "0"), "--kv-block-size 0"),
        (("--trace-sample-rate", "0"), "--trace-sample-rate 0.0"),
        (("--trace-sample-rate", "1.5"), "--trace-sample-rate 1.5"),
        (("--trace-sample-rate", "nan"), "--trace-sample-rate nan"),
        (("--trace-prefix-key-tokens", "0"), "--trace-prefix-key-tokens 0"),
        (("--trace-queue-steps", "0"), "--trace-queue-steps 0: let at least 1 step wait"),
        (("--trace-level", "blocks", "--trace-store-scores"), "--trace-store-scores needs the positions"),
        (("--trace-level", "stats", "--trace-keep-order"), "--trace-keep-order needs the positions"),
    ],
)
def test_mistakes_name_the_flag(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse("--trace-enable", *argv)


def test_a_trace_flag_without_tracing_is_a_mistake() -> None:
    with pytest.raises(UserError, match="--trace-level does nothing without --trace-enable"):
        parse("--trace-level", "stats")


def test_a_command_that_always_writes_a_run(tmp_path: Path) -> None:
    out = ("--trace-out", str(tmp_path))
    assert parse_always(*out) == TraceConfig(out=tmp_path)
    assert parse_always().out.name.startswith("ruler_")
    untraced = parse_always("--no-trace", *out, "--kv-block-size", "24", "--trace-on-error", "continue")
    assert untraced == TraceConfig(out=tmp_path, block_size=24, sample_rate=0.0, on_error="continue")
    assert not untraced.records_steps
    with pytest.raises(SystemExit):
        parse_always("--trace-enable")


@pytest.mark.parametrize("flag", [("--trace-level", "stats"), ("--trace-store-scores",)])
def test_a_trace_flag_beside_no_trace_is_a_mistake(flag: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"{flag[0]} does nothing beside --no-trace; leave one of them out"):
        parse_always("--no-trace", *flag)


def test_sampling_is_seeded_and_by_step() -> None:
    drawn = [is_sampled(step, 0.25, seed=7) for step in range(4000)]
    assert drawn == [is_sampled(step, 0.25, seed=7) for step in range(4000)]
    assert drawn != [is_sampled(step, 0.25, seed=8) for step in range(4000)]
    assert sum(drawn) == pytest.approx(1000, abs=100)
    assert all(is_sampled(step, 1.0, seed=7) for step in range(100))


def test_the_config_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TraceConfig(out=tmp_path).level = "stats"  # type: ignore[misc]
