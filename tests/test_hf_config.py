"""A `config.json` is read whole or refused by name: both spellings, both families, every key."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import INFERENCE, ROOT
from dsatrace.errors import UserError
from dsatrace.model import hf_config as module
from dsatrace.model.config import PLAIN_NUMERICS, ModelArgs
from dsatrace.model.hf_config import KEYS, QUANTIZATION_KEYS, ROPE_KEYS
from dsatrace.model.tiny import hf_config
from dsatrace.runner.settings import ModelSettings
from helpers.power import examples
from helpers.real_data import real_file

PINNED_TRANSFORMERS = "5.24.0"
# Attributes of its two config classes, as `to_dict()` writes them, and the arguments that they read besides.
TRANSFORMERS_ATTRIBUTES = """
_name_or_path architectures attention_bias attention_dropout bos_token_id chunk_size_feed_forward dtype
eos_token_id first_k_dense_replace head_dim hidden_act hidden_size id2label index_head_dim index_n_heads
index_topk indexer_types initializer_range intermediate_size is_encoder_decoder kv_lora_rank label2id
layer_types max_position_embeddings mlp_bias mlp_layer_types model_type moe_intermediate_size n_group
n_routed_experts n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers
num_key_value_heads output_attentions output_hidden_states output_router_logits pad_token_id problem_type
q_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim return_dict rms_norm_eps rope_parameters
routed_scaling_factor tie_word_embeddings topk_group transformers_version use_cache v_head_dim vocab_size
"""
TRANSFORMERS_ARGUMENTS = """
index_topk_pattern index_topk_freq index_skip_topk_offset num_experts num_local_experts rope_theta
rope_scaling torch_dtype quantization_config
"""


def written(tmp_path: Path, config: dict[str, Any]) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    return file


def read(tmp_path: Path, config: dict[str, Any], **overrides: Any) -> ModelArgs:
    return ModelArgs.from_json(written(tmp_path, config), **overrides)


@pytest.fixture
def v32(tiny_args: ModelArgs) -> dict[str, Any]:
    """The tiny model's config, transformers 4's spelling, YaRN factor 16."""
    return hf_config(tiny_args, "bf16")


@pytest.fixture
def v5(v32: dict[str, Any]) -> dict[str, Any]:
    """The same in transformers 5's spelling."""
    config = copy.deepcopy(v32)
    rope = config.pop("rope_scaling")
    rope["rope_type"] = rope.pop("type")
    config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    for key in ("scoring_func", "topk_method", "moe_layer_freq"):  # it does not know them
        del config[key]
    config |= {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "qk_head_dim": 48, "head_dim": 16}
    return config | {"layer_types": ["indexed_attention"] * 4}


@pytest.fixture
def glm(v5: dict[str, Any]) -> dict[str, Any]:
    config = v5 | {"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"]}
    return config | {"rope_parameters": {"rope_type": "default", "rope_theta": 8e6}, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize("name", ["config_tiny.json", "config_671B_v3.2.json"])
@pytest.mark.parametrize("weights", ["bf16", "fp8", "fp32"])
def test_there_and_back(tmp_path, name, weights):
    args = ModelArgs.from_json(INFERENCE / name)
    max_seq_len = int(args.original_seq_len * args.rope_factor)
    assert read(tmp_path, hf_config(args, weights)) == dataclasses.replace(
        args, dtype=weights, max_seq_len=max_seq_len
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": False, "n_shared_experts": 0, "tie_word_embeddings": True},
        {"indexer_types": ("full", "shared", "shared", "full"), "latent_norm_eps": 1e-5},
        {"model_type": "glm_moe_dsa", "index_rope": "interleaved", "norm_eps": 1e-5},
        {"mscale": 0.0, "rope_attention_factor": 1.3},
        {"mscale": 0.5, "rope_attention_factor": 1.1},
    ],
)
def test_there_and_back_with_what_a_config_may_vary(tmp_path, tiny_args, changes):
    args = dataclasses.replace(tiny_args, **changes)
    assert read(tmp_path, hf_config(args, "fp32")) == args


def test_what_no_config_can_say_is_not_written(tiny_args):
    for change in ({"score_func": "softmax"}, {"index_rope": "interleaved"}):
        with pytest.raises(ValueError, match=r"no config\.json of deepseek_v32 has this"):
            hf_config(dataclasses.replace(tiny_args, **change), "bf16")


def test_without_yarn(tmp_path, tiny_args):
    plain = dataclasses.replace(tiny_args, rope_factor=1.0)
    args = read(tmp_path, hf_config(plain, "fp32"))
    assert not args.uses_yarn
    assert args == dataclasses.replace(plain, max_seq_len=plain.original_seq_len)


