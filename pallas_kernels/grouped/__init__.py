"""Products of consecutive groups of rows, one matrix per group: the experts of a mixture, in FP8 and in BF16.

Group sizes are int32 arrays of the device, and no shape depends on them. Inside jit they are not read; a call outside
jit, where they are numbers, also checks them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import GROUP, dispatch
from pallas_kernels.grouped import hopper, hopper_bf16, hopper_bf16_gradient, hopper_gradient, reference, tpu, tpu_bf16
from pallas_kernels.matmul import check_accumulator, check_inner, check_out_dtype
from pallas_kernels.quantized import Quantized, check_array, check_quantized


def grouped_matmul(
    a: Quantized,
    b: Quantized,
    group_sizes: Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str = "auto",
) -> Array:
    """Return a_g b_g^T for the rows of each group g: the experts' forward products and input gradients.

    Each 128 of the sum over k is promoted, as in `matmul`.

    Args:
        a: tile [rows, k]. The rows of group 0 come first, then those of group 1, and so on.
        b: block [G, n, k], scales [G, ceil(n / 128), k / 128].
        group_sizes: int32 [G], rows of each group: any sizes, none included, with a sum of at most `rows`.
        out_dtype: BF16 or FP32.
        implementation: "auto", "reference", "hopper" or "tpu".

    Returns:
        [rows, n] of `out_dtype`. Rows of no group, after the last, are zero whatever `a` holds there, NaN included.

    Raises:
        ValueError: an operand's grouping, dtype or layout, two different k or G, sizes that do not fit, or `out_dtype`.
        NotImplementedError: there is no such kernel here.
    """
    check_quantized("a", a, "tile", num_dims=2)
    check_quantized("b", b, "block", num_dims=3)
    check_inner("a", a.shape, "b", b.shape)
    check_group_sizes("group_sizes", group_sizes, b.shape[0], a.shape[0])
    check_out_dtype(out_dtype)
    faces = {"reference": reference.grouped_matmul, "hopper": hopper.grouped_matmul, "tpu": tpu.grouped_matmul}
    return dispatch.choose("grouped_matmul", implementation, faces)(a, b, group_sizes, out_dtype=out_dtype)


def masked_matmul(
    a: Quantized,
    b: Quantized,
    valid_rows: Array,
    *,
    expected_rows: int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str = "auto",
) -> Array:
    """Return a_e b_e^T for the first rows of each expert e.

    This is for decoding, where an expert has room for r rows and receives few.

    Args:
        a: tile [E, r, k], scales [E, k / 128, pad4(r)].
        b: block [E, n, k].
        valid_rows: int32 [E], at most r each.
        expected_rows: about how many valid rows an expert has, r unless given: a kernel chooses its tiles by it. Any
            number is right.
        out_dtype: BF16 or FP32.
        implementation: "auto", "reference", "hopper" or "tpu".

    Returns:
        [E, r, n] of `out_dtype`. Rows from `valid_rows[e]` on are unspecified: a kernel does not write them.

    Raises:
        ValueError: an operand's grouping, dtype or layout, two different k or E, more valid rows than r,
            `expected_rows` below 1, or `out_dtype`.
        NotImplementedError: there is no such kernel here.
    """
    check_quantized("a", a, "tile", num_dims=3)
    check_quantized("b", b, "block", num_dims=3)
    check_inner("a", a.shape, "b", b.shape)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}: the first dims, the experts, must be equal")
    check_group_sizes("valid_rows", valid_rows, b.shape[0], a.shape[0] * a.shape[1], largest=a.shape[1])
    check_out_dtype(out_dtype)
    if expected_rows is not None and expected_rows < 1:
        raise ValueError(
            f"expected_rows is {expected_rows}: give the valid rows of an average expert, at least 1, or None"
        )
    faces = {
        "reference": reference.masked_matmul,
        "hopper": functools.partial(hopper.masked_matmul, expected_rows=expected_rows),
        "tpu": tpu.masked_matmul,
    }
    return dispatch.choose("masked_matmul", implementation, faces)(a, b, valid_rows, out_dtype=out_dtype)


def grouped_matmul_accumulate(
    a: Quantized, b: Quantized, group_sizes: Array, c: Array | None = None, *, implementation: str = "auto"
) -> Array:
    """Return c[g] + a_g b_g^T, promoted every 128: the experts' weight gradients, with the rows of all experts along K.

    Args:
        a: tile [m, K]. Columns of group 0 come first, then those of group 1, and so on.
        b: tile [n, K].
        group_sizes: int32 [G], columns of each group: multiples of 128, none included, with a sum of at most K.
        c: FP32 [G, m, n], what is added to; in shard_map it varies over the mesh axes that a and b vary over. A kernel
            writes the sum in its place where the caller donates it. None is zero, for the first gradient of a step: on
            a GPU no zeros are made or read.
        implementation: "auto", "reference", "hopper" or "tpu".

    Returns:
        FP32 [G, m, n]; c[g] itself, or zeros, where group g is empty. Columns of no group never leak, NaN included.

    Raises:
        ValueError: an operand's grouping, dtype or layout, two different K, sizes that do not fit or are no multiples
            of 128 (pad each group with zeros), or c of another shape or dtype.
        NotImplementedError: there is no such kernel here.
    """
    check_quantized("a", a, "tile", num_dims=2)
    check_quantized("b", b, "tile", num_dims=2)
    check_inner("a", a.shape, "b", b.shape)
    num_groups = _check_accumulators(c, group_sizes, a.shape[0], b.shape[0])
    check_group_sizes("group_sizes", group_sizes, num_groups, a.shape[1], multiple=GROUP)
    faces = {
        "reference": reference.grouped_matmul_accumulate,
        "hopper": hopper_gradient.grouped_matmul_accumulate,
        "tpu": tpu.grouped_matmul_accumulate,
    }
    return dispatch.choose("grouped_matmul_accumulate", implementation, faces)(a, b, group_sizes, c)


def grouped_matmul_bf16(
    a: Array,
    b: Array,
    group_sizes: Array,
    *,
    transpose_b: bool = False,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str = "auto",
) -> Array:
    """Return a_g b_g^T for the rows of each group g, in BF16 with FP32 accumulation: `grouped_matmul` without FP8.

    Args:
        a: BF16 [rows, k], rows of a group contiguous, group 0 first; any k.
        b: BF16 [G, n, k], or [G, k, n] with `transpose_b`: the input gradient takes the forward's weights as they are
            stored.
        group_sizes: int32 [G], any sizes with a sum of at most `rows`.
        transpose_b: whether k is the middle dim of `b`.
        out_dtype: BF16 or FP32.
        implementation: "auto", "reference", "hopper" or "tpu".

    Returns:
        [rows, n] of `out_dtype`. Rows of no group are zero whatever `a` holds there, NaN included.

    Raises:
        ValueError: shapes or dtypes that do not fit, sizes that do not fit, or `out_dtype`.
        NotImplementedError: there is no such kernel here.
    """
    _check_bf16("a", a, num_dims=2)
    _check_bf16("b", b, num_dims=3)
    inner = (b.shape[0], b.shape[2], b.shape[1]) if transpose_b else b.shape
    check_inner("a", a.shape, "b^T" if transpose_b else "b", inner)
    check_group_sizes("group_sizes", group_sizes, b.shape[0], a.shape[0])
    check_out_dtype(out_dtype)
    faces = {
        "reference": reference.grouped_matmul_bf16,
        "hopper": hopper_bf16.grouped_matmul_bf16,
        "tpu": tpu_bf16.grouped_matmul_bf16,
    }
    chosen = dispatch.choose("grouped_matmul_bf16", implementation, faces)
    return chosen(a, b, group_sizes, transpose_b=transpose_b, out_dtype=out_dtype)


def grouped_matmul_accumulate_bf16(
    a: Array, b: Array, group_sizes: Array, c: Array | None = None, *, implementation: str = "auto"
) -> Array:
    """Return c[g] + a_g^T b_g over the rows of each group g: the experts' weight gradients without FP8.

    BF16 operands, FP32 accumulation.

    Args:
        a: BF16 [K, m], rows of a group contiguous, group 0 first.
        b: BF16 [K, n].
        group_sizes: int32 [G], any sizes with a sum of at most K.
        c: FP32 [G, m, n], what is added to, or None, as in `grouped_matmul_accumulate`.
        implementation: "auto", "reference", "hopper" or "tpu".

    Returns:
        FP32 [G, m, n]; c[g] itself, or zeros, where group g is empty. Rows of no group never leak, NaN included.

    Raises:
        ValueError: shapes or dtypes that do not fit, or sizes that do not fit.
        NotImplementedError: there is no such kernel here.
    """
    _check_bf16("a", a, num_dims=2)
    _check_bf16("b", b, num_dims=2)
    check_inner("a^T", a.shape[::-1], "b^T", b.shape[::-1])
    num_groups = _check_accumulators(c, group_sizes, a.shape[1], b.shape[1])
    check_group_sizes("group_sizes", group_sizes, num_groups, a.shape[0])
    faces = {
        "reference": reference.grouped_matmul_accumulate_bf16,
        "hopper": hopper_bf16_gradient.grouped_matmul_accumulate_bf16,
        "tpu": tpu_bf16.grouped_matmul_accumulate_bf16,
    }
    return dispatch.choose("grouped_matmul_accumulate_bf16", implementation, faces)(a, b, group_sizes, c)


def check_group_sizes(
    name: str, sizes: Array, num_groups: int, rows: int, *, largest: int | None = None, multiple: int = 1
) -> None:
    """Refuse group sizes of the wrong kind, and, where they are numbers already, sizes that do not fit.

    Args:
        name: of the argument, for messages.
        sizes: int32 [num_groups].
        num_groups: how many there must be, at least 1.
        rows: what their sum may be at most.
        largest: what each may be at most; `rows` by default.
        multiple: what each must be a multiple of.

    Raises:
        ValueError: with the numbers.
    """
    check_array(name, sizes)
    if sizes.shape != (num_groups,) or sizes.dtype != jnp.int32 or not num_groups:
        raise ValueError(f"{name} is {sizes.dtype} {sizes.shape}; it must be int32 {(num_groups,)}, at least one group")
    if isinstance(sizes, jax.core.Tracer):
        return
    numbers = np.asarray(sizes)
    largest = rows if largest is None else largest
    if numbers.min() < 0 or numbers.max() > largest or numbers.sum() > rows:
        raise ValueError(
            f"{name} = {numbers} with sum {numbers.sum()}; each must be in [0, {largest}] and the sum at most {rows}"
        )
    if (numbers % multiple).any():
        raise ValueError(f"{name} = {numbers}; each must be a multiple of {multiple}: pad groups with zeros")


def _check_accumulators(c: Array | None, group_sizes: Array, m: int, n: int) -> int:
    """The number of groups: of `c` [G, m, n], or of the sizes without one."""
    if c is None:
        check_array("group_sizes", group_sizes)
        return group_sizes.size
    check_array("c", c)
    check_accumulator(c, (*c.shape[:1], m, n))
    return c.shape[0]


def _check_bf16(name: str, x: Array, num_dims: int) -> None:
    check_array(name, x)
    if x.dtype != jnp.bfloat16 or x.ndim != num_dims:
        raise ValueError(f"{name} is {x.dtype} {x.shape}; it must be bfloat16 with {num_dims} dims")
