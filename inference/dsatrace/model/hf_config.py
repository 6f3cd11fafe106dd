"""`config.json` of a Hugging Face checkpoint, as fields of `ModelArgs`.

Every key that the file may hold is a row of `KEYS`: the field it sets, or the only values it may
have, or why it cannot matter. A key without a row, or with another value, is refused by name.
Reads the spellings of transformers 4 (`rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`). Knows no tensor and no file.

    ModelArgs.from_json("DeepSeek-V3.2/config.json")      # comes here by itself
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

WeightDtype = Literal["fp8", "bf16", "fp32", "fp64"]
ModelType = Literal["deepseek_v32", "glm_moe_dsa"]

MAX_LAYERS = 10_000
"""More are a mistake in the file; a list with an entry per layer would fill the memory."""

FP8_GROUP = 128
"""Channels that share one fp8 scale, and the side of a weight's scale block."""

IGNORE_FLAG = "--ignore-config-key"

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model type fixes that its `config.json` does not say."""

    architecture: str
    index_rope: Literal["half_split", "interleaved"]
    latent_norm_eps: float = 1e-6
    """DeepSeek's code gives 1e-6 to every norm, transformers to the latent norms of both families."""


FAMILIES: dict[ModelType, Family] = {
    "deepseek_v32": Family("DeepseekV32ForCausalLM", "half_split"),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", "interleaved"),
}

NO_INDEXER = ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite")
OTHER_INDEXER = (
    *("axk2", "deepseek_v4", "dots3_note", "dots3_note_text", "glm5_next", "glm5_next_text", "hy_v4"),
    *("minimax_m3_vl", "minimax_m3_vl_text", "mistral_large4", "mistral_large4_text"),
    *("qwen4_exp", "qwen4_exp_text"),
)
"""Families whose indexer is another one: they can be observed, not run."""


@dataclasses.dataclass(frozen=True)
class Row:
    """How one key is understood: by `field`, `only`, `must_be` or `read_by`; else it cannot matter."""

    field: str | None = None  # of ModelArgs, which takes the value
    of: type = object  # the value's type: int, float or bool; object where the field itself checks it
    only: tuple[object, ...] = ()  # the values it may have
    must_be: Callable[[Values], object] | None = None  # the value it must have, by the other keys
    read_by: str | None = None  # the function here that reads it
    why: str = ""  # why only those values, or why it cannot matter
    optional: bool = False  # without the key, the field's default holds

    def kind(self) -> str:
        """In a word or two, for the table in docs/config.md."""
        if self.field:
            return f"sets `{self.field}`"
        if self.only:
            return "must be " + " or ".join(f"`{json.dumps(value)}`" for value in self.only)
        return "must agree" if self.must_be else "read" if self.read_by else "cannot matter"


def _to(field: str, of: type = int, optional: bool = False) -> Row:
    return Row(field=field, of=of, optional=optional)


def _only(*values: object, why: str) -> Row:
    return Row(only=values, why=why)


def _must_be(value: Callable[[Values], object], why: str) -> Row:
    return Row(must_be=value, why=why)


def _read(function: str, why: str) -> Row:
    return Row(read_by=function, why=why)


def _harmless(why: str) -> Row:
    return Row(why=why)


def _all_harmless(why: str, *keys: str) -> dict[str, Row]:
    return dict.fromkeys(keys, Row(why=why))


_LAYER_KINDS = "one of several spellings; the first that stands counts"

