"""The shapes that tests, benchmarks and tuning share, and DeepGEMM's speed on those it was measured on.

Cards differ and slow down under load, so a speed of another day says little: what carries over is its ratio to
something that runs on the same card a moment earlier or later. A `DeepGemm` holds both numbers of its day, on an H200:
its own, and XLA's.

    this card, now       ours / XLA's FP8 product       = 1390 / 1500 = 0.927
    that card, then      DeepGEMM / XLA's FP8 product   = 1454 / 1545 = 0.941       so ours is at 0.985 of DeepGEMM
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pallas_kernels import GROUP

SPREAD = 0.7, 1.3  # of group sizes about their mean, as DeepGEMM's benchmark draws them
FEW_ROWS = 64  # per expert: below, reading the weights takes longer than multiplying


class Dense(NamedTuple):
    """D[m, n] = sum over k of A[m, k] B[n, k]."""

    m: int
    n: int
    k: int

    unit = "TFLOP/s"

    @property
    def flops(self) -> int:
        """Floating-point operations, two per multiplication."""
        return 2 * self.m * self.n * self.k


class Linear(NamedTuple):
    """A linear layer with its two gradients: y[m, n], dx[m, k], dw[n, k]."""

    m: int
    n: int
    k: int

    unit = "TFLOP/s"

    @property
    def flops(self) -> int:
        """Floating-point operations of the three products."""
        return 6 * self.m * self.n * self.k


class Grouped(NamedTuple):
    """Products of `groups` matrices [n, k] with consecutive rows, `rows` each on average."""

    groups: int
    rows: int
    n: int
    k: int

    unit = "TFLOP/s"

    @property
    def flops(self) -> int:
        """Floating-point operations over all rows."""
        return 2 * self.groups * self.rows * self.n * self.k

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each group, int32 [groups], multiples of 128."""
        return group_sizes(self.groups * self.rows, self.groups)


