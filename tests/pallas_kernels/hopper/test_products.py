"""FP8 products on Hopper, in Mosaic GPU's interpreter with its race detector, and lowered for a GPU that is not there.

The interpreter multiplies in FP32, so what a tensor core's short accumulator does is not seen here; order, edges,
groups and barriers are. Two thread blocks and small rings: each block has several tiles, and every slot is used again
and again.
"""

import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grouped, matmul
from pallas_kernels.grouped import hopper as grouped_hopper
from pallas_kernels.grouped import hopper_bf16, hopper_bf16_gradient, reference
from pallas_kernels.grouped import hopper_gradient as grouped_hopper_gradient
from pallas_kernels.hopper import groups
from pallas_kernels.hopper.gradient import CONFIG
from pallas_kernels.hopper.main_loop import TuningConfig, wgmma
from pallas_kernels.matmul import hopper, hopper_gradient
from pallas_kernels.quantize import quantize_blocks, quantize_tiles
from pallas_kernels.quantized import E4M3, Quantized

# The scales of A are read by ordinary loads and overwritten by the copy engine. The detector wants a proxy fence
# between the two, as for writes; a read that has returned needs none, the barrier orders it (PTX ISA, "async proxy";
# CUTLASS has none there either).
SCALE_READS = {"receive", "scale"}
BF16_ERROR, FP32_ERROR = 2.0e-3, 1.0e-6  # relative L2; measured 1.68e-3, which is the rounding of the output, and 1e-7


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    for module in (hopper, hopper_gradient, grouped_hopper, hopper_bf16, groups):
        monkeypatch.setattr(module, "num_multiprocessors", lambda: 2)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tiles(*shape, seed=0):
    return quantize_tiles(normal(*shape, seed=seed), implementation="reference")


def blocks(*shape, seed=1):
    return quantize_blocks(normal(*shape, seed=seed), implementation="reference")


@pytest.fixture
def races(capfd, caplog):
    """Return a function that says which races were reported since the test began: printed by jax 0.11, logged from 0.12
    on.
    """
    return lambda: "".join([*capfd.readouterr(), caplog.text]).split("RACE DETECTED")[1:]


def interpret(races, function, *operands):
    """Run in the interpreter; fail on any race but that of `SCALE_READS`."""
    fields = {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}
    quiet = {"on_race": "warn"} if "on_race" in fields else {}  # jax 0.12 would stop at the first
    interpreter = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, **quiet))
    with interpreter, mock.patch.object(wgmma, "PTX", False):
        result = jax.block_until_ready(jax.jit(function)(*operands))
    for race in races():
        reads, writes = (re.findall(rf"{kind} of .*? \((\S*)\)", race) for kind in ("read", "write"))
        assert len(reads) == 1, race
        assert reads[0].split(".")[-1] in SCALE_READS, race
        assert writes[0].split(".")[-1] == "fill", race
    return np.asarray(result, np.float64)


def lower(function, *operands):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("m", "n", "k", "config", "parts"),
    [
        (
            200,
            264,
            640,
            TuningConfig(products=1, stages=2, pieces=2),
            1,
        ),  # steps left over by the last turn, edges in m and n
        (133, 128, 128, TuningConfig(), 1),  # a single step; rows that are no multiple of 8; half of a tile's columns
        (136, 520, 896, TuningConfig(stages=3), 1),  # two products per step; slots go on from tile to tile
        (
            70,
            300,
            384,
            TuningConfig(columns=64, products=1, split="n", stages=2),
            1,
        ),  # half a block of columns per warpgroup
        (
            200,
            264,
            256,
            TuningConfig(split="n", stages=2, pieces=2, batch=2),
            1,
        ),  # a warpgroup's products below each other
        (
            200,
            160,
            128,
            TuningConfig(split="n", stages=2, pieces=2, batch=1),
            1,
        ),  # ... of which most pieces lie beyond the last column
        (133, 264, 512, TuningConfig(stages=2), 2),  # two parts of k
        (
            70,
            136,
            640,
            TuningConfig(columns=64, products=1, split="n", stages=3),
            3,
        ),  # the last of which ends beyond it
    ],
)
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_dense_product(races, m, n, k, config, parts, out_dtype):
    a, b = tiles(m, k), blocks(n, k)
    actual = interpret(races, lambda a, b: hopper.matmul(a, b, out_dtype=out_dtype, config=config, parts=parts), a, b)
    expected = np.asarray(matmul.matmul(a, b, out_dtype=jnp.float32, implementation="reference"), np.float64)
    assert actual.shape == (m, n)
    assert error(actual, expected) < (BF16_ERROR if out_dtype == jnp.bfloat16 else FP32_ERROR)