KEYS: dict[str, Row] = {
    "model_type": _read("family_of", "names the family"),
    "architectures": _must_be(lambda v: [FAMILIES[v["model_type"]].architecture], "the family's own"),
    # Shape
    "vocab_size": _to("vocab_size"),
    "hidden_size": _to("dim"),
    "intermediate_size": _to("inter_dim"),
    "moe_intermediate_size": _to("moe_inter_dim"),
    "num_hidden_layers": _to("n_layers"),
    "num_attention_heads": _to("n_heads"),
    "q_lora_rank": _to("q_lora_rank"),
    "kv_lora_rank": _to("kv_lora_rank"),
    "qk_nope_head_dim": _to("qk_nope_head_dim"),
    "qk_rope_head_dim": _to("qk_rope_head_dim"),
    "v_head_dim": _to("v_head_dim"),
    "num_key_value_heads": _must_be(lambda v: v["num_attention_heads"], "MLA has a key per query head"),
    "qk_head_dim": _must_be(lambda v: v["qk_nope_head_dim"] + v["qk_rope_head_dim"], "the sum of both parts"),
    "head_dim": _harmless("transformers sets it to qk_rope_head_dim, whatever the file says"),
    "max_position_embeddings": _to("max_seq_len", optional=True),
    "rms_norm_eps": _to("norm_eps", float),
    "latent_norm_eps": _to("latent_norm_eps", float, optional=True),
    "hidden_act": _only("silu", why="every feed-forward layer is a SwiGLU"),
    "attention_bias": _only(False, why="the projections have no biases here"),
    "mlp_bias": _only(False, why="the projections have no biases here"),
    "tie_word_embeddings": _to("tie_word_embeddings", bool, optional=True),
    # Experts
    "n_routed_experts": _to("n_routed_experts"),
    "num_local_experts": _must_be(lambda v: v["n_routed_experts"], "another name of n_routed_experts"),
    "num_experts": _must_be(lambda v: v["n_routed_experts"], "another name of n_routed_experts"),
    "n_shared_experts": _to("n_shared_experts"),
    "num_experts_per_tok": _to("n_activated_experts"),
    "n_group": _to("n_expert_groups"),
    "topk_group": _to("n_limited_groups"),
    "routed_scaling_factor": _to("route_scale", float),
    "norm_topk_prob": _to("norm_topk_prob", bool),
    "scoring_func": _only("sigmoid", why="the gate that V3.2 and GLM-5 have in every engine"),
    "topk_method": _only("noaux_tc", why="the choice by sigmoid score and correction bias"),
    "moe_layer_freq": _only(1, why="every layer past the dense ones is a MoE"),
    "first_k_dense_replace": _read("_num_dense_layers", "sets `n_dense_layers`"),
    "mlp_layer_types": _read("_num_dense_layers", "sets `n_dense_layers`: dense ones first, then sparse"),
    # Indexer
    "index_n_heads": _to("index_n_heads"),
    "index_head_dim": _to("index_head_dim"),
    "index_topk": _to("index_topk"),
    "indexer_types": _read("indexer_types", _LAYER_KINDS),
    "index_topk_pattern": _read("indexer_types", _LAYER_KINDS),
    "index_topk_freq": _read("indexer_types", _LAYER_KINDS),
    "index_skip_topk_offset": _read("indexer_types", "the first layer that index_topk_freq may skip"),
    "layer_types": _must_be(
        lambda v: ["indexed_attention"] * v["num_hidden_layers"], "every layer's attention is sparse"
    ),
    "indexer_rope_interleave": _must_be(
        lambda v: FAMILIES[v["model_type"]].index_rope == "interleaved", "engines disagree on another one"
    ),
    "index_share_for_mtp_iteration": _harmless("of the next-token module, which is left out"),
    # Rotary embedding
    "rope_theta": _read("_rope_fields", "transformers 4: beside rope_scaling"),
    "rope_scaling": _read("_rope_fields", "transformers 4"),
    "rope_parameters": _read("_rope_fields", "transformers 5: both in one; where both stand they must agree"),
    "rope_interleave": _only(True, why="attention rotates interleaved pairs"),
    # Number format
    "torch_dtype": _read("_dtype_fields", "transformers 4"),
    "dtype": _read("_dtype_fields", "transformers 5; where both stand they must agree"),
    "quantization_config": _read("_dtype_fields", "fp8 in blocks of 128 x 128, as released"),
    # Left out, or of no effect on a forward
    "num_nextn_predict_layers": _harmless("next-token modules are left out"),
    "ep_size": _harmless("how DeepSeek's code split experts"),
    "pretraining_tp": _harmless("how the model was trained"),
    **_all_harmless(
        "training only",
        *("attention_dropout", "initializer_range", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef"),
    ),
    "use_cache": _harmless("this engine always has a cache"),
    **_all_harmless(
        "what transformers returns beside the logits",
        *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
    ),
    "bos_token_id": _harmless("the tokenizer says it"),
    "eos_token_id": _harmless("of no effect on a forward; where an answer ends is the tokenizer's"),
    "pad_token_id": _harmless("nothing is padded here"),
    "is_encoder_decoder": _only(False, why="this is a decoder"),
    "is_decoder": _harmless("of no effect on a model that is one"),
    "add_cross_attention": _only(False, why="this is a decoder"),
    "chunk_size_feed_forward": _harmless("a memory setting of transformers"),
    "auto_map": _harmless("code in the checkpoint is never run"),
    **_all_harmless(
        "metadata",
        *("problem_type", "id2label", "label2id", "num_labels", "transformers_version", "_name_or_path"),
        *("name_or_path", "tokenizer_class", "_attn_implementation", "attn_implementation"),
    ),
    "random_weights": _harmless("our own: says that the weights mean nothing"),
}
"""Every key that is understood."""

ROPE_KEYS: dict[str, Row] = {
    "rope_theta": _to("rope_theta", float),
    "rope_type": _read("_rope_fields", "default or yarn"),
    "factor": _to("rope_factor", float),
    "original_max_position_embeddings": _to("original_seq_len"),
    "beta_fast": _to("beta_fast", float, optional=True),
    "beta_slow": _to("beta_slow", float, optional=True),
    "mscale": _read("_rope_fields", "with mscale_all_dim: sets `rope_attention_factor`"),
    "mscale_all_dim": _read("_rope_fields", "sets `mscale`, attention's temperature; absent: none"),
    "attention_factor": _read("_rope_fields", "sets `rope_attention_factor`"),
    "truncate": _only(True, why="the ramp's ends are whole pairs"),
    "partial_rotary_factor": _only(1.0, why="all of qk_rope_head_dim is rotated"),
}
"""Keys of `rope_parameters` and `rope_scaling`; `type` is another name of rope_type."""

_PLAIN_ROPE_KEYS = {key: ROPE_KEYS[key] for key in ("rope_theta", "rope_type", "partial_rotary_factor")}

QUANTIZATION_KEYS: dict[str, Row] = {
    "quant_method": _only("fp8", why="the released format"),
    "fmt": _only("e4m3", why="the released format"),
    "activation_scheme": _only("dynamic", why="activations are quantised as they come"),
    "weight_block_size": _only([FP8_GROUP, FP8_GROUP], why="a scale serves one such block"),
    "scale_fmt": _to("scale_fmt", object, optional=True),
    "modules_to_not_convert": _harmless("each tensor's own type says whether it is fp8"),
    "ignored_layers": _harmless("each tensor's own type says whether it is fp8"),
}
"""Keys of `quantization_config`."""

_DTYPES: dict[str, WeightDtype] = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def is_hf_config(values: Values) -> bool:
    """Whether a JSON object is Hugging Face's config and not the demo's."""
    return "dim" not in values and not {"model_type", "hidden_size", "num_hidden_layers"}.isdisjoint(values)


def fields_of(values: Values) -> dict[str, Any]:
    """`ModelArgs` fields of a `config.json`.

    Raises `ValueError` for another model's, and for a key or value that is not understood.
    """
    model_type = family_of(values)
    family = FAMILIES[model_type]
    fields: dict[str, Any] = {
        "model_type": model_type,
        "index_rope": family.index_rope,
        "latent_norm_eps": family.latent_norm_eps,
    }
    num_layers = values.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers {num_layers}: a model has at most {MAX_LAYERS} layers here")
    fields |= _understood(KEYS, values, "")
    fields |= {"n_dense_layers": _num_dense_layers(values), "indexer_types": indexer_types(values)}
    return fields | _rope_fields(values) | _dtype_fields(values)


def family_of(values: Values) -> ModelType:
    """The family that `model_type` names; raises `ValueError` for one that does not run here."""
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return model_type
    if model_type is None:
        raise ValueError(f"no model_type; one of {', '.join(FAMILIES)} runs here")
    if model_type in NO_INDEXER:
        why = "this model has no indexer, so it selects nothing"
    elif model_type in OTHER_INDEXER:
        why = "its indexer is another one; `dsatrace attach` observes what transformers runs"
    else:
        why = "not a model that is known here"
    raise ValueError(f"model_type {model_type}: {why}; what runs here is {' and '.join(FAMILIES)}")


def _understood(
    rows: Mapping[str, Row], values: Values, prefix: str = "", unknown: str = "this key is not understood"
) -> dict[str, Any]:
    """The fields that `values` set; raises `ValueError` unless each key has a row that takes its value.

    Null says nothing, as a missing key does; but `n_shared_experts` null is none.
    """
    fields: dict[str, Any] = {}
    missing = []
    for key, row in rows.items():
        if row.field is not None:
            value = values.get(key)
            if value is None and key == "n_shared_experts" and key in values:
                value = 0
            if value is not None:
                fields[row.field] = value
                _check_type(prefix + key, value, row.of)
            elif not row.optional:
                missing.append(prefix + key)
    if missing:
        raise ValueError(f"no {', '.join(missing)}; restore the model's own config.json")
    for key, value in values.items():
        if key not in rows:
            raise ValueError(_refused(prefix + key, value, unknown))
        row = rows[key]
        allowed = (row.must_be(values),) if row.must_be else row.only
        if value is not None and allowed and not any(_same(value, other) for other in allowed):
            wanted = " or ".join(_shown(other) for other in allowed)
            raise ValueError(_refused(prefix + key, value, f"must be {wanted} here ({row.why})"))
    return fields


_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
}


