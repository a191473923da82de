"""Weight gradients of dense layers in FP8 on Hopper. The kernel is in `pallas_kernels/hopper/gradient.py`."""

from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import GROUP
from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.hopper.gradient import ACCUMULATE, multiply_groups
from pallas_kernels.hopper.main_loop import TuningConfig
from pallas_kernels.quantized import Quantized

PER_TILE, PER_STEP = 3.0, 1.15  # us of a tile on H100 and H200, and of 128 along k in it
SUM_LAUNCH, SUM_RATE = 4.0, 3.5e6  # of adding parts: us, and bytes/us of reading them and writing their sum
MOST_PARTS = 16  # FP32 results [m, n] that exist at the same time


def plan_parts(config: TuningConfig, m: int, n: int, num_steps: int) -> int:
    """Return into how many parts to cut the steps of a dense gradient [m, n], for the shortest time by this model:

        rounds = ceil(tiles * parts / multiprocessors)
        time   = rounds * (PER_TILE + ceil(num_steps / parts) * PER_STEP)
                 + SUM_LAUNCH + (parts + 1) * 4 m n / SUM_RATE        where there is more than one part

    With 256 steps on 132 multiprocessors (us by the model; measured on an H200, in one part: 305 to 308, and 541 for
    144 tiles):

        (m, n)          tiles    one part    parts    time
        (2048, 640)        48         297        8     137
        (512, 4096)        64         297        2     161
        (2048, 1536)       96         297        4     252
        (2048, 2048)      128         297        1     297
        (1536, 3072)      144         595        6     409

    Tiles of 128 x 128 take 1.11 times as long for the same work. By this model they would win at (2048, 640) alone:
    123, in 3 parts.
    """
    tiles = pl.cdiv(m, config.tile_m) * pl.cdiv(n, config.tile_n)

    def time(parts):
        rounds = pl.cdiv(tiles * parts, num_multiprocessors())
        add_parts = SUM_LAUNCH + (parts + 1) * 4 * m * n / SUM_RATE if parts > 1 else 0
        return rounds * (PER_TILE + pl.cdiv(num_steps, parts) * PER_STEP) + add_parts

    return min(range(1, min(num_steps, MOST_PARTS) + 1), key=time)


def matmul_accumulate(
    a: Quantized,
    b: Quantized,
    c: Array | None = None,
    *,
    config: TuningConfig = ACCUMULATE,
    parts: int | None = None,
) -> Array:
    """Return c + A B^T for tiles `a` [m, k], `b` [n, k] and FP32 `c` [m, n], or A B^T without a `c`.

    k is summed in `parts`.
    """
    parts = parts or plan_parts(config, a.shape[0], b.shape[0], a.shape[1] // GROUP)
    if parts == 1:
        return multiply_groups(config, a, b, 1, None, None if c is None else c[None])[0]
    total = multiply_groups(config, a, b, parts, None, None).sum(0)
    return total if c is None else c + total