@pytest.mark.parametrize("sizes", [(100, 0, 57, 1), (0, 0, 0, 0), (0, 192, 0, 0)])
def test_groups_anywhere(races, sizes):
    """Rows of no group are zero although A is NaN there; a group's rows do not depend on where its tile begins."""
    rows, n, k = 192, 136, 256
    used = sum(sizes)
    a = tiles(rows, k)
    a = Quantized(a.values.at[used:].set(jnp.nan), a.scales.at[:, used:].set(jnp.nan), "tile")
    b, group_sizes = blocks(len(sizes), n, k), jnp.asarray(sizes, jnp.int32)
    actual = interpret(
        races, lambda a, b, s: grouped_hopper.grouped_matmul(a, b, s, config=TuningConfig(stages=2)), a, b, group_sizes
    )
    expected = np.asarray(
        grouped.grouped_matmul(a, b, group_sizes, out_dtype=jnp.float32, implementation="reference"), np.float64
    )
    assert not actual[used:].any()
    assert not used or error(actual[:used], expected[:used]) < BF16_ERROR


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_groups_in_bf16(races, transpose_b, out_dtype):
    sizes, rows, n, k = (100, 0, 57, 1), 196, 264, 200  # k ends within a step, rows and n within a tile
    used = sum(sizes)
    a = normal(rows, k).astype(jnp.bfloat16).at[used:].set(jnp.nan)
    b = normal(len(sizes), *((k, n) if transpose_b else (n, k)), seed=1).astype(jnp.bfloat16)
    group_sizes, config = jnp.asarray(sizes, jnp.int32), hopper_bf16.TuningConfig(stages=2)

    def product(a, b, sizes):
        return hopper_bf16.grouped_matmul_bf16(a, b, sizes, transpose_b=transpose_b, out_dtype=out_dtype, config=config)

    actual = interpret(races, product, a, b, group_sizes)
    how = {"transpose_b": transpose_b, "out_dtype": jnp.float32, "implementation": "reference"}
    expected = np.asarray(grouped.grouped_matmul_bf16(a, b, group_sizes, **how), np.float64)
    assert not actual[used:].any()
    assert error(actual[:used], expected[:used]) < (BF16_ERROR if out_dtype == jnp.bfloat16 else FP32_ERROR)


@pytest.mark.parametrize("config", [TuningConfig(stages=2), TuningConfig(products=1, split="n", stages=2)])
def test_masked_rooms(races, config):
    valid, room, n, k = (3, 0, 70, 129), 136, 136, 256
    experts = range(len(valid))
    each = [tiles(room, k, seed=e) for e in experts]
    a = Quantized(jnp.stack([q.values for q in each]), jnp.stack([q.scales for q in each]), "tile")
    b, valid_rows = blocks(len(valid), n, k), jnp.asarray(valid, jnp.int32)
    actual = interpret(races, lambda a, b, v: grouped_hopper.masked_matmul(a, b, v, config=config), a, b, valid_rows)
    expected = np.asarray(
        grouped.masked_matmul(a, b, valid_rows, out_dtype=jnp.float32, implementation="reference"), np.float64
    )
    for e, count in zip(experts, valid, strict=True):
        assert not count or error(actual[e, :count], expected[e, :count]) < BF16_ERROR