def test_both_spellings_say_the_same(tmp_path, v32, v5):
    assert read(tmp_path, v5) == read(tmp_path, v32)
    assert read(tmp_path, v5).rope_factor == 16
    both = v5 | {key: v32[key] for key in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert read(tmp_path, both) == read(tmp_path, v32)


def test_overrides_win(tmp_path, v32):
    args = read(tmp_path, v32, max_seq_len=99, dtype="fp32", **PLAIN_NUMERICS)
    assert (args.max_seq_len, args.dtype, args.index_fp8, args.index_hadamard) == (99, "fp32", False, False)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "deepseek_v3"}, "model_type deepseek_v3: this model has no indexer"),
    ({"model_type": "deepseek_v4"}, "model_type deepseek_v4: its indexer is another one; `dsatrace attach`"),
    ({"model_type": "llama"}, "model_type llama: not a model that is known here"),
    ({"model_type": ...}, "no model_type"),
    ({"model_type": ["deepseek_v32"]}, r"model_type \['deepseek_v32'\]: not a model"),
    ({"architectures": ["DeepseekV3ForCausalLM"]}, r"architectures .* must be .*DeepseekV32ForCausalLM"),
    ({"index_topk": ...}, "no index_topk; restore the model's own config.json"),
    ({"index_topk": None}, "no index_topk"),
    ({"hidden_size": -3}, "dim must be an integer from 0 to 2147483647, not -3"),
    ({"hidden_size": "256"}, 'hidden_size must be an integer, not "256"'),
    ({"hidden_size": True}, "hidden_size must be an integer, not true"),
    ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, not 1"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number"),
    ({"hidden_act": "gelu"}, 'hidden_act "gelu": must be "silu" here .*--ignore-config-key hidden_act'),
    ({"topk_method": "greedy"}, 'topk_method "greedy": must be "noaux_tc"'),
    ({"scoring_func": "softmax"}, 'scoring_func "softmax": must be "sigmoid"'),
    ({"moe_layer_freq": 2}, "moe_layer_freq 2: must be 1"),
    ({"attention_bias": True}, "attention_bias true: must be false"),
    ({"attention_bias": 0}, "attention_bias 0: must be false"),
    ({"num_key_value_heads": 2}, "num_key_value_heads 2: must be 8"),
    ({"qk_head_dim": 47}, "qk_head_dim 47: must be 48"),
    ({"num_experts": 9}, "num_experts 9: must be 8"),
    ({"num_local_experts": 9}, "num_local_experts 9: must be 8"),
    ({"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}, "mlp_layer_types .* dense ones before"),
    ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types .* must name 4 layers"),
    ({"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}, "first_k_dense_replace 1 and mlp_layer_ty"),
    ({"first_k_dense_replace": ...}, "first_k_dense_replace must be an integer, not null"),
    ({"layer_types": ["full_attention"] * 4}, "layer_types .* must be .*indexed_attention"),
    ({"indexer_types": ["shared", "full", "full", "full"]}, "layer 0 is shared"),
    ({"indexer_types": ["full", "shared"]}, "indexer_types names 2 layers, n_layers is 4"),
    ({"indexer_types": ["full", "half", "shared", "full"]}, "must hold full and shared, not 'half' .layer 1"),
    ({"index_topk_pattern": "FSX!"}, "indexer_types must hold full and shared, not 'X'"),
    ({"indexer_types": ["full", "none", "full", "full"]}, "must hold full and shared, not 'none' .layer 1"),
    ({"index_topk_pattern": "FFXF"}, "must hold full and shared, not 'X' .layer 2"),
    ({"index_topk_pattern": 7}, "index_topk_pattern 7: must be F or S per layer, as in FSSF"),
    ({"index_topk_pattern": [[]] * 4}, r"indexer_types must hold full and shared, not \[\]"),
    ({"index_topk_freq": 0}, "index_topk_freq 0"),
    ({"indexer_rope_interleave": True}, "indexer_rope_interleave true: must be false"),
    ({"rope_interleave": False}, "rope_interleave false: must be true"),
    ({"rope_theta": ...}, "no rope_parameters.rope_theta"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, 'rope_type "linear": default and yarn are known'),
    ({"rope_scaling": {"factor": 40}}, "rope_type null: default and yarn"),
    ({"rope_scaling": {"type": "default", "factor": 40}}, "factor 40: goes with rope_type yarn only"),
    ({"rope_scaling": {"type": "yarn", "factor": 40}}, "no rope_parameters.original_max_position_embeddings"),
    ({"rope_scaling": "yarn"}, 'rope_scaling must be an object, not "yarn"'),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 40}}, "rope_parameters and rope_scaling differ"),
    ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters and rope_scaling differ"),
    ({"dtype": "float32"}, 'torch_dtype "bfloat16" and dtype "float32" differ'),
    ({"torch_dtype": "float16"}, 'dtype "float16": use one of bfloat16'),
    ({"quantization_config": {"quant_method": "awq"}}, 'quant_method "awq": weights run here as bf16'),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "fp8"}}, '"fp8" without weight_block_size'),
    ({"quantization_config": []}, r"quantization_config must be an object, not \[\]"),
    ({"a_new_key": 3}, "a_new_key 3: this key is not understood; .* --ignore-config-key a_new_key"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_not_understood_is_refused_by_name(tmp_path, v32, change, said):
    config = {key: value for key, value in (v32 | change).items() if value is not ...}
    with pytest.raises(ValueError, match=said) as caught:
        read(tmp_path, config)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]: must be \[128, 128\]"),
        ({"fmt": "e5m2"}, 'quantization_config.fmt "e5m2": must be "e4m3"'),
        ({"activation_scheme": "static"}, 'activation_scheme "static": must be "dynamic"'),
        ({"scale_fmt": "float"}, "scale_fmt must be one of ue8m0, None"),
        ({"kv_cache_scheme": {}}, r"quantization_config.kv_cache_scheme \{\}: this key is not understood"),
    ],
)
def test_fp8_other_than_the_released_is_refused(tmp_path, tiny_args, change, said):
    config: dict[str, Any] = hf_config(tiny_args, "fp8")
    config["quantization_config"] |= change
    with pytest.raises(ValueError, match=said):
        read(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"truncate": False}, "rope_parameters.truncate false: must be true"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: must be 1.0"),
        ({"long_factor": [1.0]}, r"rope_parameters.long_factor \[1.0\]: this key is not understood"),
        ({"mscale": "1"}, 'rope_parameters.mscale must be a number, not "1"'),
        ({"type": "default"}, 'rope_parameters: type "default" and rope_type "yarn" differ'),
    ],
)
def test_nested_rope_keys_are_rows_too(tmp_path, v5, change, said):
    v5["rope_parameters"] |= change
    with pytest.raises(ValueError, match=said):
        read(tmp_path, v5)


