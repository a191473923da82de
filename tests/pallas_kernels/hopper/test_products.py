"""Products lowered for a Hopper GPU that is not there, at V3's shapes."""

import jax
import jax.numpy as jnp

from pallas_kernels import grouped, matmul
from tests.pallas_kernels.products import blocks, lower, tiles


def test_products_lower_for_cuda():
    """V3's shapes, through the public functions."""
    a, b = jax.eval_shape(lambda: (tiles(4096, 2048), blocks(7168, 2048)))
    assert "mosaic_gpu" in lower(lambda a, b: matmul.matmul(a, b, implementation="hopper"), a, b)
    few = jax.eval_shape(lambda: tiles(128, 2048))
    for out_dtype in (jnp.bfloat16, jnp.float32):  # the small tiles fill shared memory
        assert "mosaic_gpu" in lower(
            lambda a, b, d=out_dtype: matmul.matmul(a, b, out_dtype=d, implementation="hopper"), few, b
        )
    experts = jax.eval_shape(lambda: blocks(8, 7168, 2048))
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    assert "mosaic_gpu" in lower(
        lambda a, b, s: grouped.grouped_matmul(a, b, s, implementation="hopper"), a, experts, sizes
    )
    rows, weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 2048), (8, 7168, 2048)))
    assert "mosaic_gpu" in lower(
        lambda a, b, s: grouped.grouped_matmul_bf16(a, b, s, implementation="hopper"), rows, weights, sizes
    )
    c = jax.ShapeDtypeStruct((8, 2048, 2048), jnp.float32)
    operands = rows, rows, sizes, c
    assert "mosaic_gpu" in lower(
        lambda *o: grouped.grouped_matmul_accumulate_bf16(*o, implementation="hopper"), *operands
    )
    c = jax.ShapeDtypeStruct((4096, 7168), jnp.float32)
    gradient = jax.eval_shape(lambda: tiles(7168, 2048))
    assert "mosaic_gpu" in lower(
        lambda a, b, c: matmul.matmul_accumulate(a, b, c, implementation="hopper"), a, gradient, c
    )