@pytest.mark.parametrize(
    "config", [TuningConfig(split="n", stages=2, turn=1), TuningConfig(products=1, stages=3, turn=2, pieces=2)]
)
def test_weight_gradients(races, monkeypatch, config):
    """Odd and even numbers of steps, an empty group, columns of no group. The interpreter cannot add: it stores, to
    zeros.
    """
    monkeypatch.setattr(groups, "ON_THE_WAY_OUT", None)
    sizes, m, n = (128, 0, 384, 256), 136, 72
    a, b = tiles(m, 896), tiles(n, 896, seed=1)
    poison = sum(sizes)
    a = Quantized(a.values.at[:, poison:].set(jnp.nan), a.scales.at[poison // 128 :].set(jnp.nan), "tile")
    c, group_sizes = jnp.zeros((len(sizes), m, n)), jnp.asarray(sizes, jnp.int32)
    actual = interpret(
        races, lambda *o: grouped_hopper_gradient.grouped_matmul_accumulate(*o, config=config), a, b, group_sizes, c
    )
    expected = np.asarray(
        grouped.grouped_matmul_accumulate(a, b, group_sizes, c, implementation="reference"), np.float64
    )
    assert error(actual, expected) < FP32_ERROR


def test_weight_gradients_in_bf16(races, monkeypatch):
    """Groups begin and end within steps of 64 rows; the rows after the last are NaN in both operands."""
    monkeypatch.setattr(groups, "ON_THE_WAY_OUT", None)
    sizes, rows, m, n = (50, 0, 100, 1, 64), 264, 136, 320
    a, b = (
        normal(rows, size, seed=i).astype(jnp.bfloat16).at[sum(sizes) :].set(jnp.nan) for i, size in enumerate((m, n))
    )
    c, group_sizes = jnp.zeros((len(sizes), m, n)), jnp.asarray(sizes, jnp.int32)
    config = hopper_bf16_gradient.TuningConfig(stages=2)

    def gradient(*operands):
        return hopper_bf16_gradient.grouped_matmul_accumulate_bf16(*operands, config=config)

    actual = interpret(races, gradient, a, b, group_sizes, c)
    expected = np.asarray(
        grouped.grouped_matmul_accumulate_bf16(a, b, group_sizes, c, implementation="reference"), np.float64
    )
    assert not actual[1].any()
    assert error(actual, expected) < FP32_ERROR


def from_zero_and_zeros(races, monkeypatch, function, operands, group_sizes, c):
    """Return what `function` makes without a `c`, and of the zeros `c`, in every bit the same."""
    monkeypatch.setattr(groups, "ON_THE_WAY_OUT", None)
    sizes = jnp.asarray(group_sizes, jnp.int32)
    from_zero, of_zeros = interpret(races, function, *operands, sizes), interpret(races, function, *operands, sizes, c)
    np.testing.assert_array_equal(from_zero.view(np.uint64), of_zeros.view(np.uint64))
    return from_zero


@pytest.mark.parametrize("sizes", [(128, 0, 256, 128), (0, 128, 0, 0), (0, 640, 0, 0), (0, 0, 0, 0)])
def test_gradients_that_begin_at_zero(races, monkeypatch, sizes):
    """The interpreter fills a new array with NaN, so an element that nobody writes is seen; so are the columns of no
    group.
    """
    m, n, used = 136, 72, sum(sizes)
    a, b = (tiles(size, 640, seed=i) for i, size in enumerate((m, n)))
    a, b = (
        Quantized(x.values.at[:, used:].set(jnp.nan), x.scales.at[used // 128 :].set(jnp.nan), "tile") for x in (a, b)
    )
    gradient = functools.partial(
        grouped_hopper_gradient.grouped_matmul_accumulate, config=TuningConfig(split="n", stages=2, turn=1)
    )
    actual = from_zero_and_zeros(races, monkeypatch, gradient, (a, b), sizes, jnp.zeros((4, m, n)))
    expected = np.asarray(reference.grouped_matmul_accumulate(a, b, jnp.asarray(sizes, jnp.int32)), np.float64)
    for product, exact, size in zip(actual, expected, sizes, strict=True):
        assert error(product, exact) < FP32_ERROR if size else not product.any()


@pytest.mark.parametrize("sizes", [(50, 0, 100, 1, 64), (0, 1, 0, 0, 0), (0, 0, 264, 0, 0), (0, 0, 0, 0, 0)])
def test_gradients_in_bf16_that_begin_at_zero(races, monkeypatch, sizes):
    rows, m, n = 264, 136, 320
    a, b = (
        normal(rows, size, seed=i).astype(jnp.bfloat16).at[sum(sizes) :].set(jnp.nan) for i, size in enumerate((m, n))
    )
    config = hopper_bf16_gradient.TuningConfig(stages=2)
    gradient = functools.partial(hopper_bf16_gradient.grouped_matmul_accumulate_bf16, config=config)
    actual = from_zero_and_zeros(races, monkeypatch, gradient, (a, b), sizes, jnp.zeros((5, m, n)))
    expected = np.asarray(reference.grouped_matmul_accumulate_bf16(a, b, jnp.asarray(sizes, jnp.int32)), np.float64)
    for product, exact, size in zip(actual, expected, sizes, strict=True):
        assert error(product, exact) < FP32_ERROR if size else not product.any()


def test_parts_of_a_dense_gradient(races):
    """Seven steps in three parts, of 2, 2 and 3."""
    m, n = 136, 72
    a, b, c = tiles(m, 896), tiles(n, 896, seed=1), normal(m, n, seed=2)
    gradient = functools.partial(hopper_gradient.matmul_accumulate, config=TuningConfig(split="n", stages=2, turn=1))
    whole = interpret(races, functools.partial(gradient, parts=1), a, b)
    assert error(whole, np.asarray(matmul.matmul_accumulate(a, b, implementation="reference"), np.float64)) < FP32_ERROR
    from_zero, onto_c = (
        interpret(races, functools.partial(gradient, parts=3), *operands) for operands in ((a, b), (a, b, c))
    )
    assert 0 < error(from_zero, whole) < FP32_ERROR  # other sums
    np.testing.assert_array_equal(onto_c, np.float32(c) + np.float32(from_zero))


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_gradient_adds_on_its_way_out(precision):
    """What the interpreter cannot run is at least in the program; and without a `c`, nothing is added, and nothing to
    add to is made.
    """
    x, sizes, c = jnp.ones((256, 128), jnp.bfloat16), jnp.asarray([256], jnp.int32), jnp.ones((1, 128, 128))
    if precision == "fp8":
        gradient, operands = (
            grouped_hopper_gradient.grouped_matmul_accumulate,
            (tiles(128, 256), tiles(128, 256, seed=1), sizes),
        )
    else:
        gradient, operands = hopper_bf16_gradient.grouped_matmul_accumulate_bf16, (x, x, sizes)
    onto_c, from_zero = (str(jax.make_jaxpr(gradient)(*operands, *last)) for last in ((c,), ()))
    for word in ("reduction_op=add", "new_ref"):
        assert word in onto_c and word not in from_zero


def test_parts_fill_the_machine(monkeypatch):
    """The table of `plan_parts`; large gradients, and those of few steps, stay whole."""
    monkeypatch.setattr(hopper_gradient, "num_multiprocessors", lambda: 132)
    plan = functools.partial(hopper_gradient.plan_parts, CONFIG)
    few_tiles = {(2048, 640): 8, (512, 4096): 2, (1024, 2048): 2, (2048, 1536): 4, (2048, 2048): 1, (1536, 3072): 6}
    assert {shape: plan(*shape, 256) for shape in few_tiles} == few_tiles
    assert plan(4096, 7168, 256) == plan(7168, 2048, 32) == plan(128, 256, 1) == 1
    assert 1 < plan(128, 256, 12) <= 12 and 1 < plan(128, 256, 256) <= hopper_gradient.MOST_PARTS


def test_tiles_fit_the_machine(monkeypatch):
    """The choice is the config whose last round of tiles wastes least: at m = 128, 28 tiles of 128 x 256 or 112 of 64 x
    128 on 132.
    """
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda: 132)
    assert hopper.plan(128, 7168, 16) == (hopper.SMALL, 1)
    assert hopper.plan(4096, 7168, 16) == hopper.plan(8192, 24576, 12) == (hopper.LARGE, 1)
    assert hopper.plan(2048, 1024, 16) == (hopper.MEDIUM, 1)
    assert hopper.plan(128, 512, 56)[1] > 4


@pytest.mark.parametrize(
    ("expected_rows", "tile"), [(None, (128, 256)), (65, (128, 256)), (64, (64, 128)), (1, (64, 128))]
)
def test_masked_tiles_fit_the_rows(expected_rows, tile):
    """The caller's hint changes the tiles, and nothing else."""
    a = jax.eval_shape(lambda: Quantized(jnp.zeros((2, 4096, 256), E4M3), jnp.zeros((2, 2, 4096), jnp.float32), "tile"))
    operands = a, jax.eval_shape(lambda: blocks(2, 512, 256)), jax.ShapeDtypeStruct((2,), jnp.int32)
    with mock.patch.object(grouped_hopper, "slots", wraps=grouped_hopper.slots) as slots:
        lower(lambda *o: grouped.masked_matmul(*o, expected_rows=expected_rows, implementation="hopper"), *operands)
    (config,) = slots.call_args.args
    assert (config.tile_m, config.tile_n) == tile


def test_products_lower_for_cuda(monkeypatch):
    """V3's shapes, through the public functions."""
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda: 132)
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