class Gradients(NamedTuple):
    """Weight gradients [m, n] of `groups` experts; the sum runs over each one's share of `rows`."""

    groups: int
    rows: int
    m: int
    n: int

    unit = "TFLOP/s"

    @property
    def flops(self) -> int:
        """Floating-point operations over all rows."""
        return 2 * self.rows * self.m * self.n

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each group, int32 [groups], multiples of 128."""
        return group_sizes(self.rows, self.groups)


class Masked(NamedTuple):
    """Products of `experts` matrices [n, k] with `rows` rows on average, of the `room` that each has."""

    experts: int
    rows: int
    n: int
    k: int
    room: int = 4096  # as in DeepGEMM's benchmark

    @property
    def unit(self) -> str:
        """What binds: arithmetic, or reading the weights."""
        return "TFLOP/s" if self.rows > FEW_ROWS else "GB/s"

    @property
    def sizes(self) -> np.ndarray:
        """Valid rows of each expert, int32 [experts]."""
        return (self.rows * np.random.default_rng(self.experts).uniform(*SPREAD, self.experts)).astype(np.int32)

    @property
    def flops(self) -> int:
        """Floating-point operations over the valid rows."""
        return 2 * int(self.sizes.sum()) * self.n * self.k

    @property
    def bytes(self) -> int:
        """Bytes that must move: weights, valid rows in FP8 and out in BF16, scales."""
        scale_bytes, out_bytes = 4, 2
        segments = self.k // GROUP
        weights = self.experts * (self.n * self.k + scale_bytes * -(-self.n // GROUP) * segments)
        return weights + int(self.sizes.sum()) * (self.k + scale_bytes * segments + out_bytes * self.n)


class Rows(NamedTuple):
    """What quantisers and producers read or write once: m rows of k."""

    m: int
    k: int

    unit = "GB/s"


class Weights(NamedTuple):
    """Matrices [n, k] that are quantised in blocks; one matrix has no leading dim."""

    groups: int
    n: int
    k: int

    unit = "GB/s"


Shape = Dense | Linear | Grouped | Gradients | Masked | Rows | Weights


class DeepGemm(NamedTuple):
    """DeepGEMM on an H200, and what stood beside it in the same run, both in the unit of the shape."""

    value: float
    yardstick: float  # XLA's per-tensor FP8 product; a device copy for GB/s

    @property
    def ratio(self) -> float:
        """The number that carries over to another card."""
        return self.value / self.yardstick


def group_sizes(rows: int, groups: int, multiple: int = GROUP) -> np.ndarray:
    """Return int32 [groups] with sum `rows`, multiples of `multiple`, the same at every call.

    They are drawn within 0.7 to 1.3 of their mean and rounded.

    Raises:
        ValueError: `rows` is not a multiple of `multiple`.
    """
    if rows % multiple:
        raise ValueError(f"{rows} rows cannot be cut into groups of multiples of {multiple}")
    ends = np.random.default_rng(groups).uniform(*SPREAD, groups).cumsum()
    return np.diff(np.rint(ends / ends[-1] * (rows // multiple)) * multiple, prepend=0).astype(np.int32)


def draw_dense(seed: int, count: int = 20) -> list[Dense]:
    """Return dense shapes that nobody tuned for.

    m is odd, from 65 to 8,191; n and k lie in V3's ranges, as often small as large.
    """
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int, multiple: int) -> int:
        return multiple * int(np.exp(rng.uniform(np.log(low), np.log(high))) / multiple)

    return [Dense(draw(64, 8192, 2) + 1, draw(512, 32768, 64), draw(512, 16384, GROUP)) for _ in range(count)]


# The row that stands for XLA's dense rate where a shape has no dense counterpart: the experts' first product.
XLA_DENSE = Dense(4096, 4096, 7168)
_XLA_FP8 = 1545.0  # TFLOP/s of XLA_DENSE, in DeepGEMM's run
_COPY = 4300.0  # GB/s of a large device copy, reads and writes, in DeepGEMM's run

DENSE: Mapping[Dense, DeepGemm] = {
    XLA_DENSE: DeepGemm(1454, _XLA_FP8),  # an expert's gate and up
    Dense(4096, 7168, 2048): DeepGemm(1326, 1558),  # an expert's down
    Dense(4096, 24576, 1536): DeepGemm(1344, 1545),  # queries from their latent
    Dense(4096, 32768, 512): DeepGemm(1067, 1234),  # keys and values from theirs
    Dense(4096, 7168, 16384): DeepGemm(1488, 1585),  # the attention's output
    Dense(8192, 7168, 4096): DeepGemm(1440, 1586),
    Dense(128, 7168, 2048): DeepGemm(413, 419),
}

# m is the layer's output, n its input, k the tokens. DeepGEMM's figures are for groups.
DENSE_GRADIENTS: Mapping[Dense, None] = dict.fromkeys(
    [Dense(4096, 7168, 4096), Dense(7168, 2048, 4096), Dense(24576, 1536, 4096), Dense(7168, 16384, 4096)]
)
# Layers of `configs/v3_5b.py` with 32,768 tokens on a GPU: fewer tiles than multiprocessors, or a few more.
FEW_TILES: Mapping[Dense, None] = dict.fromkeys(
    Dense(m, n, 32768) for m, n in [(2048, 640), (1536, 3072), (2048, 2048), (2048, 1536), (1024, 2048), (512, 4096)]
)

GROUPED: Mapping[Grouped, DeepGemm] = {
    Grouped(4, 8192, 4096, 7168): DeepGemm(1432, _XLA_FP8),
    Grouped(4, 8192, 7168, 2048): DeepGemm(1361, _XLA_FP8),
    Grouped(8, 4096, 4096, 7168): DeepGemm(1432, _XLA_FP8),
    Grouped(8, 4096, 7168, 2048): DeepGemm(1361, _XLA_FP8),
}

GRADIENTS: Mapping[Gradients, DeepGemm] = {
    Gradients(4, 28416, 4096, 7168): DeepGemm(1014, _XLA_FP8),
    Gradients(4, 31744, 7168, 2048): DeepGemm(990, _XLA_FP8),
    Gradients(8, 34304, 4096, 7168): DeepGemm(974, _XLA_FP8),
    Gradients(8, 30208, 7168, 2048): DeepGemm(935, _XLA_FP8),
    Gradients(16, 33152, 4096, 7168): DeepGemm(866, _XLA_FP8),
    Gradients(16, 34304, 7168, 2048): DeepGemm(876, _XLA_FP8),
}

MASKED: Mapping[Masked, DeepGemm] = {
    Masked(32, 192, 6144, 7168): DeepGemm(994, _XLA_FP8),
    Masked(32, 192, 4096, 2048): DeepGemm(834, _XLA_FP8),
    Masked(6, 1024, 6144, 7168): DeepGemm(1338, _XLA_FP8),
    Masked(6, 1024, 4096, 2048): DeepGemm(1164, _XLA_FP8),
    Masked(32, 20, 6144, 7168): DeepGemm(3992, _COPY),
    Masked(32, 20, 4096, 2048): DeepGemm(3532, _COPY),
    Masked(6, 20, 6144, 7168): DeepGemm(3538, _COPY),
    Masked(6, 20, 4096, 2048): DeepGemm(2449, _COPY),
}

LINEAR: Mapping[Linear, None] = dict.fromkeys([Linear(8192, 7168, 4096)])

# Large enough that an L2 cache of 50 MB does not hold them, with the widths of V3: model, query latent, expert, dense
# FFN, heads.
MODEL_ROWS: Mapping[Rows, None] = dict.fromkeys([Rows(16384, 7168), Rows(4096, 7168), Rows(16384, 2048)])
NORM_ROWS: Mapping[Rows, None] = dict.fromkeys([Rows(16384, 7168), Rows(4096, 7168), Rows(32768, 1536)])
FFN_ROWS: Mapping[Rows, None] = dict.fromkeys([Rows(32768, 2048), Rows(4096, 18432)])
ATTENTION_ROWS: Mapping[Rows, None] = dict.fromkeys([Rows(8192, 16384), Rows(4096, 16384)])
WEIGHTS: Mapping[Weights, None] = dict.fromkeys(
    [Weights(1, 7168, 16384), Weights(8, 4096, 7168), Weights(8, 7168, 2048)]
)
