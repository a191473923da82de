"""Weights drawn in NumPy: the random numbers of `transformer.init` compile longer than most tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Model
from deepseek_jax.model import transformer
from deepseek_jax.parameters import Weights


def drawn_weights(model: Model) -> Weights:
    """Return FP32 weights in the shapes of `init`: gains near 1, other parameters 0.3 wide, biases of both signs.

    They are arrays of the mesh that is set, so only the numbers are kept for the next caller.
    """
    return jax.tree.map(jnp.array, _numbers(model))


@functools.cache
def _numbers(model: Model) -> Weights:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(transformer.init, model), jax.eval_shape(lambda: jax.random.key(0)))
    params, router_bias = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    params = jax.tree.map_with_path(lambda path, leaf: 1 + 0.1 * leaf if "norm" in path[-1].key else 0.3 * leaf, params)
    return Weights(params, jax.tree.map(lambda leaf: 0.05 * leaf, router_bias))
