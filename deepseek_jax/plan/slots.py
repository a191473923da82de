"""What a stage of a pipeline keeps of a micro-batch from its forward to its backward pass (`training.kept`), in bytes.

F writes it into a slot, and B, or a W in another tick than its B, takes it out: each reads and writes it once, as
kernels neither write into slots nor read out of them. Counted is what `execution.remat` keeps (`model.recompute`) that
grows with the model's widths; numbers of a token, such as routes, are left out (under 1%).
"""

from deepseek_jax.config import Config
from deepseek_jax.model.recompute import REPEATING
from deepseek_jax.parallel.mesh import AnyMesh, axis_size
from deepseek_jax.parallel.transport import most_copies
from deepseek_jax.parameters import EXPERTS
from deepseek_jax.plan.rates import TILE

COPIED = 2  # times that a pass moves what a slot keeps: read and written
BF16 = 2
# `remat` "none" keeps so many times what "selective" keeps: a MoE layer of `v3_5b`, traced: 1.7 in FP8, 2.0 in BF16
ALL = 2.0


def kept_of_layer(config: Config, mesh: AnyMesh, tokens: int, moe: bool) -> float:
    """Return the bytes that a layer keeps of a micro-batch.

    Args:
        config: its model, precision and recomputation.
        mesh: of all devices.
        tokens: of the micro-batch on a device.
        moe: whether the layer has routed experts.
    """
    model, execution = config.model, config.execution
    stream = BF16 * model.width
    if execution.remat in REPEATING:
        return float(tokens * stream)
    is_fp8 = execution.precision == "fp8"
    latents = BF16 * (model.query_latent + model.kv_latent + model.rotary_dim)
    attention = model.num_heads * model.value_dim * (1.5 if is_fp8 else BF16)  # E5M6 in FP8
    hidden = model.num_shared_experts * model.expert_hidden if moe else model.dense_hidden
    kept = tokens * (2 * stream + latents + attention + BF16 * 2 * hidden)  # before the layer, and between its halves
    if moe:
        parts, k = axis_size(mesh, EXPERTS), model.experts_per_token
        arrived = tokens * most_copies(parts, k, (model.num_groups, model.num_kept_groups))
        slots = tokens * k + model.num_experts // parts * TILE  # of experts, whatever the distribution
        kept += arrived * model.width * (1 if is_fp8 else BF16) + slots * BF16 * 2 * model.expert_hidden
    return kept * (ALL if execution.remat == "none" else 1.0)
