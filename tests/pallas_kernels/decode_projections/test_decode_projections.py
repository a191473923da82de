"""The kernels of a decoding step's attention in the interpreter of their machine, against the reference."""

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.decode_projections import (
    TuningConfig,
    absorb,
    add_norm,
    hopper,
    hopper_absorb,
    hopper_fp8,
    hopper_rows,
    latents,
    project,
    reference,
)
from pallas_kernels.quantize import quantize_tiles
from tests.pallas_kernels.decode_projections import cases

PLAIN = TuningConfig(depth=64, interpreted=True)


@pytest.mark.parametrize(("batch", "splits"), [(1, 2), (3, 1)])
def test_products_in_parts_or_whole(interpret, batch, splits):
    x, weight = cases.normal(0, 8, batch * 256), cases.normal(1, batch, 256, 128)
    found = interpret(functools.partial(hopper.project, splits=splits, config=PLAIN), x, weight)
    assert found.shape == (splits, 8, batch * 128)
    want = reference.project(x, weight, whole=False)[0]
    assert cases.distance(found.sum(0), want) < (1e-6 if splits > 1 else 4e-3)


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
def test_products_in_fp8_quantise_the_rows_as_training_does(interpret, scale):
    x, weight = cases.normal(0, 8, 512), cases.blocks(1, 192, 512)
    run = functools.partial(hopper_fp8.project, splits=2, scale=scale, config=PLAIN)
    want = reference.project_fp8(x, weight.values, weight.scales, scale=scale)[0]
    for rows in (x, quantize_tiles(x, scale=scale, implementation="reference")):
        found = interpret(run, rows, weight.values, weight.scales).sum(0)
        assert cases.distance(found, want) < 2e-6


def test_queries_into_latent_space(interpret):
    operands = cases.normal(0, 2, 8, 2 * 192, dtype=jnp.float32), cases.normal(1, 2, 128, 128), cases.table(8)
    found = interpret(functools.partial(hopper_absorb.absorb, config=PLAIN), *operands)
    assert cases.distance(found, reference.absorb(*operands)) < 4e-3


@pytest.mark.parametrize("scale", [None, "fp32"])
def test_latents_are_normed_and_written_where_there_is_a_page(interpret, scale):
    parts, pages = cases.normal(0, 2, 8, 512 + 512 + 64, dtype=jnp.float32), cases.normal(1, 4, 64, 576)
    gains = tuple(1 + cases.normal(seed, 512, dtype=jnp.float32) for seed in (2, 3))
    operands = parts, gains, cases.table(8), pages, cases.places(8, 4)
    run = functools.partial(hopper_rows.latents, eps=1e-6, scale=scale, config=PLAIN)
    found = [interpret(lambda *operands, i=i: run(*operands)[i], *operands) for i in range(3 if scale else 2)]
    want = reference.latents(*operands, eps=1e-6, scale=scale)
    near = [4e-3, 2.0**-3, 4e-3] if scale else [4e-3, 4e-3]  # a value may round to the E4M3 number beside it
    assert all(cases.distance(*pair) <= most for *pair, most in zip(found, want, near, strict=True))
    untouched = (want[0] == pages).all(-1)
    assert untouched.sum() == 4 * 64 - 5, "8 rows, of which 3 have no page"
    assert (found[0] == pages)[untouched].all()


@pytest.mark.parametrize(("splits", "dtype", "scale"), [(3, jnp.float32, "pow2"), (1, jnp.bfloat16, None)])
def test_the_stream_its_norm_and_tiles_of_that(interpret, splits, dtype, scale):
    x, parts, gain = cases.normal(0, 8, 512), cases.normal(1, splits, 8, 512, dtype=dtype), cases.normal(2, 512)
    operands = x, parts, gain.astype(jnp.float32)

    def flat(*operands):
        results = hopper_rows.add_norm(*operands, eps=1e-6, scale=scale, zeros=256, config=PLAIN)
        return jnp.concatenate([y.reshape(-1).astype(jnp.float32) for y in results])

    found = interpret(flat, *operands)
    want = reference.add_norm(*operands, eps=1e-6, scale=scale, zeros=256)
    assert len(want) == (5 if scale else 3)
    for one in want[:-1]:
        piece, found = found[: one.size], found[one.size :]
        assert cases.distance(piece, one.reshape(-1)) < 4e-3
    assert len(found) == 256 and not found.any(), "zeros for marks"


@pytest.mark.parametrize(
    ("batch", "k", "columns", "rows", "splits"),
    [
        (1, 2048, 2112, 16, 4),
        (1, 1536, 3072, 16, 2),
        (16, 512, 128, 16, 4),
        (1, 7168, 2112, 8, 7),
        (1, 16384, 7168, 8, 16),
    ],
)
def test_k_is_cut_until_all_multiprocessors_work_and_memory_suffices(batch, k, columns, rows, splits, monkeypatch):
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda: 132)
    assert hopper.choose_splits(batch, k, columns, rows, 128) == splits


def test_operands_that_do_not_fit_are_refused():
    x, weight = cases.normal(0, 8, 256), cases.normal(1, 1, 256, 128)
    with pytest.raises(ValueError, match="they must be"):
        project(x, weight[:, :128])
    with pytest.raises(ValueError, match="do not fit"):
        absorb(cases.normal(0, 1, 8, 100), weight, cases.table(8))
    with pytest.raises(ValueError, match="do not fit"):
        add_norm(x, x, x[0], eps=0)
    gains = jnp.ones(512), jnp.ones(512)
    with pytest.raises(ValueError, match="do not fit"):
        latents(
            cases.normal(0, 1, 8, 512), gains, cases.table(8), cases.normal(0, 4, 64, 576), cases.places(8, 4), eps=0
        )
    with pytest.raises(NotImplementedError, match="7 rows"):
        project(x[:7], weight, implementation="hopper")


def test_rows_do_not_reach_each_other(interpret):
    """Rows of a batch without a sequence hold anything."""
    x, weight = cases.normal(0, 8, 256), cases.normal(1, 1, 256, 64)
    run = functools.partial(hopper.project, splits=1, config=PLAIN)
    found = interpret(run, x.at[3].set(jnp.nan), weight)
    others = jnp.arange(8) != 3
    assert jnp.isfinite(found[:, others]).all()
    assert jnp.isnan(found[:, 3]).all()
