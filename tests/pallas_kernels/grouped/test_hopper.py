"""Products of groups on Hopper, in Mosaic GPU's interpreter with its race detector.

Two thread blocks and small rings: each block has several tiles, and every slot is used again and again.
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped
from pallas_kernels.grouped import hopper as grouped_hopper
from pallas_kernels.grouped import hopper_bf16
from pallas_kernels.hopper.main_loop import TuningConfig
from pallas_kernels.quantized import E4M3, Quantized
from tests.pallas_kernels.products import BF16_ERROR, FP32_ERROR, blocks, error, lower, normal, tiles


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    for module in (grouped_hopper, hopper_bf16):
        monkeypatch.setattr(module, "num_multiprocessors", lambda: 2)


@pytest.mark.parametrize("sizes", [(100, 0, 57, 1), (0, 0, 0, 0), (0, 192, 0, 0)])
def test_groups_anywhere(interpret, sizes):
    """Rows of no group are zero although A is NaN there; a group's rows do not depend on where its tile begins."""
    rows, n, k = 192, 136, 256
    used = sum(sizes)
    a = tiles(rows, k)
    a = Quantized(a.values.at[used:].set(jnp.nan), a.scales.at[:, used:].set(jnp.nan), "tile")
    b, group_sizes = blocks(len(sizes), n, k), jnp.asarray(sizes, jnp.int32)
    actual = interpret(
        lambda a, b, s: grouped_hopper.grouped_matmul(a, b, s, config=TuningConfig(stages=2, interpreted=True)),
        a,
        b,
        group_sizes,
    )
    expected = np.asarray(
        grouped.grouped_matmul(a, b, group_sizes, out_dtype=jnp.float32, implementation="reference"), np.float64
    )
    assert not actual[used:].any()
    assert not used or error(actual[:used], expected[:used]) < BF16_ERROR


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_groups_in_bf16(interpret, transpose_b, out_dtype):
    sizes, rows, n, k = (100, 0, 57, 1), 196, 264, 200  # k ends within a step, rows and n within a tile
    used = sum(sizes)
    a = normal(rows, k).astype(jnp.bfloat16).at[used:].set(jnp.nan)
    b = normal(len(sizes), *((k, n) if transpose_b else (n, k)), seed=1).astype(jnp.bfloat16)
    group_sizes, config = jnp.asarray(sizes, jnp.int32), hopper_bf16.TuningConfig(stages=2, interpreted=True)

    def product(a, b, sizes):
        return hopper_bf16.grouped_matmul_bf16(
            a,
            b,
            sizes,
            transpose_b=transpose_b,
            out_dtype=out_dtype,
            config=config,
        )

    actual = interpret(product, a, b, group_sizes)
    how = {"transpose_b": transpose_b, "out_dtype": jnp.float32, "implementation": "reference"}
    expected = np.asarray(grouped.grouped_matmul_bf16(a, b, group_sizes, **how), np.float64)
    assert not actual[used:].any()
    assert error(actual[:used], expected[:used]) < (BF16_ERROR if out_dtype == jnp.bfloat16 else FP32_ERROR)


@pytest.mark.parametrize("config", [TuningConfig(stages=2), TuningConfig(products=1, split="n", stages=2)])
def test_masked_rooms(interpret, config):
    valid, room, n, k = (3, 0, 70, 129), 136, 136, 256
    experts = range(len(valid))
    each = [tiles(room, k, seed=e) for e in experts]
    a = Quantized(jnp.stack([q.values for q in each]), jnp.stack([q.scales for q in each]), "tile")
    b, valid_rows = blocks(len(valid), n, k), jnp.asarray(valid, jnp.int32)
    actual = interpret(
        lambda a, b, v: grouped_hopper.masked_matmul(a, b, v, config=dataclasses.replace(config, interpreted=True)),
        a,
        b,
        valid_rows,
    )
    expected = np.asarray(
        grouped.masked_matmul(a, b, valid_rows, out_dtype=jnp.float32, implementation="reference"), np.float64
    )
    for e, count in zip(experts, valid, strict=True):
        assert not count or error(actual[e, :count], expected[e, :count]) < BF16_ERROR


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