def test_ignored_keys_are_left_out_and_kept_in_mind(tmp_path, v5):
    v5["rope_parameters"]["truncate"] = False
    names = ("rope_parameters.truncate", "attention_dropout_2")
    args = read(tmp_path, v5 | {"attention_dropout_2": 0.5}, ignore_keys=names)
    assert args.ignored_config_keys == names
    for name in ("rope_parameters.no", "no", "vocab_size.no"):
        with pytest.raises(ValueError, match=f"--ignore-config-key {name}: the config has no such key"):
            read(tmp_path, v5, ignore_keys=(name,))


def test_yarn_temperatures(tmp_path, v5):
    """cos and sin are scaled by the quotient of both, or as the paper has it where one is missing."""
    rope = v5["rope_parameters"]

    def factors(**changes: float | None) -> tuple[float, float]:
        v5["rope_parameters"] = {k: v for k, v in (rope | changes).items() if v is not None}
        args = read(tmp_path, v5)
        return args.mscale, pytest.approx(args.rope_attention_factor)

    whole = 1 + 0.1 * 2.772588722239781  # ln 16
    assert factors() == (1.0, 1.0)
    assert factors(mscale=0.5) == (1.0, (1 + 0.05 * 2.772588722239781) / whole)
    assert factors(mscale=None, mscale_all_dim=None) == (0.0, whole)
    assert factors(mscale_all_dim=None) == (0.0, whole)
    assert factors(mscale=None) == (1.0, whole)
    assert factors(attention_factor=1.25) == (1.0, 1.25)


def test_glm(tmp_path, glm):
    args = read(tmp_path, glm)
    assert (args.model_type, args.index_rope, args.norm_eps, args.latent_norm_eps) == (
        "glm_moe_dsa", "interleaved", 1e-5, 1e-6,
    )  # fmt: skip
    assert args.source_layers == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="indexer_rope_interleave false: must be true"):
        read(tmp_path, glm | {"indexer_rope_interleave": False})


def test_which_layers_share_a_selection(tmp_path, glm):
    """The list counts before the pattern, the pattern before every n-th."""
    assert read(tmp_path, glm | {"index_topk_freq": 2}).source_layers == (0, 1, 1, 3)
    every_fourth = glm | {"index_topk_freq": 4, "index_skip_topk_offset": 1}
    assert read(tmp_path, every_fourth).source_layers == (0, 0, 0, 0)
    pattern = every_fourth | {"index_topk_pattern": "FSFS"}
    assert read(tmp_path, pattern).source_layers == (0, 0, 2, 2)
    listed = pattern | {"indexer_types": ["full", "full", "full", "shared"]}
    assert read(tmp_path, listed).source_layers == (0, 1, 2, 2)


