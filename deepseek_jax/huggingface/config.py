"""The config.json of a released checkpoint as our `Model`; `config_writer` is the way back.

Two families are read: "deepseek_v3" (V3, R1, and models of its architecture such as Moonlight and "kimi_k2") and
"deepseek_v2" (V2, V2.5, V2-Lite). A key that asks for something our model cannot do is refused, also one that these
families do not know but others do (`FOREIGN`). Keys that only concern training or serving (aux_loss_alpha, seq_aux,
ep_size, pretraining_tp, use_cache, ids of special tokens) are ignored. A missing or null key takes the value that
transformers and DeepSeek's own code give it:

                                deepseek_v3    deepseek_v2
    topk_method                 noaux_tc       greedy         with "greedy" n_group and topk_group do not apply
    scoring_func                sigmoid        softmax        transformers 5 does not write it
    norm_topk_prob              true           false
    n_group, topk_group         1              1
    num_nextn_predict_layers    0              0              the released V3 says 1; without the key there are no MTP
                                                              layers
    q_lora_rank                 none           none           only null: the key itself must be there
    n_shared_experts            none           none
    rms_norm_eps                1e-6           1e-6
    rope_theta                  10000          10000

YaRN is on if the file has it, because released weights are those after context extension. It is spelled `rope_scaling`
beside `rope_theta`; transformers 5 has both in `rope_parameters`. A file with both sections is read only if they say
the same, because programs disagree on which counts. A missing mscale is 1 and a missing mscale_all_dim 0: the cosines
are stretched and the softmax scale stays (DeepSeek's and transformers' code agree). Without YaRN `model.yarn` is off,
with the numbers of the family's extension and the file's `max_position_embeddings` as `original_length`.

A released file does not say how weights were initialised: its `initializer_range` 0.02 is transformers' default, the
report has 0.006. Files written here say it, with `initializer_range` and keys of our own that others ignore:
`residual_init_scale`, and without YaRN `yarn_original_length`.
"""

import dataclasses
from typing import Any

from deepseek_jax import config as config_lib
from deepseek_jax.huggingface.keys import Keys
from deepseek_jax.huggingface.names import num_tensors
from pallas_kernels import GROUP

FAMILIES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
ALIASES = {"kimi_k2": "deepseek_v3"}  # model_type of a family's model under another name
MOST_TENSORS = 500_000  # V3 has 46 thousand, Kimi-K2 70 thousand; a file that asks for more is damaged
DEFAULTS = {  # for keys that may be absent
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},
    "deepseek_v2": {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
}
TOPK_METHODS = {"deepseek_v3": ("noaux_tc",), "deepseek_v2": ("greedy", "group_limited_greedy")}
MSCALE = {"deepseek_v3": 1.0, "deepseek_v2": 0.707}  # for a model without YaRN, if it is ever extended
FIXED = {  # keys that may only have this value, their default, and why
    "attention_bias": (False, "linear layers here have no biases"),
    "mlp_bias": (False, "linear layers here have no biases"),
    "tie_word_embeddings": (False, "embedding and head are separate here"),
    "hidden_act": ("silu", "feed-forwards here are SwiGLU"),
    "moe_layer_freq": (1, "here every layer after the first dense ones has experts"),
    "rope_interleave": (True, "rotary channels here are interleaved pairs, as in the released files"),
}
FOREIGN = {  # keys of other models that change the mathematics; absent, null, false and 0 are harmless
    "index_topk": "sparse attention (V3.2)",
    "index_n_heads": "sparse attention (V3.2)",
    "sliding_window": "attention within a window",
    "use_qk_norm": "norms of queries and keys",
    "mla_scale_q_lora": "scaled latents (LongCat)",
    "mla_scale_kv_lora": "scaled latents (LongCat)",
    "zero_expert_num": "experts that return their input (LongCat)",
    "swiglu_limit": "a clipped SwiGLU",
    "attn_logit_softcapping": "capped attention scores",
    "final_logit_softcapping": "capped logits",
}
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [GROUP, GROUP],
    "activation_scheme": "dynamic",
}
ROPE_KEYS = {  # keys of a rope section
    *("type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim"),
}


