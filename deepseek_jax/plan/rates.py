"""Which share of a device's stated rates our programs reach: measured on our own cards.

Shares of products, memory and links are those of kernels' own records. What no kernel's record has is **set so that one
measured layer of V3 on one H200 comes out**: WHOLE, OTHER_WIDTHS, ROUTE_WIDTHS. ATTENTION is the mean of that layer's
and of a step of `v3_5b` on one H200, which is a row of the calibration, too. No constant is set by any other step.

Products. A product of A [m, k] and B [k, n] reaches a share of the peak that depends on its contraction k, as far as
the kernels' records go: the longer k, the less the start and the store of a tile weigh. Shares between two records are
interpolated in 1 / k. Beyond the longest the share is the longest's. Below the shortest a tile's start and store are
taken to last as long as between the two shortest: the time of a product of contraction k is k + k0, so 1 / share is
linear in 1 / k. The contraction of a weight's gradient is tokens of a group. The kernels of grouped products compute
whole tiles of TILE rows, and one tile more for each group that begins within one (`pallas_kernels/grouped/visits.py`).

Everything else. Attention has a share of the BF16 peak, and work that moves bytes a share of the memory's rate. The
records are of an H100 and an H200, whose arithmetic is the same. Of other devices **nothing is measured here**: they
are assumed to reach the same shares of their own rates, and a plan for them says so.
"""

import bisect
from collections.abc import Mapping

from deepseek_jax.plan.chips import Chip

FORWARD, INPUTS, WEIGHTS = "forward", "gradient of inputs", "gradient of weights"
PASSES = (FORWARD, INPUTS, WEIGHTS)

# Share of the peak by contraction. Records: experiments/results/pallas_kernels_h100_{matmul,gradients}.json (FP8) and
# ..._{grouped_matmul,gradients}_bf16.json with XLA's own BF16 product of matmul.json at 512 (1 x NVIDIA H100, 2026-11).
# tests/plan/test_rates.py holds every figure against its record.
FP8_PRODUCT = {512: 0.511, 1536: 0.662, 2048: 0.674, 4096: 0.723, 7168: 0.731, 16384: 0.739}
FP8_WEIGHTS = {2072: 0.403, 4288: 0.485, 7104: 0.496}  # tokens of a group
BF16_PRODUCT = {512: 0.758, 2048: 0.766, 7168: 0.789}
BF16_WEIGHTS = {2072: 0.668, 4288: 0.755, 7104: 0.770}

TILE = 128  # rows of a tile of the grouped kernels: pallas_kernels/hopper/main_loop.py and grouped/hopper_bf16.py

# Of the BF16 peak, forward and backward together, model FLOPs of causal attention: mean of two records of one work,
# 5.32 ms of a layer of V3 (128 heads, 4,096 tokens; experiments/results/layer/layer_h200.json) and 71.5 / 12 ms of
# `v3_5b` (16 heads, 8 x 4,096 tokens; v3_5b_h200_fp8.json), "time in attention_core".
ATTENTION = 0.370
ATTENTION_FORWARD = 0.25  # of its time: DeepSeek's profile, 4.9 of 20.0 ms (github.com/deepseek-ai/profile-data)
MEMORY = 0.787  # median over the kernels that quantise, norm and gate: pallas_kernels_h100_quantize.json
# A layer takes more than the sum of its parts: its kernels 21.93 ms (layer_h200.json, "time in kernels"), where the
# shares above and below say 20.88 (tests/plan/test_rates.py): other shapes, groups of unequal sizes, small kernels.
WHOLE = 1.05

# Bytes of a token and layer that no kernel's record has, in multiples of the model's width: the residual stream and its
# norms ("other"), and the router in FP32. From the same layer: 0.493 and 0.340 ms at 0.787 x 4.8 TB/s.
OTHER_WIDTHS = 63.5
ROUTE_WIDTHS = 43.7

# Share of a link that an exchange reaches: NCCL on two H200s, out and back 0.913 ms where 0.447 are the floor
# (experiments/results/exchange/peers_2xh200.json). Not measured between nodes: assumed the same.
NCCL = {"in": 0.49, "out": 0.49}
# DeepEP as published: 153 of 200 GB/s in a node of H800s, 46 of 50 between nodes (github.com/deepseek-ai/DeepEP).
DEEPEP = {"in": 0.765, "out": 0.92}
TORUS = {"in": 1.0, "out": 1.0}  # of a TPU: no record, the stated rate


def share_of_peak(contraction: float, table: Mapping[int, float]) -> float:
    """Return the share of the peak of a product with this contraction, interpolated in 1 / contraction."""
    known = sorted(table)
    after = bisect.bisect_left(known, contraction)
    if after == len(known):
        return table[known[-1]]
    if after == 0:
        (one, slow), (two, fast) = ((1 / k, 1 / table[k]) for k in known[:2])
        return 1 / (slow + (1 / contraction - one) * (slow - fast) / (one - two))
    low, high = known[after - 1], known[after]
    weight = (1 / contraction - 1 / high) / (1 / low - 1 / high)
    return weight * table[low] + (1 - weight) * table[high]


def product_rate(chip: Chip, precision: str, which: str, contraction: float) -> float:
    """Return the FLOP/s of a product.

    Args:
        chip: that multiplies.
        precision: "fp8" or another, which is multiplied at the rate of BF16 or, in FP32, an eighth of it: a TPU does
            six products of BF16, a Hopper card has 1/15 of the BF16 rate; plans of "fp32" are of small models.
        which: one of PASSES.
        contraction: the dim that is summed over.

    Raises:
        ValueError: the chip has no FP8 products.
    """
    if precision == "fp8" and not chip.peak_fp8:
        raise ValueError(f"{chip.name} has no FP8 products; plan with --config.execution.precision=bf16")
    if precision == "fp8":
        return chip.peak_fp8 * share_of_peak(contraction, FP8_WEIGHTS if which == WEIGHTS else FP8_PRODUCT)
    peak = chip.peak_bf16 / (8 if precision == "fp32" else 1)
    return peak * share_of_peak(contraction, BF16_WEIGHTS if which == WEIGHTS else BF16_PRODUCT)


def memory_rate(chip: Chip) -> float:
    """Return the bytes/s of work that moves bytes."""
    return MEMORY * chip.hbm


def attention_rate(chip: Chip) -> float:
    """Return the model FLOP/s of causal attention, forward and backward together."""
    return ATTENTION * chip.peak_bf16
