"""Operands of products, and how far a result may be from its reference: for the tests of kernels for Hopper."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantize import quantize_blocks, quantize_tiles

BF16_ERROR, FP32_ERROR = 2.0e-3, 1.0e-6  # relative L2; measured 1.68e-3, which is the rounding of the output, and 1e-7


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tiles(*shape, seed=0):
    return quantize_tiles(normal(*shape, seed=seed), implementation="reference")


def blocks(*shape, seed=1):
    return quantize_blocks(normal(*shape, seed=seed), implementation="reference")


def lower(function, *operands):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)
