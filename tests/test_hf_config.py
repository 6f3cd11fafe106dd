"""A Hugging Face `config.json` is read as the demo's config of the same model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from conftest import INFERENCE
from dsatrace.model.config import ModelArgs
from dsatrace.model.hf_config import hf_config


def written(tmp_path, config):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize("name", ["config_tiny.json", "config_671B_v3.2.json"])
@pytest.mark.parametrize("weights", ["bf16", "fp8", "fp32"])
def test_there_and_back(tmp_path, name, weights):
    args = ModelArgs.from_json(INFERENCE / name)
    read = ModelArgs.from_json(written(tmp_path, hf_config(args, weights)))
    max_seq_len = int(args.original_seq_len * args.rope_factor)
    assert read == dataclasses.replace(args, dtype=weights, max_seq_len=max_seq_len)


def test_without_yarn(tmp_path, tiny_args):
    plain = dataclasses.replace(tiny_args, rope_factor=1.0)
    read = ModelArgs.from_json(written(tmp_path, hf_config(plain, "fp32")))
    assert not read.uses_yarn
    assert read == dataclasses.replace(plain, max_seq_len=plain.original_seq_len)


def test_overrides_win(tmp_path, tiny_args):
    file = written(tmp_path, hf_config(tiny_args, "bf16"))
    assert ModelArgs.from_json(file, max_seq_len=99).max_seq_len == 99


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "deepseek_v3"}, "not deepseek_v32"),
        ({"index_topk": None}, "index_topk"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "only yarn"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"hidden_size": -3}, "dim"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, tiny_args, change, said):
    config = hf_config(tiny_args, "bf16") | change
    if change.get("index_topk", 0) is None:
        del config["index_topk"]
    file = written(tmp_path, config)
    with pytest.raises(ValueError, match=said) as caught:
        ModelArgs.from_json(file)
    assert str(file) in str(caught.value)
