"""Weight gradients of experts in FP8 on Hopper. The kernel is in `pallas_kernels/hopper/gradient.py`."""

from jax import Array

from pallas_kernels.hopper.gradient import ACCUMULATE, multiply_groups
from pallas_kernels.hopper.main_loop import TuningConfig
from pallas_kernels.quantized import Quantized


def grouped_matmul_accumulate(
    a: Quantized, b: Quantized, group_sizes: Array, c: Array | None = None, *, config: TuningConfig = ACCUMULATE
) -> Array:
    """Return c[g] + A_g B_g^T, or A_g B_g^T without a `c`.

    `a` [m, K] and `b` [n, K] are tiles, whose columns belong to groups of `group_sizes`, multiples of 128.
    """
    return multiply_groups(config, a, b, group_sizes.shape[0], group_sizes, c)
