"""`dsatrace attach MODEL_DIR`: a checkpoint on the disk, run over a file of prompts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from dsatrace import cli
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from dsatrace.workloads.tokenizer import write_byte_tokenizer
from helpers.families import tiny_model

PROMPTS = ["the first prompt of them", "another, which is a little longer than that"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "glm"
    tiny_model("glm_moe_dsa", vocab_size=272).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS))
    return path


@pytest.mark.parametrize("batch", ["1", "2"])
def test_it_writes_a_run(
    checkpoint: Path, prompts: Path, tmp_path: Path, batch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = ["--max-new-tokens", "5", "--batch-size", batch, "--prefill", "last", "--out", str(folder)]
    assert cli.main(["attach", str(checkpoint), "--input-file", str(prompts), *flags]) == 0
    assert f"run: {folder}" in capsys.readouterr().out
    found = verify(folder)
    assert (found.state, found.num_requests, found.num_records) == ("complete", 2, 2 * 5 * 4)
    manifest = RunReader(folder).manifest
    assert manifest["selection"]["door"] == "attach"
    assert manifest["chat"] == "plain text"
    assert manifest["data_source"] == "file prompts.txt"
    assert manifest["argv"][0] == str(checkpoint)
    assert [r["num_prompt_tokens"] for r in RunReader(folder).requests()] == [len(text) for text in PROMPTS]
    for path in folder.iterdir():
        assert "little longer" not in path.read_text()


def test_what_cannot_be_loaded(
    checkpoint: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(folder: Path, *flags: str) -> str:
        command = [
            "attach",
            str(folder),
            "--input-file",
            str(prompts),
            "--out",
            str(tmp_path / "run"),
            *flags,
        ]
        assert cli.main(command) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "cannot read it: No such file" in said(tmp_path / "none")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (other / "config.json").write_text("{}")
    assert "names no model in `architectures`" in said(other)
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.bin").write_bytes(b"x")
    assert "holds no .safetensors file" in said(other)
    (other / "model.safetensors").write_bytes(b"x")
    assert f"{other}: cannot load it" in said(other)
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    assert "knows no NoSuchModel" in said(other)
    assert "--temperature -1.0: use 0 (greedy)" in said(checkpoint, "--temperature", "-1")
    assert "--temperature nan: use 0 (greedy)" in said(checkpoint, "--temperature", "nan")
    if not importlib.util.find_spec("accelerate"):
        assert "`pip install accelerate`" in said(checkpoint, "--device-map", "auto")
    (tmp_path / "prompts.txt").write_text("")
    assert "holds no prompt" in said(checkpoint)


def test_a_template_that_the_checkpoint_has(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    template = "{% for message in messages %}<u>{{ message.content }}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template)
    try:
        for flags, chat, added in (([], "chat_template", 3), (["--plain-text"], "plain text", 0)):
            folder = tmp_path / chat
            command = ["attach", str(checkpoint), "--input-file", str(prompts), "--out", str(folder), *flags]
            assert cli.main([*command, "--max-new-tokens", "3"]) == 0
            assert RunReader(folder).manifest["chat"] == chat
            lengths = [r["num_prompt_tokens"] for r in RunReader(folder).requests()]
            assert lengths == [len(text) + added for text in PROMPTS]
    finally:
        (checkpoint / "chat_template.jinja").unlink()