def read_model(hf: dict[str, Any], origin: str = "config.json") -> config_lib.Model:
    """Translate a config.json.

    Args:
        hf: the parsed file.
        origin: its name, for messages.

    Raises:
        ValueError: a key is missing, or has a value that our model cannot have. The message names origin, key, value
            and remedy.
    """
    keys = Keys(hf, origin)
    family = _family(keys)
    for key, (value, reason) in FIXED.items():
        if keys.take(key, type(value), value) != value:
            keys.refuse(key, f"{reason}; only {value!r} can be converted")
    for key, what in FOREIGN.items():
        if hf.get(key):
            keys.refuse(key, f"{what} has no counterpart here; choose another checkpoint")
    heads = keys.take("num_attention_heads", int)
    if keys.take("num_key_value_heads", int, heads) != heads:
        keys.refuse("num_key_value_heads", f"latent attention has as many key and value heads as query heads, {heads}")
    if "q_lora_rank" not in hf:
        keys.refuse("q_lora_rank", "write null where queries have no latent")
    is_fp8(hf, origin)
    model = config_lib.Model(
        vocab_size=keys.take("vocab_size", int),
        width=keys.take("hidden_size", int),
        num_layers=keys.take("num_hidden_layers", int),
        num_dense_layers=keys.take("first_k_dense_replace", int),
        num_heads=heads,
        query_latent=keys.take("q_lora_rank", int, 0),
        kv_latent=keys.take("kv_lora_rank", int),
        content_dim=keys.take("qk_nope_head_dim", int),
        rotary_dim=keys.take("qk_rope_head_dim", int),
        value_dim=keys.take("v_head_dim", int),
        dense_hidden=keys.take("intermediate_size", int),
        num_shared_experts=keys.take("n_shared_experts", int, 0),
        expert_hidden=keys.take("moe_intermediate_size", int),
        num_mtp_layers=keys.take("num_nextn_predict_layers", int, 0),
        norm_eps=keys.take("rms_norm_eps", float, 1e-6),
        **_router(keys, family),
        **_rope(keys, family),
        **_init(keys),
    )
    if (count := num_tensors(model)) > MOST_TENSORS:
        raise ValueError(
            f"{origin}: num_hidden_layers = {model.num_layers}, n_routed_experts = {model.num_experts} and"
            f" num_nextn_predict_layers = {model.num_mtp_layers} make {count:,} tensors, more than {MOST_TENSORS:,};"
            " take the config.json that belongs to the weights"
        )
    return model


def is_fp8(hf: dict[str, Any], origin: str = "config.json") -> bool:
    """Return whether the weights are in FP8 with one scale per block of 128 x 128; without `quantization_config` not.

    `scale_fmt` "ue8m0" (V3.1) is the same with powers of two as scales.

    Raises:
        ValueError: the weights are quantised in another way.
    """
    section = Keys(hf, origin).take("quantization_config", dict, None)
    if section is None:
        return False
    keys = Keys(section, f"{origin}: quantization_config")
    for key, expected in QUANTIZATION.items():
        absent = expected if key in ("fmt", "activation_scheme") else None  # transformers does not write fmt
        if section.get(key, absent) != expected:
            keys.refuse(key, f"only {expected!r} can be read; convert the checkpoint to BF16 first")
    if section.get("scale_fmt") not in (None, "ue8m0"):
        keys.refuse("scale_fmt", "only 'ue8m0' or none can be read; convert the checkpoint to BF16 first")
    return True


def run_config(base: config_lib.Config, name: str, model: config_lib.Model) -> config_lib.Config:
    """Put `model` into the run that `base` describes.

    Raises:
        ValueError: `model` is impossible, or does not fit the rest of `base`.
    """
    return config_lib.from_config_dict(config_lib.to_dict(dataclasses.replace(base, name=name, model=model)))


def _family(keys: Keys) -> str:
    name = keys.take("model_type", str)
    family = ALIASES.get(name, name)
    if family not in FAMILIES:
        keys.refuse("model_type", f"choose a checkpoint of one of {sorted({*FAMILIES, *ALIASES})}")
    if keys.take("architectures", list, [FAMILIES[family]]) != [FAMILIES[family]]:
        keys.refuse("architectures", f"model_type {name!r} goes with {[FAMILIES[family]]}")
    return family


