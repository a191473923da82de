"""How a device of a pipeline gets the weights of its stages, and gives their gradients back.

The problem. 3 dense layers, 58 MoE layers, MTP, embedding and head do not divide among 16 devices; a schedule may give
a device two stages, and DualPipe gives each stage to two devices. A layer dim that is split over `pipe` would need
padding and a permutation, which every checkpoint, export and norm would have to undo.

So storage knows nothing of stages. Every weight, its moments and its average lie in the order of the layers, and their
bytes are split over the devices of the pipeline, too (`parameters.layout_of`): all hold equally much, whatever the
placement is. Once a step an all-to-all over `pipe` gives every device its share of its own layers (`collect`), and once
a step its transpose brings the gradients back (`distribute`), summed where a layer has several copies. Five layers, two
devices, each with half of every layer; device 0 runs layers 0 to 2, device 1 layers 3 and 4, and one slot is not used:

    stored      0a 1a 2a 3a 4a  |  0b 1b 2b 3b 4b        a, b: halves of a layer
    collected   0  1  2         |  3  4  (0)             (0) is never read: one program has one shape on all devices

Along the other axes of the mesh nothing changes: what is collected lies as without a pipeline, and is quantised and
gathered as there. The price: the FP32 bytes of a device's stages cross `pipe` twice a step. For V3 on 16 stages of 128
devices these are 0.33 G parameters a device, 1.2 GB each way in a step of 20 s; ZeRO-1 over `data` would send as much.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parallel.stages import STACKS, Holding
from deepseek_jax.parameters import PARAMETERS, PIPE, leaf_name, pipe_dim
from pallas_kernels.lowering import manual_axes


def collect(params: Any, holding: Holding) -> Any:
    """Return the weights of this device's stages, [slots, ...] in each stack; all else is whole along `pipe`.

    Call it inside the step's shard_map. The result varies over `pipe`.
    """

    def stack(layers: np.ndarray, path: Any, w: jax.Array) -> jax.Array:
        dim = _split(path, w)
        if dim is None:
            return manual_axes.vary(w, frozenset((PIPE,)))[jnp.asarray(layers)[lax.axis_index(PIPE)]]
        wanted = w[layers]  # [devices, slots, ...]
        return lax.all_to_all(wanted, PIPE, split_axis=0, concat_axis=dim + 1, tiled=True)[0]

    return jax.tree_util.tree_map_with_path(
        lambda path, w: stack(holding.layers[path[0].key], path, w) if path[0].key in STACKS else whole(path, w), params
    )


def distribute(grads: Any, params: Any, holding: Holding) -> Any:
    """Sum FP32 gradients of collected weights over the devices of the pipeline, in the layout of `params`."""

    def stack(layers: np.ndarray, path: Any, g: jax.Array, w: jax.Array) -> jax.Array:
        zeros = vary(jnp.zeros(w.shape, jnp.float32), g)
        dim = _split(path, w)
        if dim is None:
            return lax.psum(zeros.at[jnp.asarray(layers)[lax.axis_index(PIPE)]].add(g), PIPE)
        parts = lax.all_to_all(g[None], PIPE, split_axis=dim + 1, concat_axis=0, tiled=True)
        return zeros.at[layers].add(parts)  # a slot that is never read has a gradient of zero

    def top(path: Any, g: jax.Array, w: jax.Array) -> jax.Array:
        dim = _split(path, w)
        return lax.psum(g, PIPE) if dim is None else lax.psum_scatter(g, PIPE, scatter_dimension=dim, tiled=True)

    return jax.tree_util.tree_map_with_path(
        lambda path, g, w: stack(holding.layers[path[0].key], path, g, w) if path[0].key in STACKS else top(path, g, w),
        grads,
        params,
    )


def whole(path: Any, w: jax.Array) -> jax.Array:
    """Return a weight whole along `pipe`."""
    dim = _split(path, w)
    if dim is None:
        return manual_axes.vary(w, frozenset((PIPE,)))
    return lax.all_gather(w, PIPE, axis=dim, tiled=True)


def whole_tree(tree: Any) -> Any:
    """Return weights whole along `pipe`: for a pass that runs all layers on every device."""
    return jax.tree_util.tree_map_with_path(whole, tree)


def _split(path: Any, w: jax.Array) -> int | None:
    """Return the dim of a stored weight that `pipe` splits; None: it lies whole on every device along it."""
    name = leaf_name(path)
    dim = pipe_dim(name)
    if dim is None or PIPE not in manual_axes.varies_over(w):
        return None
    return w.ndim - len(PARAMETERS[name].layout) + dim
