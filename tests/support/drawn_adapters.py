"""Weights with adapters that are not zero, and the same merged in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.adapters import Adapted, Lora, halves, init, is_weight, mark
from deepseek_jax.parameters import PARAMETERS, Weights, leaf_name, matrix_shape, num_lead_dims

ALL = Lora(rank=3, alpha=6.0, targets=("attention", "ffn", "shared", "experts"))


def with_adapters(plain: Weights, mesh: jax.sharding.Mesh, size: float, lora: Lora = ALL) -> tuple[Weights, Weights]:
    """Return FP32 weights with adapters `size` wide, and those to which they are added in FP64."""
    marked, random = mark(lora, plain.params), np.random.default_rng(5).normal
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(init, lora.rank), marked, jax.eval_shape(lambda: jax.random.key(0)))

    def beside(path, weight):
        if not isinstance(weight, Adapted):
            return weight
        pair = functools.reduce(lambda node, entry: node[entry.key], path, shapes)
        drawn = {name: jnp.float32(size * random(size=half.shape)) for name, half in pair.items()}
        return Adapted(weight.base, drawn, weight.scale)

    def added(weight):
        if not isinstance(weight, Adapted):
            return weight
        a, b = (np.float64(weight.pair[name]) for name in sorted(weight.pair))
        return jnp.float32(weight.base + weight.scale * (a @ b).reshape(weight.base.shape))

    adapted = jax.tree.map_with_path(beside, marked, is_leaf=is_weight)
    return plain._replace(params=adapted), plain._replace(params=jax.tree.map(added, adapted, is_leaf=is_weight))


def check_gradients(adapted, grads, full) -> int:
    """Compare gradients of A and B with those of the merged weights, by the chain rule in FP64; return how many."""
    count = 0
    for path, weight in jax.tree_util.tree_leaves_with_path(adapted, is_leaf=is_weight):
        if not isinstance(weight, Adapted):
            continue
        pair, dw = (functools.reduce(lambda node, entry: node[entry.key], path, tree) for tree in (grads, full))
        a, b = (np.float64(half) for half in halves(weight))
        name, count = leaf_name(path), count + 1
        dw = np.float64(dw).reshape(matrix_shape(dw.shape, num_lead_dims(name, dw.ndim), PARAMETERS[name].input_dims))
        wanted = weight.scale * dw @ b.swapaxes(-1, -2), weight.scale * a.swapaxes(-1, -2) @ dw
        for got, want in zip(halves(dataclasses.replace(weight, pair=pair)), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=str(path))
    return count
