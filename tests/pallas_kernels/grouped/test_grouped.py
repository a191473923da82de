"""Products of groups: any group sizes, drawn by hypothesis, and NaN in every place that belongs to no group.

Shapes are fixed and sizes are data, so each face compiles once and then takes every example.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pallas_kernels import GROUP, grouped
from pallas_kernels.grouped import reference, tpu, tpu_bf16
from pallas_kernels.grouped.visits import make_visits
from pallas_kernels.matmul.tpu import TuningConfig
from pallas_kernels.quantize import quantize_blocks, quantize_tiles
from pallas_kernels.quantized import Quantized, dequantize
from tests.support import compiling

NUM_GROUPS, ROWS, M, N, K = 4, 300, 20, 150, 384  # rows: two tiles of 128 and part of one; n: a block and part of one
SEGMENTS = 20  # of the k-grouped product: two steps of 8 and half of one
VISIT_TILE = 8  # rows
FP32_ERROR = (
    6.0e-7  # of sum |a| |b|: measured up to 3.5e-7 in BF16, where 200 terms are summed at once, and 1.2e-7 in FP8
)
DETERMINISTIC = settings(derandomize=True, max_examples=15, deadline=None, database=None)

SMALL, SMALL_BF16 = TuningConfig(tile_m=128, tile_n=128), tpu_bf16.TuningConfig(tile_m=128, tile_n=128, tile_k=128)
FACES = ("reference", "tpu")


def sizes_of(total: int):
    """Group sizes with a sum of at most `total`: distances between sorted cuts, so that empty groups and rows of no
    group are common.
    """
    cuts = st.lists(st.integers(0, total), min_size=NUM_GROUPS, max_size=NUM_GROUPS)
    return cuts.map(lambda cuts: tuple(int(size) for size in np.diff([0, *sorted(cuts)])))


def any_sizes(total: int):
    """Decorate a test of `sizes`: drawn ones, and always none, one row, all in one group, all in the last, and no tile
    boundary.
    """

    def decorate(test):
        for sizes in ((0, 0, 0, 0), (0, 1, 0, 0), (0, total, 0, 0), (0, 0, 0, total), (1, total // 2, 0, 3)):
            test = example(sizes=sizes)(test)
        return DETERMINISTIC(given(sizes=sizes_of(total))(test))

    return decorate


@functools.cache
def face(name: str, operation: str, **options):
    """The compiled kernel of an operation, called with its operands only."""
    if name == "reference":
        return jax.jit(functools.partial(getattr(reference, operation), **options))
    module, config = (tpu_bf16, SMALL_BF16) if operation.endswith("bf16") else (tpu, SMALL)
    kernel = functools.partial(getattr(module, operation), config=config, interpret=True, **options)
    return jax.jit(kernel, compiler_options=compiling.RUN_OFTEN if operation == "grouped_matmul_accumulate" else None)


def normal(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def tiles(m: int, k: int, seed: int) -> Quantized:
    """Tiles whose magnitudes differ from row to row and along k."""
    magnitudes = np.exp2(np.random.default_rng(seed).integers(-5, 6, size=(m, k // GROUP)))
    return quantize_tiles(
        jnp.asarray(normal(m, k, seed=seed) * np.repeat(magnitudes, GROUP, 1)), implementation="reference"
    )


@functools.cache
def weights() -> Quantized:
    magnitudes = np.exp2(np.arange(NUM_GROUPS) - 2.0)[:, None, None]
    return quantize_blocks(
        jnp.asarray(normal(NUM_GROUPS, N, K, seed=1) * magnitudes, jnp.float32), implementation="reference"
    )


def fp64(x) -> np.ndarray:
    return np.asarray(dequantize(x) if isinstance(x, Quantized) else x, np.float64)


def poison(x, *places: slice) -> jax.Array:
    """Set NaN at `places`, by NumPy: JAX compiles a program for each size that hypothesis draws."""
    poisoned = np.array(x)
    poisoned[places] = np.nan
    return jnp.asarray(poisoned)


def poison_rows(q: Quantized, start: int) -> Quantized:
    """NaN in the values and scales of the rows from `start` on."""
    return Quantized(poison(q.values, slice(start, None)), poison(q.scales, slice(None), slice(start, None)), "tile")


def poison_columns(q: Quantized, start: int) -> Quantized:
    values = poison(q.values, slice(None), slice(start, None))
    return Quantized(values, poison(q.scales, slice(start // GROUP, None)), "tile")


def spans(sizes) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)]


def assert_near(result, expected, magnitude) -> None:
    """Equal up to FP32 rounding of sums whose terms have `magnitude` together: exact where it is zero."""
    assert result.dtype == jnp.float32
    error, bound = np.abs(np.asarray(result, np.float64) - expected), FP32_ERROR * magnitude
    assert np.all(error <= bound), np.max(error / np.maximum(magnitude, 1e-30))


def assert_begins_at_zero(accumulate, factors, sizes) -> None:
    """Without c, the result is that of zeros bit for bit, and zero for an empty group."""
    sizes = jnp.array(sizes, jnp.int32)
    result = np.asarray(accumulate(*factors, sizes))
    of_zeros = np.asarray(accumulate(*factors, sizes, jnp.zeros((NUM_GROUPS, M, N))))
    np.testing.assert_array_equal(result.view(np.uint32), of_zeros.view(np.uint32))
    assert not result[sizes == 0].any()


def expect_rows(a, b, sizes) -> tuple[np.ndarray, np.ndarray]:
    """FP64 products of the rows [rows, k] of each group with its [n, k], zeros elsewhere; and the sums of
    magnitudes.
    """
    expected, magnitude = np.zeros((2, a.shape[0], b.shape[1]))
    for matrix, rows in zip(b, spans(sizes), strict=True):
        expected[rows], magnitude[rows] = a[rows] @ matrix.T, np.abs(a[rows]) @ np.abs(matrix).T
    return expected, magnitude


@pytest.mark.parametrize("name", FACES)
@any_sizes(ROWS)
def test_grouped_matmul(name, sizes):
    a, b = tiles(ROWS, K, 0), weights()
    multiply = face(name, "grouped_matmul", out_dtype=jnp.float32)
    result = multiply(poison_rows(a, sum(sizes)), b, jnp.array(sizes, jnp.int32))
    assert_near(result, *expect_rows(fp64(a), fp64(b), sizes))


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("name", FACES)
@any_sizes(ROWS)
def test_grouped_matmul_bf16(name, transpose_b, sizes):
    # k: no multiple of 128
    a, b = (jnp.asarray(normal(*shape)).astype(jnp.bfloat16) for shape in ((ROWS, 200), (NUM_GROUPS, N, 200)))
    poisoned = poison(a, slice(sum(sizes), None))
    multiply = face(name, "grouped_matmul_bf16", transpose_b=transpose_b, out_dtype=jnp.float32)
    result = multiply(poisoned, b.swapaxes(1, 2) if transpose_b else b, jnp.array(sizes, jnp.int32))
    assert_near(result, *expect_rows(fp64(a), fp64(b), sizes))


@pytest.mark.parametrize("name", FACES)
@any_sizes(SEGMENTS)
def test_grouped_matmul_accumulate(name, sizes):
    """`sizes` in segments of 128."""
    a, b, c = tiles(M, SEGMENTS * GROUP, 2), tiles(N, SEGMENTS * GROUP, 3), normal(NUM_GROUPS, M, N)
    columns = [GROUP * size for size in sizes]
    accumulate, factors = face(name, "grouped_matmul_accumulate"), [poison_columns(x, sum(columns)) for x in (a, b)]
    result = np.asarray(accumulate(*factors, jnp.array(columns, jnp.int32), jnp.asarray(c)))
    assert_begins_at_zero(accumulate, factors, columns)
    for group, span in enumerate(spans(columns)):
        left, right = fp64(a)[:, span], fp64(b)[:, span]
        # an empty group keeps its c exactly
        magnitude = (np.abs(left) @ np.abs(right).T + np.abs(c[group])) * (span.stop > span.start)
        assert_near(result[group], c[group] + left @ right.T, magnitude)


@pytest.mark.parametrize("name", FACES)
@any_sizes(ROWS)
def test_grouped_matmul_accumulate_bf16(name, sizes):
    a, b = (jnp.asarray(normal(ROWS, width)).astype(jnp.bfloat16) for width in (M, N))
    c = normal(NUM_GROUPS, M, N)
    accumulate, factors = (
        face(name, "grouped_matmul_accumulate_bf16"),
        [poison(x, slice(sum(sizes), None)) for x in (a, b)],
    )
    result = np.asarray(accumulate(*factors, jnp.array(sizes, jnp.int32), jnp.asarray(c)))
    assert_begins_at_zero(accumulate, factors, sizes)
    for group, span in enumerate(spans(sizes)):
        left, right = fp64(a)[span].T, fp64(b)[span]
        magnitude = (np.abs(left) @ np.abs(right) + np.abs(c[group])) * (span.stop > span.start)
        assert_near(result[group], c[group] + left @ right, magnitude)


@pytest.mark.parametrize("name", FACES)
@DETERMINISTIC
@given(valid=st.lists(st.integers(0, M), min_size=NUM_GROUPS, max_size=NUM_GROUPS))
@example(valid=[0, 1, M, 0])
def test_masked_matmul(name, valid):
    experts = [tiles(M, K, seed) for seed in range(NUM_GROUPS)]
    poisoned = jax.tree.map(lambda *x: jnp.stack(x), *map(poison_rows, experts, valid))
    multiply = face(name, "masked_matmul", out_dtype=jnp.float32)
    result = np.asarray(multiply(poisoned, weights(), jnp.array(valid, jnp.int32)))
    for expert, rows in enumerate(valid):
        a, b = fp64(experts[expert])[:rows], fp64(weights())[expert]
        assert_near(result[expert, :rows], a @ b.T, np.abs(a) @ np.abs(b).T)


def test_unspecified_rows_of_the_masked_reference_are_nan():
    a = jax.tree.map(lambda x: x[None], tiles(M, K, 0))
    one = jax.tree.map(lambda x: x[:1], weights())
    rows = np.isnan(np.asarray(grouped.masked_matmul(a, one, jnp.array([3], jnp.int32)), np.float32)).all(axis=2)
    np.testing.assert_array_equal(rows, np.arange(M)[None] >= 3)


@pytest.mark.parametrize("name", FACES)
def test_bf16_is_the_fp32_result_rounded_once(name):
    a, b, sizes = tiles(ROWS, K, 0), weights(), jnp.array([100, 0, 30, 1], jnp.int32)
    full = face(name, "grouped_matmul", out_dtype=jnp.float32)(a, b, sizes)
    np.testing.assert_array_equal(
        face(name, "grouped_matmul", out_dtype=jnp.bfloat16)(a, b, sizes), full.astype(jnp.bfloat16)
    )


def test_tpu_kernels_in_the_simulated_memory_of_a_tpu():
    """Copies between HBM and VMEM are simulated, with NaN where nothing was written; c has whole tiles, as donated ones
    must here.
    """
    sizes, interpret = jnp.array([100, 0, 130, 1], jnp.int32), pltpu.InterpretParams()
    a, b = poison_rows(tiles(ROWS, K, 0), 231), weights()
    result = tpu.grouped_matmul(a, b, sizes, config=SMALL, interpret=interpret)
    np.testing.assert_array_equal(result, face("tpu", "grouped_matmul", out_dtype=jnp.bfloat16)(a, b, sizes))
    left, right = (jnp.asarray(normal(ROWS, 128)).astype(jnp.bfloat16).at[231:].set(jnp.nan) for _ in range(2))
    c = jnp.asarray(normal(NUM_GROUPS, 128, 128))
    result = tpu_bf16.grouped_matmul_accumulate_bf16(left, right, sizes, c, config=SMALL_BF16, interpret=interpret)
    np.testing.assert_array_equal(result, face("tpu", "grouped_matmul_accumulate_bf16")(left, right, sizes, c))


@any_sizes(ROWS)
def test_visits_keep_every_row_once_for_its_group(sizes):
    visits = jax.tree.map(
        np.asarray, jax.jit(make_visits, static_argnums=(1, 2))(jnp.array(sizes, jnp.int32), ROWS, VISIT_TILE)
    )
    rows = np.arange(ROWS)
    of_tile = rows // VISIT_TILE == visits.tile[:, None]
    kept = (
        of_tile & (rows >= visits.offsets[visits.group][:, None]) & (rows < visits.offsets[visits.group + 1][:, None])
    )
    np.testing.assert_array_equal(kept.sum(axis=0), 1)
    groups = np.repeat(np.arange(NUM_GROUPS + 1), [*sizes, ROWS - sum(sizes)])
    np.testing.assert_array_equal(visits.group[kept.argmax(axis=0)], groups)
    assert np.all(np.diff(visits.tile) >= 0)  # a tile's visits are neighbours
    # only fill-ups keep nothing: an empty group costs nothing
    assert np.all(visits.group[~kept.any(axis=1)] > NUM_GROUPS)


def test_references_run_inside_shard_map():
    """Carries of loops must vary over the mesh as the operands do, which shard_map checks."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sizes, c = jnp.array([3, 0, 5, 1], jnp.int32), jnp.zeros((NUM_GROUPS, M, N))
    columns = GROUP * sizes
    a, b, left, right = tiles(ROWS, K, 0), weights(), tiles(M, SEGMENTS * GROUP, 2), tiles(N, SEGMENTS * GROUP, 3)

    def one_device(a, b, left, right, c):
        a, c = jax.tree.map(lambda x: jax.lax.pcast(x, "x", to="varying"), (a, c))
        rows = reference.grouped_matmul(a, b, sizes, out_dtype=jnp.float32)
        left = jax.lax.pcast(left, "x", to="varying")
        from_zero = reference.grouped_matmul_accumulate(left, right, columns)
        return rows[None], reference.grouped_matmul_accumulate(left, right, columns, c)[None], from_zero[None]

    run = jax.jit(jax.shard_map(one_device, mesh=mesh, in_specs=(P(),) * 5, out_specs=P("x")))
    rows, gradient, from_zero = run(a, b, left, right, c)
    np.testing.assert_array_equal(gradient, from_zero)
    np.testing.assert_array_equal(rows[5], reference.grouped_matmul(a, b, sizes, out_dtype=jnp.float32))
    np.testing.assert_array_equal(gradient[5], reference.grouped_matmul_accumulate(left, right, columns, c))