def test_every_attribute_of_transformers_has_a_row():
    assert set((TRANSFORMERS_ATTRIBUTES + TRANSFORMERS_ARGUMENTS).split()) <= set(KEYS)
    read_by_yarn = "attention_factor beta_fast beta_slow factor mscale mscale_all_dim truncate rope_theta"
    assert set(read_by_yarn.split()) <= set(ROPE_KEYS)
    assert {"original_max_position_embeddings", "partial_rotary_factor"} <= set(ROPE_KEYS)


def test_the_recorded_attributes_are_those_of_transformers():
    """Only beside the release they were recorded from; `scripts/config_keys.py` walks any other."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != PINNED_TRANSFORMERS:
        pytest.skip(f"the attributes are those of {PINNED_TRANSFORMERS}, not {transformers.__version__}")
    both = transformers.DeepseekV32Config().to_dict() | transformers.GlmMoeDsaConfig().to_dict()
    assert set(both) == set(TRANSFORMERS_ATTRIBUTES.split())


def test_what_reads_a_key_is_there():
    for key, row in {**KEYS, **ROPE_KEYS}.items():
        assert row.read_by is None or callable(getattr(module, row.read_by)), key
        assert sum(map(bool, (row.field, row.only, row.must_be, row.read_by))) <= 1 and (
            row.field or row.why
        ), key


def test_every_row_is_in_the_documentation():
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    for key in (*KEYS, *ROPE_KEYS, *QUANTIZATION_KEYS):
        assert f"| `{key}` |" in text, f"{key}: run scripts/config_keys.py --write"


def checkpoint_folder(tmp_path: Path, config: dict[str, Any]) -> Path:
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_config_beside_the_weights_must_be_the_same_model(tmp_path, tiny_args, v32):
    """Else a run would record one model and describe another."""
    folder = checkpoint_folder(tmp_path, v32 | {"norm_topk_prob": False})
    with pytest.raises(UserError, match=r"norm_topk_prob is True, but .*converted/config.json .* says False"):
        ModelSettings(folder, INFERENCE / "config_tiny.json").model_args()
    assert ModelSettings(folder).model_args().norm_topk_prob is False


def test_what_a_run_may_choose_may_differ(tmp_path, tiny_args, v32):
    demo = tmp_path / "demo.json"
    chosen = dataclasses.replace(tiny_args, dtype="fp64", index_topk=16, max_seq_len=512, index_fp8=False)
    demo.write_text(json.dumps(dataclasses.asdict(chosen)))
    assert ModelSettings(checkpoint_folder(tmp_path, v32), demo).model_args() == chosen


def test_numerics_and_ignored_keys_reach_the_model(tmp_path, v32):
    folder = checkpoint_folder(tmp_path, v32 | {"new": 1})
    setup = ModelSettings(
        folder, INFERENCE / "config_tiny.json", numerics="plain", ignore_config_keys=("new",)
    )
    args = setup.model_args()
    assert not (args.index_fp8 or args.index_hadamard or args.latent_fp8)
    assert args.ignored_config_keys == ("new",)
    with pytest.raises(UserError, match=r"--ignore-config-key old: .* has no such key"):
        dataclasses.replace(setup, ignore_config_keys=("new", "old")).model_args()
    with pytest.raises(UserError, match="new 1: this key is not understood"):
        dataclasses.replace(setup, ignore_config_keys=()).model_args()


@pytest.mark.parametrize("name", ["deepseek-v3.2.json", "glm-5.2-fp8.json"])
def test_released_configs_load_whole(name):
    args = ModelArgs.from_json(real_file(f"../cases/configs/{name}"))
    assert args.ignored_config_keys == () and args.dtype == "fp8"
    num_indexers = len(set(args.source_layers))
    assert (args.n_layers, num_indexers) == ((61, 61) if "v3.2" in name else (78, 21))
    if "v3.2" in name:
        assert args == dataclasses.replace(ModelArgs(), max_seq_len=163840)


@settings(
    max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_value_of_any_key_gives_a_traceback(tmp_path, v32, v5, glm, data):
    """One key at a time takes anything JSON can hold: the file is read, or refused in one line."""
    config = copy.deepcopy(data.draw(st.sampled_from([v32, v5, glm])))
    key = data.draw(st.sampled_from(sorted(KEYS)))
    scalars = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=5)
    inner = st.sampled_from(sorted(set(ROPE_KEYS) | set(QUANTIZATION_KEYS) | {"type"}))
    config[key] = data.draw(
        scalars
        | st.lists(scalars, max_size=4)
        | st.dictionaries(inner, scalars | st.just("yarn"), max_size=5)
    )
    try:
        args = read(tmp_path, config)
    except ValueError as error:
        assert "\n" not in str(error) and "config.json: " in str(error)
    else:
        for spelling in ("rope_parameters", "rope_scaling"):  # a factor in the file is the model's
            factor = (config.get(spelling) or {}).get("factor")
            assert factor is None or args.rope_factor == factor