def _router(keys: Keys, family: str) -> dict[str, Any]:
    values = {key: keys.take(key, type(default), default) for key, default in DEFAULTS[family].items()}
    if values["topk_method"] not in TOPK_METHODS[family]:
        keys.refuse("topk_method", f"{family} selects experts by {' or '.join(map(repr, TOPK_METHODS[family]))}")
    if values["scoring_func"] != DEFAULTS[family]["scoring_func"]:
        keys.refuse("scoring_func", f"{family} has a {DEFAULTS[family]['scoring_func']} gate")
    grouped = values["topk_method"] != "greedy"
    scale = keys.take("routed_scaling_factor", float)
    if family == "deepseek_v2" and values["norm_topk_prob"] and scale != 1.0:
        keys.refuse(
            "norm_topk_prob", f"programs disagree whether routed_scaling_factor = {scale} then applies; set that to 1.0"
        )
    return {
        "num_experts": keys.take("n_routed_experts", int),
        "experts_per_token": keys.take("num_experts_per_tok", int),
        "num_groups": keys.take("n_group", int, 1) if grouped else 1,
        "num_kept_groups": keys.take("topk_group", int, 1) if grouped else 1,
        "gate": values["scoring_func"],
        "group_score": "top2" if family == "deepseek_v3" else "max",
        "normalize_gates": values["norm_topk_prob"],
        "routed_scale": scale,
    }


def _rope(keys: Keys, family: str) -> dict[str, Any]:
    """Return base and YaRN, from either spelling."""
    sections = [name for name in ("rope_parameters", "rope_scaling") if keys.take(name, dict, {})]
    found = [_read_section(keys, name, family) for name in sections or ["rope_scaling"]]
    if found[0][1] != found[-1][1]:
        keys.refuse("rope_scaling", "rope_parameters says something else; remove the one that does not hold")
    bases = {base for base, _ in found if base is not None}
    if (top := keys.take("rope_theta", float, None)) is not None:
        bases.add(top)
    if len(bases) > 1:
        keys.refuse("rope_theta", f"the file has the bases {sorted(bases)}; remove those that do not hold")
    return {"rope_base": next(iter(bases), 10000.0), "yarn": found[0][1]}


def _read_section(keys: Keys, name: str, family: str) -> tuple[float | None, config_lib.Yarn]:
    """Return the base, if the section has one, and YaRN."""
    section = keys.take(name, dict, {})
    rope = Keys(section, f"{keys.origin}: {name}")
    spelled = "rope_type" if "rope_type" in section else "type"
    kind = rope.take(spelled, str) if section.keys() - {"rope_theta"} else "default"
    if "type" in section and section["type"] != kind:
        rope.refuse("type", f"rope_type is {kind!r}; remove the one that does not hold")
    if kind not in ("default", "yarn"):
        rope.refuse(spelled, "only 'yarn', or no scaling, can be converted")
    for key in sorted(section.keys() - ROPE_KEYS):
        if section[key] is not None and (key, section[key]) != ("truncate", True):
            rope.refuse(key, f"it has no counterpart here; known keys are {sorted(ROPE_KEYS)}")
    return rope.take("rope_theta", float, None), _read_yarn(rope) if kind == "yarn" else _no_yarn(keys, family)


def _read_yarn(rope: Keys) -> config_lib.Yarn:
    return config_lib.Yarn(
        enabled=True,
        factor=rope.take("factor", float),
        original_length=rope.take("original_max_position_embeddings", int),
        beta_fast=rope.take("beta_fast", float, 32.0),
        beta_slow=rope.take("beta_slow", float, 1.0),
        mscale=rope.take("mscale", float, 1.0),
        mscale_all_dim=rope.take("mscale_all_dim", float, 0.0),
    )


def _no_yarn(keys: Keys, family: str) -> config_lib.Yarn:
    return config_lib.Yarn(
        enabled=False,
        factor=40.0,
        original_length=keys.take("yarn_original_length", int, keys.take("max_position_embeddings", int, 4096)),
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=MSCALE[family],
        mscale_all_dim=MSCALE[family],
    )


def _init(keys: Keys) -> dict[str, float]:
    ours = "residual_init_scale" in keys.section
    return {
        "init_std": keys.take("initializer_range", float) if ours else 0.006,
        "residual_init_scale": keys.take("residual_init_scale", float, 1.0),
    }
