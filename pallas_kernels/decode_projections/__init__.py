"""All of a decoding step's attention but its core: products of few rows, and in one kernel what stands between two.

    both      = project(h, W_DQ | W_DKV)         parts of sums over k
    c_Q, cache = latents(both)                   sum, norms, the rotary key turned, the entry into its page
    q         = project(c_Q, W_UQ | W_QR)        parts
    q         = absorb(q, W_UK)                  sum, into latent space, rotary channels turned
    mean      = the core (`mla_decode`)
    out       = project(mean, W_UV)
    x, h      = add_norm(x, project(out, W_O))   sum, residual, the norm that follows

A product of a few rows takes the time of reading its weight. A matrix of 8 MB comes from memory in 2 us if all
multiprocessors read at once; one column block for each would leave most of them idle. So k is cut too, and whatever
reads the product next adds its parts: FP32 [splits, N, columns].
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.decode_projections import hopper, hopper_absorb, hopper_fp8, hopper_rows, reference
from pallas_kernels.decode_projections.hopper import TuningConfig
from pallas_kernels.quantized import Quantized, Scale, check_array, check_quantized

MOST_ROWS, ROW_UNIT = 128, 8
MOST_BLOCKS = 512  # of `latents` and `add_norm`, which have one for each row
UNIT = 128  # of k, and of what a row's block takes at once


def kernel_fault(num_rows: int, dtype: Any, *sizes: int, most_rows: int = MOST_ROWS) -> str | None:
    """Return what the Hopper kernels are not made for, or None; `sizes` are those of k and of normed rows.

    `most_rows` is `MOST_BLOCKS` for kernels that have a block for each row.
    """
    if dtype != jnp.bfloat16:
        return str(jnp.dtype(dtype))
    if num_rows % ROW_UNIT or num_rows > most_rows:
        return f"{num_rows} rows, only for multiples of {ROW_UNIT} up to {most_rows}"
    wrong = [size for size in sizes if size % UNIT]
    return f"dims of {wrong}, only for multiples of {UNIT}" if wrong else None


def project(
    x: Array | Quantized,
    weight: Array | Quantized,
    *,
    whole: bool = False,
    scale: Scale = "fp32",
    implementation: str = "auto",
    config: TuningConfig | None = None,
) -> Array:
    """Return the products of each row's B parts with B matrices, as parts whose sum they are.

    Args:
        x: BF16 or FP32 [N, B * K]; BF16 or tiles if the weight is in FP8.
        weight: of x's dtype [B, K, C], or one matrix in FP8: blocks [C, K], with which x is multiplied in tiles.
        whole: one part, in x's dtype; not in FP8.
        scale: of the tiles that are made of x in BF16.
        implementation: "auto", "reference" or "hopper". The kernels take BF16 x of 8 to 128 rows, a multiple of 8, K a
            multiple of 128 and C of 64.
        config: of the kernels.

    Returns:
        FP32 [splits, N, B * C], or with `whole` [1, N, B * C] of x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: there is no such kernel here.
    """
    config = config or TuningConfig()
    shape = _check_product(x, weight, whole)
    num_rows, dtype = x.shape[0], jnp.bfloat16 if isinstance(x, Quantized) else x.dtype
    fault = kernel_fault(num_rows, dtype, shape[1]) or _fault_of_columns(shape[2])
    splits = 1 if whole or fault else hopper.choose_splits(*shape, num_rows, config.depth)
    if isinstance(weight, Quantized):
        face = functools.partial(reference.project_fp8, scale=scale)
        kernel = functools.partial(hopper_fp8.project, splits=splits, scale=scale, config=config)
        return _choose("project", implementation, face, kernel, fault)(x, weight.values, weight.scales)
    face = functools.partial(reference.project, whole=whole)
    kernel = functools.partial(hopper.project, splits=splits, config=config)
    return _choose("project", implementation, face, kernel, fault)(x, weight)


def _check_product(x: Array | Quantized, weight: Array | Quantized, whole: bool) -> tuple[int, int, int]:
    """Return B, K and C."""
    if isinstance(x, Quantized):
        check_quantized("x", x, "tile", num_dims=2)
        kind, dims = jnp.dtype(jnp.bfloat16), x.shape
        if not isinstance(weight, Quantized):
            raise ValueError(f"x is in tiles and weight {weight.dtype}; tiles are multiplied with blocks in FP8")
    else:
        check_array("x", x)
        kind, dims = x.dtype, x.shape
    if isinstance(weight, Quantized):
        check_quantized("weight", weight, "block", num_dims=2)
        shape, dtype, fits = (1, *weight.shape[::-1]), jnp.dtype(jnp.bfloat16), not whole
    else:
        check_array("weight", weight)
        shape, dtype, fits = weight.shape, weight.dtype, weight.ndim == 3
    if not fits or len(dims) != 2 or kind != dtype or dims[1] != shape[0] * shape[1]:
        raise ValueError(
            f"x is {kind} {dims} and weight {weight.shape}; they must be [N, B * K] and [B, K, C] of one dtype,"
            " or BF16 or tiles [N, K] and blocks [C, K] in parts"
        )
    batch, k, columns = shape
    return batch, k, columns


def absorb(
    parts: Array,
    key_NPC: Array,
    table: tuple[Array, Array],
    *,
    implementation: str = "auto",
    config: TuningConfig | None = None,
) -> Array:
    """Return queries in latent space [N, heads * (C + R)], latent part and turned rotary part of each head.

    Args:
        parts: FP32 [splits, N, heads * (P + R)]: their sum are the queries, content before rotary channels.
        key_NPC: BF16 or FP32 [heads, P, C], the dtype of the result.
        table: FP32 cos and sin [N, R / 2].
        implementation: "auto", "reference" or "hopper"; the kernel takes BF16, P and C multiples of 64, and R of 32.
        config: of the kernel.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: there is no such kernel here.
    """
    heads, content, columns = key_NPC.shape
    rotary = 2 * table[0].shape[1]
    if parts.ndim != 3 or parts.shape[2] != heads * (content + rotary) or table[0].shape[0] != parts.shape[1]:
        raise ValueError(f"parts {parts.shape}, key {key_NPC.shape} and tables {table[0].shape} do not fit each other")
    fault = kernel_fault(parts.shape[1], key_NPC.dtype) or _fault_of_columns(content, columns, 2 * rotary)
    kernel = functools.partial(hopper_absorb.absorb, config=config or TuningConfig())
    return _choose("absorb", implementation, reference.absorb, kernel, fault)(parts, key_NPC, table)


def latents(
    parts: Array,
    gains: tuple[Array, Array],
    table: tuple[Array, Array],
    pages: Array,
    places: tuple[Array, Array],
    *,
    eps: float,
    scale: Scale | None = None,
    implementation: str = "auto",
    config: TuningConfig | None = None,
) -> tuple[Array | Quantized, Array]:
    """Return normed query latents [N, A], and the pages with each row's entry in its place.

    Args:
        parts: FP32 [splits, N, A + C + R], whose sum are query latents, latents, and rotary keys.
        gains: FP32 [A] and [C], of the norms.
        table: FP32 cos and sin [N, R / 2].
        pages: BF16 or FP32 [pages, page length, C + R]; a program that donates them has them written in place.
        places: int32 [N] twice: page and row. A page that does not exist, -1 for example, is written nowhere.
        eps: added to the mean square.
        scale: of the tiles in which the latents are wanted; None: in the dtype of `pages`.
        implementation: "auto", "reference" or "hopper"; the kernel takes BF16, A and C multiples of 512, and R = 64.
        config: of the kernel.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: there is no such kernel here.
    """
    queries, latent = (len(gain) for gain in gains)
    rotary = 2 * table[0].shape[1]
    if parts.ndim != 3 or parts.shape[2] != queries + latent + rotary or pages.shape[-1] != latent + rotary:
        raise ValueError(
            f"parts {parts.shape}, gains of {queries} and {latent}, {rotary} rotary channels and pages {pages.shape} do"
            " not fit each other"
        )
    fault = kernel_fault(parts.shape[1], pages.dtype, queries, latent, most_rows=MOST_BLOCKS)
    if queries % 512 or latent % 512 or rotary != 64:
        fault = fault or f"latents of {queries} and {latent} with {rotary} rotary channels"
    options = {"eps": eps, "scale": scale}
    kernel = functools.partial(hopper_rows.latents, **options, config=config or TuningConfig())
    face = functools.partial(reference.latents, **options)
    pages, *q = _choose("latents", implementation, face, kernel, fault)(parts, gains, table, pages, places)
    return Quantized(q[0], q[1], "tile") if scale else q[0], pages


class Normed(NamedTuple):
    """The residual stream, and what `add_norm` makes of it.

    Attributes:
        total: [N, D].
        h: its rms_norm, of the same dtype.
        tiles: of `h`.
        zeros: int32.
    """

    total: Array
    h: Array
    tiles: Quantized | None
    zeros: Array | None


def add_norm(
    x: Array,
    parts: Array,
    gain: Array,
    *,
    eps: float,
    scale: Scale | None = None,
    zeros: int = 0,
    implementation: str = "auto",
    config: TuningConfig | None = None,
) -> Normed:
    """Return x + the sum of `parts`, and rms_norm of that; with `scale` also its tiles.

    Args:
        x: BF16 or FP32 [N, D].
        parts: BF16 or FP32 [splits, N, D].
        gain: FP32 [D].
        eps: added to the mean square.
        scale: of the tiles; None: there are none.
        zeros: how many zeros to make for the marks of the kernel that follows (`pallas_kernels.hopper.marks`), a
            multiple of 128; 0: there are none.
        implementation: "auto", "reference" or "hopper"; the kernel takes BF16 x, and D a multiple of 512.
        config: of the kernel.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: there is no such kernel here.
    """
    if parts.ndim != 3 or parts.shape[1:] != x.shape or gain.shape != x.shape[1:]:
        raise ValueError(f"x {x.shape}, parts {parts.shape} and gain {gain.shape} do not fit each other")
    fault = kernel_fault(len(x), x.dtype, most_rows=MOST_BLOCKS)
    fault = fault or (f"rows of {x.shape[1]}" if x.shape[1] % 512 else None)
    options = {"eps": eps, "scale": scale, "zeros": zeros}
    kernel = functools.partial(hopper_rows.add_norm, **options, config=config or TuningConfig())
    face = functools.partial(reference.add_norm, **options)
    total, h, *more = _choose("add_norm", implementation, face, kernel, fault)(x, parts, gain)
    return Normed(total, h, Quantized(more[0], more[1], "tile") if scale else None, more[-1] if zeros else None)


def _fault_of_columns(*columns: int) -> str | None:
    wrong = [size for size in columns if size % hopper.COLUMNS]
    return f"columns of {wrong}, only for multiples of {hopper.COLUMNS}" if wrong else None


def _choose(name: str, implementation: str, reference_face: Any, kernel: Any, fault: str | None) -> Any:
    if fault and implementation == "hopper":
        raise NotImplementedError(f"{name} has no 'hopper' kernel for {fault}; use 'auto' or 'reference'")
    faces = {"reference": reference_face} | ({} if fault else {"hopper": kernel})
    return dispatch.choose(name, implementation, faces)
