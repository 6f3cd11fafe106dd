"""What a resume takes from the manifest: the flags of the first start, and what must not have changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsatrace.errors import UserError
from dsatrace.files import write_json
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo, manifest
from dsatrace.trace.resume import check_resumable
from dsatrace.trace.resumed_argv import resumed_argv
from helpers.json_edits import at, changed
from helpers.trace_samples import LAYOUT

INFO = RunInfo(
    model_config={"n_layers": 2, "index_topk": 8, "rope": {"factor": 40}},
    layouts=(LAYOUT,),
    device="cpu",
    tokenizer="bytes",
    data_source="embedded",
    serving={"mode": "continuous", "clock": "virtual"},
)


def new_manifest(**changes: Any) -> dict[str, Any]:
    return manifest(INFO, TraceConfig(out=Path("unused"), **changes), "running", key_id="0a")


def started_with(folder: Path, *argv: str) -> Path:
    write_json(folder / "manifest.json", manifest_with(argv))
    return folder


def manifest_with(argv: Sequence[str]) -> dict[str, Any]:
    info = RunInfo(model_config={}, layouts=(LAYOUT,), device="cpu", argv=argv)
    return manifest(info, TraceConfig(out=Path("unused")), "incomplete", key_id="0a")


CHANGES = [
    ("model_config.index_topk", 16, "give the same --config"),
    ("model_config.rope.factor", 1, "give the same --config"),
    ("model_config_digest", "ff", "give the same --config"),
    ("cache_layouts", [], "give the same --config"),
    ("tokenizer", None, "give the same --tokenizer"),
    ("data_source", "hub", "give the same data"),
    ("seed", 1, "give the same --seed"),
    ("selections", "random_weights", "give what it was"),
    ("world_size", 2, "start as many ranks as then"),
    ("device", "H200", "resume it on the same kind of device"),
    ("serving", None, "give what it was"),
    ("serving.clock", "real", "give what it was"),
    ("trace.level", "stats", "give the same --trace-level"),
    ("trace.block_size_tokens", 32, "give the same --kv-block-size"),
    ("trace.sample_rate", 0.5, "give what it was"),
    ("trace.store_scores", True, "give what it was"),
    ("trace.keep_order", True, "give what it was"),
    ("trace.prefill", "last", "give what it was"),
    ("trace.prefix_key_tokens", 8, "give what it was"),
    ("trace.prefix_key_id", "0b", "set DSATRACE_PREFIX_KEY"),
    ("trace.queue_policy", "drop", "give what it was"),
]


@pytest.mark.parametrize(("path", "now", "remedy"), CHANGES)
def test_what_must_be_the_same(path: str, now: object, remedy: str) -> None:
    old, where = new_manifest(), path.split(".")
    was = at(old, where)
    with pytest.raises(UserError) as caught:
        check_resumable(old, changed(old, where, now))
    assert str(caught.value).startswith(f"cannot resume: {path} was {was!r} and is {now!r} now; {remedy}")
    assert "\n" not in str(caught.value)


def test_what_may_differ() -> None:
    old, new = new_manifest(), new_manifest(queue_steps=99)
    old |= {"state": "incomplete", "error": "x", "argv": ["a"], "started_utc": "", "tool_version": "0"}
    old["resumed_at_forward"] = [3]
    before = copy.deepcopy((old, new))
    check_resumable(old, new)
    del old["serving"], old["trace"]["on_error"]  # an older version's manifest
    check_resumable(old, new)
    assert before[1] == new


def test_the_flags_come_back(tmp_path: Path) -> None:
    argv = ["--dataset", "ruler", "--no-hub", "--limit=5", "--prompt", "--what is this?"]
    argv += ["--max-new-tokens", "8"]
    assert resumed_argv(started_with(tmp_path, *argv)) == argv


def test_the_folder_is_not_among_them(tmp_path: Path) -> None:
    argv = ("--resume", "old run", "--dataset", "ruler", "--trace-out", "there", "--trace-out=here")
    folder = started_with(tmp_path, *argv, "--no-hub")
    assert resumed_argv(folder) == ["--dataset", "ruler", "--no-hub"]


@pytest.mark.parametrize(
    "secret",
    [
        ("--hf-token", "hf_abc"),
        ("--hf-token=hf_abc",),
        ("--mirror", "https://me:pw@host/x"),
        ("--system-prompt", "Be x"),
    ],
)
def test_a_hidden_value_must_be_given_again(tmp_path: Path, secret: tuple[str, ...]) -> None:
    folder = started_with(tmp_path, "--dataset", "ruler", *secret, "--no-hub")
    assert "***" in "".join(json.loads((folder / "manifest.json").read_bytes())["argv"])
    flag = secret[0].partition("=")[0]
    with pytest.raises(UserError, match=f"does not keep the value of {flag}; give it again"):
        resumed_argv(folder, ["--limit", "3"])
    for given in ([flag, "new"], [f"{flag}=new"]):
        assert resumed_argv(folder, given) == ["--dataset", "ruler", "--no-hub"]


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is this a run's folder"):
        resumed_argv(tmp_path)