def _check_type(key: str, value: object, of: type) -> None:
    types, words = _TYPES.get(of, ((), ""))
    if types and type(value) not in types:
        raise ValueError(f"{key} must be {words}, not {_shown(value)}")


def _same(value: object, other: object) -> bool:
    """Equal, and not a boolean beside a number."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refused(key: str, value: object, why: str) -> str:
    return f"{key} {_shown(value)}: {why}; to run all the same, as if it were not there: {IGNORE_FLAG} {key}"


def _num_dense_layers(values: Values) -> int:
    """Leading layers with a dense feed-forward, by either spelling."""
    num_layers, first = values["num_hidden_layers"], values.get("first_k_dense_replace")
    kinds = values.get("mlp_layer_types")
    if kinds is None:
        if type(first) is not int:
            raise ValueError(f"first_k_dense_replace must be an integer, not {_shown(first)}")
        dense: int = min(first, num_layers)
        return dense
    num_dense = kinds.count("dense") if isinstance(kinds, list) else 0
    if kinds != ["dense"] * num_dense + ["sparse"] * (num_layers - num_dense):
        raise ValueError(
            f"mlp_layer_types {_shown(kinds)}: must name {num_layers} layers, dense ones before sparse ones"
        )
    if first is not None and min(first, num_layers) != num_dense:
        raise ValueError(
            f"first_k_dense_replace {first} and mlp_layer_types, with {num_dense} dense layers, differ; "
            "restore the model's own config.json"
        )
    return num_dense


def indexer_types(values: Values) -> list[str] | None:
    """full or shared per layer: from a list, a pattern, or every n-th. None: every layer is full."""
    num_layers = values["num_hidden_layers"]
    kinds = values.get("indexer_types")
    pattern = values.get("index_topk_pattern")
    if kinds is None and pattern is not None:
        if not isinstance(pattern, str | list):
            raise ValueError(f"index_topk_pattern {_shown(pattern)}: must be F or S per layer, as in FSSF")
        letters = {"F": "full", "S": "shared"}
        kinds = [letters.get(kind, kind) if isinstance(kind, str) else kind for kind in pattern]
    if kinds is None:
        freq, offset = values.get("index_topk_freq"), values.get("index_skip_topk_offset")
        freq, offset = 1 if freq is None else freq, 2 if offset is None else offset
        if type(freq) is not int or type(offset) is not int or freq < 1:
            raise ValueError(
                f"index_topk_freq {_shown(freq)}, index_skip_topk_offset {_shown(offset)}: "
                "must be integers, the first at least 1"
            )
        kinds = [
            "full" if max(layer - offset + 1, 0) % freq == 0 else "shared" for layer in range(num_layers)
        ]
    if not isinstance(kinds, list):
        raise ValueError(f"indexer_types {_shown(kinds)}: must be a list, full or shared per layer")
    return None if kinds == ["full"] * num_layers else kinds


def _rope_fields(values: Values) -> dict[str, Any]:
    """YaRN's, or those of plain rotary embeddings, by either spelling."""
    rope = _one_rope(values)
    kind = rope.get("rope_type")
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_type {_shown(kind)}: default and yarn are known")
    if kind == "default":
        fields = _understood(_PLAIN_ROPE_KEYS, rope, "rope_parameters.", "goes with rope_type yarn only")
        return fields | {"rope_factor": 1.0, "original_seq_len": values.get("max_position_embeddings") or 0}
    fields = _understood(ROPE_KEYS, rope, "rope_parameters.")
    for key in ("mscale", "mscale_all_dim", "attention_factor"):
        _check_type(f"rope_parameters.{key}", rope.get(key, 0.0), float)
    factor, mscale, of_all_dims = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    attention_factor = rope.get("attention_factor")
    if attention_factor is None and mscale and of_all_dims:
        attention_factor = yarn_temperature(factor, mscale) / yarn_temperature(factor, of_all_dims)
    elif attention_factor is None:
        attention_factor = yarn_temperature(factor, 1.0)
    return fields | {"mscale": of_all_dims or 0.0, "rope_attention_factor": attention_factor}


