"""The golden checkpoints before anything reads them: config.json values, and random weights under the released names.

Shapes are tiny, everything else is as in the released files: layouts [out, in], fused rows, MTP layers behind the last
layer with their own copies of the embedding and the head. Imports numpy only, so the oracle (Python 3.11) and the tests
(newer) share it.
"""

import dataclasses
import math

import numpy as np

# No stored matrix is square, so that one read transposed does not fit.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 12,
    "v_head_dim": 14,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "rope_theta": 100.0,
    "rope_scaling": YARN | {"mscale_all_dim": 0.707},  # unlike mscale: their ratio stretches the rotary channels
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint: what it changes in `V3`, how its router biases are drawn, and its sequence length."""

    name: str
    seed: int
    changes: dict
    bias_range: tuple[float, float] | None = (-0.3, 0.3)
    length: int = 64


CASES = (
    Case("base", 0, {"num_hidden_layers": 3, "num_nextn_predict_layers": 2}),
    # A rope base of 100 puts the eight rotary pairs across the whole ramp between extrapolation and interpolation.
    Case("yarn", 1, {"rope_scaling": YARN, "rope_theta": 100.0, "qk_rope_head_dim": 16}, length=96),
    Case("no_query_latent", 12, {"q_lora_rank": None}),
    # Scores lie in (0, 1): every biased score is negative, and a mask of 0.0 would prefer the dropped groups.
    Case("negative_bias", 3, {}, bias_range=(-1.5, -1.1)),
    Case("v2", 4, V2, bias_range=None, length=96),
)


# Blocks of 128 x 128 along both dims, partly filled at the edge in kv_a (136 rows) and kv_b (192). Not in `CASES`: E4M3
# and BF16.
FP8 = Case(
    "fp8",
    4,
    {
        "vocab_size": 32,
        "hidden_size": 256,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 8,
        "v_head_dim": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
    length=32,
)


def draw_weights(
    config: dict, bias_range: tuple[float, float] | None, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return random float32 tensors under the released names: matrices [out, in] of unit gain, norm gains around 1."""
    tensors = {}

    def matrix(name: str, out_dim: int, in_dim: int, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = rng.normal(0.0, gain / math.sqrt(in_dim), (out_dim, in_dim)).astype(np.float32)

    def norm(name: str, dim: int) -> None:
        tensors[f"{name}.weight"] = rng.normal(1.0, 0.2, dim).astype(np.float32)

    def ffn(name: str, hidden: int) -> None:
        matrix(f"{name}.gate_proj", hidden, width)
        matrix(f"{name}.up_proj", hidden, width)
        matrix(f"{name}.down_proj", width, hidden)

    def attention(name: str) -> None:
        heads, query_dim = config["num_attention_heads"], config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        latent, query_latent = config["kv_lora_rank"], config["q_lora_rank"]
        if query_latent is None:
            matrix(f"{name}.q_proj", heads * query_dim, width, gain=1.5)
        else:
            matrix(f"{name}.q_a_proj", query_latent, width)
            norm(f"{name}.q_a_layernorm", query_latent)
            matrix(f"{name}.q_b_proj", heads * query_dim, query_latent, gain=1.5)
        matrix(f"{name}.kv_a_proj_with_mqa", latent + config["qk_rope_head_dim"], width)
        norm(f"{name}.kv_a_layernorm", latent)
        matrix(f"{name}.kv_b_proj", heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), latent)
        matrix(f"{name}.o_proj", width, heads * config["v_head_dim"])

    def layer(name: str, dense: bool) -> None:
        norm(f"{name}.input_layernorm", width)
        norm(f"{name}.post_attention_layernorm", width)
        attention(f"{name}.self_attn")
        if dense:
            ffn(f"{name}.mlp", config["intermediate_size"])
            return
        matrix(f"{name}.mlp.gate", config["n_routed_experts"], width)
        if bias_range is not None:
            tensors[f"{name}.mlp.gate.e_score_correction_bias"] = rng.uniform(
                *bias_range, config["n_routed_experts"]
            ).astype(np.float32)
        for expert in range(config["n_routed_experts"]):
            ffn(f"{name}.mlp.experts.{expert}", config["moe_intermediate_size"])
        ffn(f"{name}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])

    width, depth = config["hidden_size"], config["num_hidden_layers"]
    tensors["model.embed_tokens.weight"] = rng.normal(0.0, 1.0, (config["vocab_size"], width)).astype(np.float32)
    matrix("lm_head", config["vocab_size"], width)
    norm("model.norm", width)
    for index in range(depth):
        layer(f"model.layers.{index}", dense=index < config["first_k_dense_replace"])
    for index in range(depth, depth + config["num_nextn_predict_layers"]):
        name = f"model.layers.{index}"
        layer(name, dense=False)
        norm(f"{name}.enorm", width)
        norm(f"{name}.hnorm", width)
        norm(f"{name}.shared_head.norm", width)
        matrix(f"{name}.eh_proj", width, 2 * width)
        # repeated, as in the released files
        tensors[f"{name}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"{name}.shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors
