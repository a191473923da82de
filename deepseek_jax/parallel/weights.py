"""How a weight moves: quantised where it lies, gathered before its use, its gradient reduced and scattered.

FP8 weights are quantised once per optimizer step, by the devices that store them. A block of 128 x 128 may lie on
several devices, so they find its largest magnitude together, and each has the scales of the whole matrix. A layer's
gather moves E4M3 bytes, half as many as in BF16.

Derivatives do not flow through E4M3. An `Fp8Weight` has a carrier beside its values: the stored FP32 weight before the
gather, zeros after it. Its cotangent is the gradient. No program reads those zeros, so none holds them.

Weights that are multiplied in BF16 have a carrier, too, where they are differentiated (`CastWeight`). A product's sums
are in FP32 on all hardware, and the cotangent of a BF16 array would round them. So every gradient is FP32 from the
product that makes it, through the sum over micro-batches, to the reduction over devices.

A weight that was made whole has a name, `GATHERED`, by which recomputation can keep it (`model.recompute`): it is then
gathered once for both passes.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.adapters import adapt, adapters_of
from deepseek_jax.config import Execution, Model
from deepseek_jax.parallel.gradient_sums import GradientSum
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parameters import (
    EXPERTS,
    PARAMETERS,
    TOKENS,
    CastWeight,
    Fp8Weight,
    P,
    axes_of,
    layout_of,
    leaf_name,
    matrix_shape,
    num_lead_dims,
    widest_layout,
)
from pallas_kernels import GROUP
from pallas_kernels.lowering import manual_axes
from pallas_kernels.quantize import quantize_blocks
from pallas_kernels.quantized import encode, largest_magnitude, scale_of

GATHERED = "gathered_weight"  # a weight as other devices' parts made it whole


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Fp8Weight | CastWeight)


@jax.named_scope("gather")
def gather(tree: Any, dtype: jnp.dtype, num_experts: int, differentiated: bool = False) -> Any:
    """Make every weight of `tree` whole on every device that multiplies with it; call inside the step's shard_map.

    `num_experts` is the model's: it says how devices store them.

    Arrays travel in `dtype` or, if they are multiplied in FP32, in FP32; FP8 weights travel in E4M3. If they are
    `differentiated`, arrays in BF16 become `CastWeight`s. The gradient comes back by a reduce-scatter in FP32. A leaf
    that lies on every device (norm gains) becomes varying and stays FP32: its gradient is summed once, at the transpose
    of that cast.
    """

    def gather_leaf(path, w):
        name = leaf_name(path)
        split = _split_of_part(name, w.values if isinstance(w, Fp8Weight) else w, num_experts)
        # The transpose of this cast sums over the devices that store the same part.
        w = manual_axes.vary(w, frozenset(TOKENS))
        if split is None:
            return w
        dim, axes = split
        if isinstance(w, Fp8Weight):
            moved = _gather_bytes(w.values, axes, dim)
            if differentiated and w.carrier is None:  # frozen: nobody reads this gradient, and it is not made
                return Fp8Weight(vary(jnp.zeros(moved.shape, jnp.float32), moved), moved, w.scales)
            carrier = None if w.carrier is None else _carry(w.carrier, axes, dim)
            return Fp8Weight(carrier, moved, w.scales)
        own = jnp.float32 if PARAMETERS[name].precision == "fp32" else dtype
        if differentiated and own != jnp.float32:
            values = _all_gather(lax.stop_gradient(w).astype(own), axes, dim)
            return CastWeight(_carry(w, axes, dim), _named(values, axes))
        return _named(_gather_split(w, axes, dim, own), axes)

    return jax.tree_util.tree_map_with_path(gather_leaf, tree, is_leaf=_is_weight)


def reduce_gradients(tree: Any, num_experts: int) -> Any:
    """Sum whole gradients over devices; each device keeps its part of the layout.

    This is the transpose of `gather` as a call of its own.
    """

    def reduce_leaf(path, g):
        name = leaf_name(path)
        if (split := _split_of_whole(name, g, num_experts)) is None:
            return lax.psum(g, TOKENS)
        dim, axes = split
        apart = EXPERTS if PARAMETERS[name].per_expert else ()
        same = tuple(axis for axis in TOKENS if axis not in (*axes, *apart))  # devices that store the same part
        g = _scatter_sum(g, axes, dim)
        return lax.psum(g, same) if same else g

    return jax.tree_util.tree_map_with_path(reduce_leaf, tree)


def quantize_weights(params: Any, num_experts: int) -> Any:
    """Quantise the stored FP32 weights that are multiplied in FP8; call inside the step's shard_map.

    Args:
        params: this device's part of the parameters.
        num_experts: of the model.

    Returns:
        a tree of the same shape: (values, scales) of an `Fp8Weight` for these weights, None for the others.
    """

    def quantize_leaf(path, w):
        name = leaf_name(path)
        if PARAMETERS[name].precision != "fp8" or _is_weight(w):
            return None
        with jax.named_scope("quantize_weights"):
            split = _split_of_part(name, w, num_experts)
            assert split is not None, name  # every matrix is split
            return _quantize(name, w, *split)

    return jax.tree_util.tree_map_with_path(quantize_leaf, params, is_leaf=_is_weight)


def with_fp8(model: Model, execution: Execution, params: Any) -> Any:
    """Return this device's part of the weights, quantised if the precision is FP8 and they are not yet."""
    return attach(params, quantize_weights(params, model.num_experts)) if execution.precision == "fp8" else params


def attach(tree: Any, quantized: Any) -> Any:
    """Make each weight of `tree` a carrier: of an `Fp8Weight` if it has (values, scales) in `quantized`, of a
    `CastWeight` if it has (values,); None leaves it as it is. A leaf may be a `GradientSum`.
    """

    def attach_leaf(w, q):
        if q is None:
            return w
        return Fp8Weight(w, *q) if len(q) == 2 else CastWeight(w, *q)

    return jax.tree.map(
        attach_leaf, tree, quantized, is_leaf=lambda leaf: _is_weight(leaf) or isinstance(leaf, GradientSum)
    )


def detach(tree: Any) -> tuple[Any, Any]:
    """Undo `attach`: return what is differentiated (carriers and other weights), and what is not."""

    def numbers(w):
        if isinstance(w, Fp8Weight):
            return w.values, w.scales
        return (w.values,) if isinstance(w, CastWeight) else None

    carriers = jax.tree.map(lambda w: w.carrier if _is_weight(w) else w, tree, is_leaf=_is_weight)
    return carriers, jax.tree.map(numbers, tree, is_leaf=_is_weight)


def differentiated(tree: Any, adapters: bool) -> tuple[Any, Callable[[Any], Any]]:
    """Return what is differentiated of weights, all of them or their adapters, and what makes the weights of it."""
    if adapters:
        return adapters_of(tree), functools.partial(adapt, tree)
    params, numbers = detach(tree)
    return params, lambda params: attach(params, numbers)


def in_fp32(weight: jax.Array | CastWeight) -> jax.Array:
    """Return a weight as an array that can be differentiated: a `CastWeight` as FP32 with the numbers of its BF16.

    Where it is cast to BF16 next, XLA leaves out both casts.
    """
    return _in_fp32(weight.carrier, weight.values) if isinstance(weight, CastWeight) else weight


def _quantize(name: str, w: jax.Array, dim: int, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Return E4M3 values of `w`, whose `dim` is split over `axes`, and the scales of all whole matrices."""
    num_lead, input_dims = num_lead_dims(name, w.ndim), PARAMETERS[name].input_dims
    matrix = w.reshape(matrix_shape(w.shape, num_lead, input_dims))
    split = dim if dim < num_lead else num_lead + (dim - num_lead >= input_dims)  # the dim of `matrix`
    if lax.axis_size(axes) > 1 and split >= num_lead and matrix.shape[split] % GROUP:
        values, scales = _quantize_shared(matrix, axes, split)
        return values.reshape(w.shape), scales
    stacked = quantize_blocks(matrix.reshape(-1, *matrix.shape[-2:]))
    scales = stacked.scales.reshape(*matrix.shape[:-2], *stacked.scales.shape[-2:])
    return stacked.values.reshape(w.shape), _all_gather(scales, axes, split)


def _quantize_shared(matrix: jax.Array, axes: tuple[str, ...], split: int) -> tuple[jax.Array, jax.Array]:
    """Quantise matrices of which a block of 128 x 128 may lie on several devices.

    Args:
        matrix: [..., rows, columns], this device's part.
        axes: mesh axes that split it.
        split: the dim that is split, rows or columns.
    """
    rows = jnp.moveaxis(matrix, split, 0)  # the split dim first, the other last
    blocks_of_rows = (lax.axis_index(axes) * rows.shape[0] + jnp.arange(rows.shape[0])) // GROUP
    whole = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % GROUP)])
    largest = largest_magnitude(whole.reshape(*whole.shape[:-1], -1, GROUP), axis=-1)
    num_blocks = -(-rows.shape[0] * lax.axis_size(axes) // GROUP)
    # As integers, whose order is that of the magnitudes: a maximum of floats may lose a NaN.
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    bits = vary(jnp.zeros((num_blocks, *largest.shape[1:]), jnp.int32), bits).at[blocks_of_rows].max(bits)
    scales = scale_of(lax.bitcast_convert_type(lax.pmax(bits, axes), jnp.float32), "fp32")
    columns = jnp.repeat(scales[blocks_of_rows], GROUP, axis=-1)[..., : rows.shape[-1]]
    return jnp.moveaxis(encode(rows, columns), 0, split), jnp.moveaxis(scales, 0, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_split(w: jax.Array, axes: tuple[str, ...], dim: int, dtype: jnp.dtype) -> jax.Array:
    return _all_gather(w.astype(dtype), axes, dim)


def _gather_split_forward(w, axes, dim, dtype):
    return _gather_split(w, axes, dim, dtype), None


def _gather_split_backward(axes, dim, dtype, _, g):
    return (_scatter_sum(g, axes, dim),)


_gather_split.defvjp(_gather_split_forward, _gather_split_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _carry(w: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Return zeros of the shape of the whole `w`; the derivative is that of gathering `w`."""
    shape = list(w.shape)
    shape[dim] *= lax.axis_size(axes)
    return vary(jnp.zeros(shape, jnp.float32), w)


_carry.defvjp(lambda w, axes, dim: (_carry(w, axes, dim), None), lambda axes, dim, _, g: (_scatter_sum(g, axes, dim),))


@jax.custom_vjp
def _in_fp32(carrier: jax.Array, values: jax.Array) -> jax.Array:
    return values.astype(jnp.float32)


_in_fp32.defvjp(lambda carrier, values: (_in_fp32(carrier, values), None), lambda _, g: (g, None))


def _gather_bytes(values: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Gather E4M3 as bytes: not every backend's collectives know the type, and bytes are kept as they are."""
    whole = _all_gather(lax.bitcast_convert_type(values, jnp.uint8), axes, dim)
    return lax.bitcast_convert_type(_named(whole, axes), values.dtype)


def _named(whole: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return a gathered weight under the name by which it can be kept; one device has its own part already."""
    return whole if lax.axis_size(axes) == 1 else checkpoint_name(whole, GATHERED)


def _all_gather(w: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    whole = lax.axis_size(axes) == 1  # a collective over one device is a copy to XLA:CPU
    return w if whole else lax.all_gather(w, axes, axis=dim, tiled=True)


def _scatter_sum(g: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    g = g.astype(jnp.float32)
    return g if lax.axis_size(axes) == 1 else lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)


def _split_of_part(name: str, part: jax.Array, num_experts: int) -> tuple[int, tuple[str, ...]] | None:
    """Return (dim, axes) of the dim of a leaf that is split for storage only, None if the table splits none.

    A part varies over just the axes that split it. Axes of `EXPERTS` never gather experts.
    """
    return _storage(name, widest_layout(name, part.ndim, num_experts), manual_axes.varies_over(part))


def _split_of_whole(name: str, whole: jax.Array, num_experts: int) -> tuple[int, tuple[str, ...]] | None:
    """Return what `_split_of_part` returns of the parts of a whole leaf."""
    layout = layout_of(name, whole.shape, num_experts)
    return _storage(name, widest_layout(name, whole.ndim, num_experts), {a for entry in layout for a in axes_of(entry)})


def _storage(name: str, layout: P, split_over: Collection[str]) -> tuple[int, tuple[str, ...]] | None:
    kept = EXPERTS if PARAMETERS[name].per_expert else ()
    for dim, entry in enumerate(layout):
        if axes := tuple(axis for axis in axes_of(entry) if axis not in kept):
            return dim, tuple(axis for axis in axes if axis in split_over)
    return None
