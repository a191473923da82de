"""Block-scaled FP8 products in plain jnp: what the kernels must compute.

Scales differ along k, so they can't leave the sum. It is cut into segments of 128, over which every scale is constant:

    D[m, n] = sum over s of  (sum over the 128 k of segment s of  A[m, k] B[n, k])  *  (scale_a[s, m] * scale_b[s, n])
                              the partial product, on the matrix unit                   added in FP32: the promotion

The report (arXiv 2412.19437, section 3.3.2) has the second reason for the cut. Hopper's matrix unit adds FP8 products
in registers that keep about 14 bits, and a sum over thousands of products loses up to two per cent there. Promotion
takes the partial product out every 128 elements, four instructions, and adds it in full FP32. A reference that
dequantised both operands and multiplied once would be shorter, and equal up to FP32 rounding; this one says in which
order a kernel must scale and add.

A partial product here is FP32 at the highest precision. Products of two E4M3 numbers are exact in FP32, so only sums
round.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import GROUP
from pallas_kernels.quantized import Quantized, decode


def matmul(a: Quantized, b: Quantized, *, out_dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Array:
    """Return a b^T [m, n]; `a` tile [m, k], `b` block [n, k]."""
    n = b.shape[0]
    b_scales = jnp.repeat(b.scales, GROUP, axis=0)[:n].T
    return _product(a.values, b.values, a.scales, b_scales).astype(out_dtype)


def matmul_accumulate(a: Quantized, b: Quantized, c: Array | None = None) -> Array:
    """Return c + a b^T, a b^T without a `c`, FP32 [m, n]; `a` tile [m, k], `b` tile [n, k]."""
    product = _product(a.values, b.values, a.scales, b.scales)
    return product if c is None else c + product


def _product(a: Array, b: Array, a_scales: Array, b_scales: Array) -> Array:
    """The sum over segments; a [m, k], b [n, k]; scales [k / 128, at least m] and [k / 128, at least n].

    The first segment starts the sum: a carry of zeros would not vary over the mesh axes that the operands vary over.
    """
    segments = (split_segments(a), split_segments(b), a_scales[:, : a.shape[0]], b_scales[:, : b.shape[0]])
    first = segment_product(*(x[0] for x in segments))
    rest = tuple(x[1:] for x in segments)
    return jax.lax.scan(lambda total, segment: (total + segment_product(*segment), None), first, rest)[0]


def split_segments(x: Array) -> Array:
    """Return [m, k] as [k / 128, m, 128]."""
    m, k = x.shape
    return x.reshape(m, k // GROUP, GROUP).swapaxes(0, 1)


def segment_product(a: Array, b: Array, a_scales: Array, b_scales: Array) -> Array:
    """Return the scaled product of one segment, FP32 [m, n]; a [m, 128], b [n, 128]; scales [m] and [n]."""
    partial = jnp.matmul(decode(a), decode(b).T, precision=jax.lax.Precision.HIGHEST)
    return partial * (a_scales[:, None] * b_scales[None, :])
