"""Our `Model` as a config.json, new or in place of an import's.

A new file says what programs read and nothing else. An import's own file is kept as it is while it still describes what
is exported. Where the model or the precision is another, `rewrite` puts the new shape into it, and keeps what is no
part of the shape: ids of special tokens, `auto_map`, the name of the architecture, keys that others added.

    max_position_embeddings   the positions that the model has learnt: with YaRN the length to which it extends, without
                              the run's `data.sequence_length`; an import keeps its own as long as its YaRN is the same
    torch_dtype               of what is not in FP8; exports store BF16, and the selection biases in FP32 as V3 does
"""

import copy
from typing import Any, NamedTuple

from deepseek_jax.config import Model, Yarn
from deepseek_jax.huggingface.config import ALIASES, FAMILIES, FIXED, QUANTIZATION, is_fp8, read_model

DTYPE = "bfloat16"
KEPT = {  # keys that `write_model` writes, and whose value in an import is left
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "attention_dropout"),
}
OTHER_SPELLINGS = ("rope_parameters", "quantization_config", "dtype", "yarn_original_length")


class TokenIds(NamedTuple):
    """The special tokens of the tokenizer that lies beside a config.json."""

    bos: int
    eos: int
    pad: int


def write_model(model: Model, fp8: bool, tokens: TokenIds, num_positions: int) -> dict[str, Any]:
    """Make a config.json of which `read_model` is `model`, and that transformers, vLLM and SGLang read.

    Args:
        model: the shape.
        fp8: whether the weights are stored in FP8 with scales.
        tokens: of the tokenizer.
        num_positions: the longest sequence of the training, for a model without YaRN.

    Raises:
        ValueError: neither family has the router of `model`.
    """
    family = _family(model)
    yarn = model.yarn
    hf = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.dense_hidden,
        "moe_intermediate_size": model.expert_hidden,
        "num_hidden_layers": model.num_layers,
        "num_nextn_predict_layers": model.num_mtp_layers,
        "first_k_dense_replace": model.num_dense_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "q_lora_rank": model.query_latent or None,
        "kv_lora_rank": model.kv_latent,
        "qk_nope_head_dim": model.content_dim,
        "qk_rope_head_dim": model.rotary_dim,
        "v_head_dim": model.value_dim,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.num_shared_experts or None,
        "num_experts_per_tok": model.experts_per_token,
        "n_group": model.num_groups,
        "topk_group": model.num_kept_groups,
        "topk_method": _topk_method(model, family),
        "scoring_func": model.gate,
        "norm_topk_prob": model.normalize_gates,
        "routed_scaling_factor": model.routed_scale,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_scaling": _write_yarn(yarn) if yarn.enabled else None,
        "max_position_embeddings": round(yarn.factor * yarn.original_length) if yarn.enabled else num_positions,
        "initializer_range": model.init_std,
        "residual_init_scale": model.residual_init_scale,
        "attention_dropout": 0.0,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "torch_dtype": DTYPE,
        "use_cache": True,
    }
    if not yarn.enabled and yarn.original_length != num_positions:
        hf["yarn_original_length"] = yarn.original_length
    hf |= {key: value for key, (value, _) in FIXED.items()}
    return hf | {"quantization_config": copy.deepcopy(QUANTIZATION)} if fp8 else hf


def still_holds(imported: dict[str, Any], model: Model, fp8: bool) -> bool:
    """Return whether an import's config.json describes an export of `model` as it is."""
    dtype = imported.get("dtype") or imported.get("torch_dtype") or DTYPE
    return read_model(imported) == model and is_fp8(imported) == fp8 and dtype == DTYPE


def rewrite(imported: dict[str, Any], model: Model, fp8: bool, tokens: TokenIds, num_positions: int) -> dict[str, Any]:
    """Return an import's config.json with the shape of `model`; what is no part of the shape stays.

    Args:
        imported: the parsed file.
        model: the new shape.
        fp8: whether the weights are stored in FP8 with scales.
        tokens: of the tokenizer, for ids that the import does not give.
        num_positions: as `write_model` takes it.

    Raises:
        ValueError: as `write_model` and `read_model`.
    """
    learnt = imported.get("max_position_embeddings") if read_model(imported).yarn == model.yarn else None
    hf = write_model(model, fp8, tokens, learnt or num_positions)
    if learnt:
        hf["max_position_embeddings"] = learnt
    same_family = ALIASES.get(imported["model_type"], imported["model_type"]) == hf["model_type"]
    kept = {*KEPT, "model_type", "architectures"} if same_family else KEPT
    own = {key: value for key, value in imported.items() if key not in (*hf, *OTHER_SPELLINGS) or key in kept}
    if "dtype" in imported:
        own["dtype"] = hf.pop("torch_dtype")
    return hf | own


def _family(model: Model) -> str:
    family = {("sigmoid", "top2"): "deepseek_v3", ("softmax", "max"): "deepseek_v2"}.get(
        (model.gate, model.group_score)
    )
    if family is None:
        raise ValueError(
            f"config.model: gate = {model.gate!r} with group_score = {model.group_score!r} has no config.json;"
            " 'sigmoid' goes with 'top2'"
            " (V3) and 'softmax' with 'max' (V2)"
        )
    return family


def _topk_method(model: Model, family: str) -> str:
    if family == "deepseek_v3":
        return "noaux_tc"
    return "group_limited_greedy" if model.num_groups > 1 else "greedy"


def _write_yarn(yarn: Yarn) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