def yarn_temperature(factor: float, mscale: float) -> float:
    """YaRN's scale of attention for a context stretched by `factor` (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _one_rope(values: Values) -> dict[str, Any]:
    """What the spellings say, as one object with transformers 5's names, without nulls."""
    spellings = [
        _named_rope("rope_parameters", values.get("rope_parameters")),
        _named_rope("rope_scaling", values.get("rope_scaling")),
        {} if values.get("rope_theta") is None else {"rope_theta": values["rope_theta"]},
    ]
    if spellings[0] and spellings[1] and spellings[0] != (spellings[2] | spellings[1]):
        raise ValueError("rope_parameters and rope_scaling differ; restore the model's own config.json")
    rope: dict[str, Any] = {}
    for spelling in spellings:
        for key, value in spelling.items():
            if not _same(rope.setdefault(key, value), value):
                raise ValueError(
                    f"{key} is {_shown(rope[key])} in one place and {_shown(value)} in another; "
                    "restore the model's own config.json"
                )
    if set(rope) <= {"rope_theta"}:
        rope["rope_type"] = "default"
    return rope


def _named_rope(name: str, spelling: object) -> dict[str, Any]:
    if spelling is None:
        return {}
    if not isinstance(spelling, dict):
        raise ValueError(f"{name} must be an object, not {_shown(spelling)}")
    rope = {key: value for key, value in spelling.items() if value is not None}
    kind = rope.pop("type", None)
    if kind is not None and not _same(rope.setdefault("rope_type", kind), kind):
        raise ValueError(f"{name}: type {_shown(kind)} and rope_type {_shown(rope['rope_type'])} differ")
    return rope


