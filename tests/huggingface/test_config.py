"""config.json both ways: published files read as our configs, ours come back unchanged, and what cannot be converted is
refused.
"""

import dataclasses
import importlib
import json
import re

import pytest

from deepseek_jax.config import Config, Model, from_config_dict
from deepseek_jax.huggingface import config as hf_config
from deepseek_jax.huggingface.config_writer import TokenIds, rewrite, still_holds, write_model
from tests.support.configs import CONFIGS

IDS = TokenIds(7, 8, 9)
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2 = {key: value for key, value in V3.items() if key not in ("quantization_config", "num_nextn_predict_layers")} | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}
V2_LITE = V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def published(name: str) -> Config:
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config())


def with_yarn(model: Model, enabled: bool = True) -> Model:
    return dataclasses.replace(model, yarn=dataclasses.replace(model.yarn, enabled=enabled))


def without(hf: dict, *keys: str) -> dict:
    return {key: value for key, value in hf.items() if key not in keys}


def new_spelling(hf: dict) -> dict:
    """As transformers 5 saves it: one section for the rotary part, no keys its class does not know."""
    rope = {"rope_theta": hf["rope_theta"]} | (
        {"rope_type": "default"} if hf["rope_scaling"] is None else hf["rope_scaling"]
    )
    if "type" in rope:
        rope |= {"rope_type": rope["type"]}
    return without(hf, "rope_theta", "rope_scaling", "scoring_func", "torch_dtype") | {
        "rope_parameters": rope,
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize("spelling", [dict, new_spelling])
@pytest.mark.parametrize(("hf", "name"), [(V3, "deepseek_v3"), (V2, "deepseek_v2"), (V2_LITE, "deepseek_v2_lite")])
def test_published_files_are_our_configs(hf, name, spelling):
    """With the extension on: the released weights are those after it."""
    model = hf_config.read_model(spelling(hf))
    assert model == with_yarn(published(name).model)
    hf_config.run_config(published(name), "released", model)  # its types too


@pytest.mark.parametrize("spelling", [dict, new_spelling])
def test_a_model_of_the_architecture_by_someone_else(spelling):
    """Moonlight-16B-A3B: no query latent, one group, two shared experts, no YaRN."""
    model = hf_config.read_model(spelling(MOONLIGHT))
    expected = dataclasses.replace(
        published("deepseek_v3").model,
        vocab_size=163840,
        width=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        query_latent=0,
        dense_hidden=11264,
        num_experts=64,
        num_shared_experts=2,
        experts_per_token=6,
        expert_hidden=1408,
        num_groups=1,
        num_kept_groups=1,
        routed_scale=2.446,
        num_mtp_layers=0,
        rope_base=50000.0,
        norm_eps=1e-5,
    )
    assert model == dataclasses.replace(expected, yarn=dataclasses.replace(expected.yarn, original_length=8192))
    hf_config.run_config(published("v3_300m"), "moonlight", model)
    ours = published("moonlight_16b").model
    assert model == dataclasses.replace(ours, init_std=model.init_std)


def test_absent_and_null_keys_have_the_defaults_of_the_family():
    absent = ("topk_method", "scoring_func", "norm_topk_prob", "num_nextn_predict_layers", "moe_layer_freq")
    absent += ("rms_norm_eps", "rope_theta")
    v3 = hf_config.read_model(without(V3, *absent) | {"n_group": None, "topk_group": None, "n_shared_experts": None})
    released = with_yarn(published("deepseek_v3").model)
    assert v3 == dataclasses.replace(released, num_mtp_layers=0, num_groups=1, num_kept_groups=1, num_shared_experts=0)
    v2 = hf_config.read_model(without(V2, *absent))
    assert v2 == dataclasses.replace(with_yarn(published("deepseek_v2").model), num_groups=1, num_kept_groups=1)
    yarn = hf_config.read_model(V3 | {"rope_scaling": without(YARN, "beta_fast", "beta_slow")}).yarn
    assert yarn == dataclasses.replace(released.yarn, mscale=1.0, mscale_all_dim=0.0)


def test_both_sections_may_say_the_same():
    """As a file has it to which someone added a model card's lines in the other spelling."""
    both = new_spelling(V3) | {"rope_scaling": ROPE, "rope_theta": 10000, "index_topk": None, "use_qk_norm": False}
    assert hf_config.read_model(both) == hf_config.read_model(V3)


def test_kimi_k2_is_v3_by_another_name():
    assert hf_config.read_model(V3 | {"model_type": "kimi_k2"}) == hf_config.read_model(V3)


def test_fp8_is_recognised():
    assert hf_config.is_fp8(V3)
    assert hf_config.is_fp8({"quantization_config": FP8 | {"scale_fmt": "ue8m0"}})  # V3.1
    assert hf_config.is_fp8({"quantization_config": without(FP8, "fmt")})  # as transformers saves it
    assert not hf_config.is_fp8(without(V3, "quantization_config"))
    assert not hf_config.is_fp8({"quantization_config": None})


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read_is_the_same(name, enabled):
    """Without YaRN its factor is not written: a config.json has no word for what is not used."""
    model = with_yarn(published(name).model, enabled)
    read = model if enabled else dataclasses.replace(model, yarn=dataclasses.replace(model.yarn, factor=40.0))
    for fp8 in (True, False):
        hf = json.loads(json.dumps(write_model(model, fp8, IDS, 300)))
        assert hf_config.read_model(hf) == read
        assert hf_config.is_fp8(hf) == fp8 == ("quantization_config" in hf)
    assert hf["max_position_embeddings"] == (model.yarn.factor * model.yarn.original_length if enabled else 300)
    assert [hf[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [7, 8, 9]


@pytest.mark.parametrize(("hf", "ids"), [(V3, (0, 1)), (V2, (100000, 100001)), (V2_LITE, (100000, 100001))])
def test_written_values_are_the_published_ones(hf, ids):
    """Every key that a program reads; those that only concern training are not written."""
    written = write_model(hf_config.read_model(hf), hf_config.is_fp8(hf), TokenIds(*ids, 2), 4096)
    published_values = hf | {"bos_token_id": ids[0], "eos_token_id": ids[1], "initializer_range": 0.006}
    ignored = ("aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux")
    assert {key: written.get(key, "missing") for key in without(published_values, *ignored)} == without(
        published_values, *ignored
    )


def test_no_shared_experts_come_back():
    model = dataclasses.replace(published("tiny").model, num_shared_experts=0)
    assert hf_config.read_model(write_model(model, False, IDS, 300)) == model


def test_a_router_of_neither_family_is_not_written():
    model = dataclasses.replace(published("tiny").model, group_score="max")
    with pytest.raises(ValueError, match="gate = 'sigmoid' with group_score = 'max' .*; 'sigmoid' goes with 'top2'"):
        write_model(model, False, IDS, 300)


OWN = {"bos_token_id": 256, "eos_token_id": [257, 300], "pad_token_id": None, "auto_map": {"AutoConfig": "c.C"}}


@pytest.mark.parametrize("spelling", [dict, new_spelling])
@pytest.mark.parametrize("hf", [V2_LITE, MOONLIGHT, V3 | {"model_type": "kimi_k2"}])
def test_what_is_no_part_of_the_shape_stays_with_an_import(hf, spelling):
    """Another precision, and fewer layers: ids, auto_map, positions and the architecture's name are the import's."""
    imported = spelling(hf) | OWN | {"max_position_embeddings": 5000}
    model = dataclasses.replace(hf_config.read_model(imported), num_layers=20)
    for fp8 in (True, False):
        assert not still_holds(imported, model, fp8)
        written = json.loads(json.dumps(rewrite(imported, model, fp8, IDS, 300)))
        assert hf_config.read_model(written) == model and hf_config.is_fp8(written) == fp8
        for key in (*OWN, "max_position_embeddings", "model_type", "architectures"):
            assert written[key] == imported[key]
        assert {written.get("dtype"), written.get("torch_dtype")} == {"bfloat16", None}
        assert still_holds(written, model, fp8)
    written = rewrite(without(imported, "bos_token_id", "pad_token_id"), model, False, IDS, 300)
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (7, [257, 300], 9)


def test_a_file_that_says_another_dtype_does_not_hold():
    model = hf_config.read_model(MOONLIGHT)
    assert still_holds(MOONLIGHT, model, False) and still_holds(MOONLIGHT | {"dtype": "bfloat16"}, model, False)
    assert not still_holds(MOONLIGHT | {"torch_dtype": "float16"}, model, False)
    assert rewrite(MOONLIGHT | {"dtype": "float32"}, model, False, IDS, 300)["dtype"] == "bfloat16"


def test_run_config_replaces_the_model_and_checks_it():
    base = published("tiny")
    model = hf_config.read_model(MOONLIGHT)
    config = hf_config.run_config(base, "moonlight", model)
    assert (config.name, config.model) == ("moonlight", model)
    assert dataclasses.replace(config, name=base.name, model=base.model) == base
    with pytest.raises(ValueError, match="num_kept_groups = 4 exceeds num_groups = 2"):
        hf_config.run_config(base, "wrong", dataclasses.replace(model, num_groups=2, num_kept_groups=4))


ROPE = V3["rope_scaling"]
FORM, FP8_KEY, BOTH = "rope_scaling", "quantization_config", {"rope_type": "default", "rope_theta": 10000}
REFUSED = {
    "family": (
        {"model_type": "deepseek_v32"},
        "model_type is 'deepseek_v32': choose a checkpoint of one of",
    ),
    "architecture": ({"architectures": ["DeepseekV3ForSequenceClassification"]}, "goes with ['DeepseekV3ForCausalLM']"),
    "mixed": ({"model_type": "deepseek_v2"}, "model_type 'deepseek_v2' goes with ['DeepseekV2ForCausalLM']"),
    "attention_bias": ({"attention_bias": True}, "attention_bias is True: linear layers here have no biases"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is True: embedding and head are separate here"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu': feed-forwards here are SwiGLU; only 'silu' can be"),
    "moe_layer_freq": ({"moe_layer_freq": 2}, "moe_layer_freq is 2: here every layer after the first dense ones has"),
    "rope_interleave": ({"rope_interleave": False}, "rope_interleave is False: rotary channels here are interleaved"),
    "key_value_heads": ({"num_key_value_heads": 8}, "num_key_value_heads is 8: latent attention has as many"),
    "null": ({"hidden_size": None}, "hidden_size is None: the key is required; take the config.json that belongs to"),
    "type": ({"hidden_size": "7168"}, "hidden_size is '7168': it must be of type int"),
    "bool": ({"norm_topk_prob": 1}, "norm_topk_prob is 1: it must be of type bool"),
    "bool_as_number": ({"n_group": True}, "n_group is True: it must be of type int"),
    "topk_method": ({"topk_method": "greedy"}, "topk_method is 'greedy': deepseek_v3 selects experts by 'noaux_tc'"),
    "scoring_func": ({"scoring_func": "softmax"}, "scoring_func is 'softmax': deepseek_v3 has a sigmoid gate"),
    "rope_type": ({FORM: ROPE | {"type": "linear"}}, "rope_scaling: type is 'linear': only 'yarn', or no scaling"),
    "rope_type_absent": ({FORM: {"factor": 2.0}}, "rope_scaling: type is absent: the key is required"),
    "rope_key": (
        {FORM: ROPE | {"attention_factor": 1.5}},
        "attention_factor is 1.5: it has no counterpart",
    ),
    "rope_truncate": ({FORM: ROPE | {"truncate": False}}, "rope_scaling: truncate is False: it has no counterpart"),
    "rope_factor": ({FORM: ROPE | {"factor": None}}, "rope_scaling: factor is None: the key is required"),
    "new_rope_type": (
        {"rope_parameters": {"rope_type": "llama3"}},
        "rope_type is 'llama3': only 'yarn'",
    ),
    "quant_method": ({FP8_KEY: {"quant_method": "gptq"}}, "quant_method is 'gptq': only 'fp8' can be read"),
    "fmt": ({FP8_KEY: FP8 | {"fmt": "e5m2"}}, "quantization_config: fmt is 'e5m2': only 'e4m3' can be read"),
    "blocks": (
        {FP8_KEY: without(FP8, "weight_block_size")},
        "weight_block_size is absent: only [128, 128] can be read",
    ),
    "static": ({FP8_KEY: FP8 | {"activation_scheme": "static"}}, "activation_scheme is 'static': only 'dynamic'"),
    "scale_fmt": ({FP8_KEY: FP8 | {"scale_fmt": "e4m3"}}, "scale_fmt is 'e4m3': only 'ue8m0' or none can be read"),
    "sparse": ({"index_topk": 2048}, "index_topk is 2048: sparse attention (V3.2) has no counterpart here"),
    "clipped": ({"swiglu_limit": 10.0}, "swiglu_limit is 10.0: a clipped SwiGLU has no counterpart here"),
    "qk_norm": ({"use_qk_norm": True}, "use_qk_norm is True: norms of queries and keys has no counterpart here"),
    "two_rope_types": (
        {FORM: ROPE | {"rope_type": "default"}},
        "rope_type is 'default'; remove the one that does",
    ),
    "two_rope_sections": ({"rope_parameters": BOTH}, "rope_scaling is {'type': 'yarn'"),
    "two_bases": (
        {FORM: None, "rope_parameters": BOTH | {"rope_theta": 5e4}},
        "rope_theta is 10000: the file has the bases [10000.0, 50000.0]; remove those that do not hold",
    ),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, n_routed_experts = 256"),
    "experts": ({"n_routed_experts": 2_000_000}, "n_routed_experts = 2000000 and num_nextn_predict_layers = 1 make"),
    "mtp": ({"num_nextn_predict_layers": 10**9}, "take the config.json that belongs to the weights"),
    "infinite": ({"rope_theta": float("inf")}, "rope_theta is inf: it must be a finite number"),
    "beyond_floats": ({"rms_norm_eps": 10**400}, "it must be a finite number"),
    "escape": ({"model_type": "a\x1b[31m"}, "model_type is 'a\\x1b[31m': choose"),
    "no_section": ({FP8_KEY: "fp8"}, "quantization_config is 'fp8': it must be of type dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match="^V3/config.json: .*" + re.escape(message)):
        hf_config.read_model(V3 | changes, "V3/config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc': deepseek_v2 selects experts by 'greedy' or"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True: programs disagree whether routed_scaling_factor = 16.0"),
    ],
)
def test_refused_of_v2(changes, message):
    with pytest.raises(ValueError, match=re.escape("config.json: " + message)):
        hf_config.read_model(V2 | changes)


REQUIRED = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_required_keys(key):
    with pytest.raises(ValueError, match=f"^config.json: {key} is absent: .*(the key is required|write null)"):
        hf_config.read_model(without(V3, key))
