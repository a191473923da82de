"""Model FLOPs: what the mathematics needs; recomputation does not count.

A weight that multiplies a token costs 2 FLOPs in the forward pass and 4 in the backward pass (input and weight
gradient). So a token costs 6 per weight that it meets: attention projections, dense FFN or routed and shared experts,
router, head. An embedding lookup and norms cost none. Attention adds, per layer, head and visible position, P + R
channels of score and H channels of value. A causal token sees half the square, S / 2 positions; some papers count all
S, which is `causal=False`.

Checked against the 671B model at sequence 4096 without MTP: 219.7 GFLOP for the weights, 250.4 with causal attention,
281.2 with full attention (arXiv 2505.09343 reports 250).
"""

from deepseek_jax.config import Model
from deepseek_jax.config_bounds import attention_weights

FLOPS_PER_WEIGHT = 6  # forward 2, backward 4
FLOPS_PER_FROZEN_WEIGHT = 4  # forward 2, gradient of the input 2

# Dense BF16 peak of one JAX device in FLOP/s, from the vendors' data sheets, without structured sparsity. Keys: how
# `device_kind` begins.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # a JAX device is one of the chip's two cores
}


def flops_per_token(model: Model, sequence_length: int, causal: bool, mtp: bool, adapters: float = 0.0) -> float:
    """Return forward and backward FLOPs per token of a training step.

    Args:
        model: its shape.
        sequence_length: of the rows.
        causal: count only the positions that a token sees.
        mtp: whether MTP layers run.
        adapters: how many weights of adapters a token meets, beside weights that are frozen; 0: all are trained.
    """
    weights = _weights_of_layers(model) + model.vocab_size * model.width
    attention_layers = model.num_layers
    if mtp:
        merge, head = 2 * model.width**2, model.vocab_size * model.width
        weights += model.num_mtp_layers * (merge + attention_weights(model) + _moe_weights(model) + head)
        attention_layers += model.num_mtp_layers
    visible = sequence_length / 2 if causal else sequence_length
    products = attention_layers * model.num_heads * visible * (model.query_dim + model.value_dim)
    per_weight = FLOPS_PER_FROZEN_WEIGHT if adapters else FLOPS_PER_WEIGHT
    return float(per_weight * weights + FLOPS_PER_WEIGHT * (products + adapters))


def _weights_of_layers(model: Model) -> int:
    dense_ffn = 3 * model.width * model.dense_hidden
    return (
        model.num_layers * attention_weights(model)
        + model.num_dense_layers * dense_ffn
        + model.num_moe_layers * _moe_weights(model)
    )


def _moe_weights(model: Model) -> int:
    """Return how many weights of an MoE layer one token meets."""
    experts = model.experts_per_token + model.num_shared_experts
    return experts * 3 * model.width * model.expert_hidden + model.width * model.num_experts


def peak_flops(device_kind: str) -> float | None:
    """Return the dense BF16 peak of a device in FLOP/s, or None if it is unknown (a CPU)."""
    matches = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def model_flops_utilization(flops: float, tokens_per_second: float, peak: float) -> float:
    """Return MFU, a fraction: FLOPs per token times tokens/s, over the peak of all these devices in FLOP/s."""
    return flops * tokens_per_second / peak