def _dtype_fields(values: Values) -> dict[str, Any]:
    """What the weights are stored as."""
    old, new = values.get("torch_dtype"), values.get("dtype")
    if old is not None and new is not None and old != new:
        raise ValueError(f"torch_dtype {_shown(old)} and dtype {_shown(new)} differ; remove the wrong one")
    dtype = new if new is not None else old if old is not None else "bfloat16"
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"dtype {_shown(dtype)}: use one of {', '.join(_DTYPES)}")
    quantisation = values.get("quantization_config")
    if quantisation is None:
        return {"dtype": _DTYPES[dtype]}
    if not isinstance(quantisation, dict):
        raise ValueError(f"quantization_config must be an object, not {_shown(quantisation)}")
    method = quantisation.get("quant_method")
    if method != "fp8" or quantisation.get("weight_block_size") is None:
        what = _shown(method) if method != "fp8" else '"fp8" without weight_block_size'
        raise ValueError(
            f"quantization_config.quant_method {what}: weights run here as bf16, fp32, or fp8 in blocks of "
            f"{FP8_GROUP} x {FP8_GROUP}; take such a checkpoint of the model"
        )
    scale_fmt = {"scale_fmt": None} | _understood(QUANTIZATION_KEYS, quantisation, "quantization_config.")
    return {"dtype": "fp8"} | scale_fmt


def without_keys(values: Mapping[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    """`values` less the `ignored` keys, `outer.inner` for a nested one; `ValueError` where one is missing."""
    kept = dict(values)
    for name in ignored:
        if not holds_key(kept, name):
            raise ValueError(f"{IGNORE_FLAG} {name}: the config has no such key; leave the flag out")
        outer, _, inner = name.partition(".")
        if inner:
            kept[outer] = {key: value for key, value in kept[outer].items() if key != inner}
        else:
            del kept[outer]
    return kept


def holds_key(values: Mapping[str, Any], name: str) -> bool:
    """Whether a config has the key `name`, `outer.inner` for a nested one."""
    outer, _, inner = name.partition(".")
    if not inner:
        return outer in values
    return isinstance(values.get(outer), dict) and inner in values[outer]
