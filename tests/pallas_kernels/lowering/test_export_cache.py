"""Kernels lowered apart: found again, told apart, and the same for their callers. On a CPU, with functions in the place
of kernels.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import quantize
from pallas_kernels.lowering import export_cache, manual_axes
from pallas_kernels.lowering.export_cache import ExportCache
from pallas_kernels.quantized import Quantized

X = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def cache(tmp_path):
    cache = ExportCache(tmp_path / "kernels", platforms={"cpu": "cpu"})
    with export_cache.using(cache):
        yield cache
    cache.compilers.shutdown()


def kernel_of(traces):
    def kernel(x, q, factor):
        traces.append(factor)
        return {"product": x @ q.values * factor, "q": q, "none": None}

    return kernel


def test_a_file_stands_for_the_same_operation_options_and_shapes_only(cache):
    traces = []
    kernel = kernel_of(traces)
    q = Quantized(jnp.ones((4, 2)), jnp.ones((1, 2)), "tile")

    def run(x, q, factor):
        jax.clear_caches()  # a new process
        return manual_axes.call(kernel, x, q, factor)

    for _ in range(2):
        result = run(X, q, 2)
        np.testing.assert_array_equal(result["product"], 2 * X @ q.values)
        assert result["none"] is None
        assert result["q"].grouping == "tile"
    assert traces == [2]
    run(X, q, 3)
    run(X[:2], q, 3)
    run(X, Quantized(q.values, q.scales, "block"), 3)
    assert traces == [2, 3, 3, 3]
    assert len(list(cache.folder.glob("kernel-*"))) == 4


def test_a_damaged_file_is_made_again(cache, caplog):
    traces = []
    kernel, q = kernel_of(traces), Quantized(X.T, X, "tile")
    manual_axes.call(kernel, X, q, 2)
    (path,) = cache.folder.glob("kernel-*")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        jax.clear_caches()
        manual_axes.call(kernel, X, q, 2)
    assert traces == [2, 2]
    assert "is damaged and made again" in caplog.text


def test_cold_times_stay_cold(cache):
    traces = []
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for _ in range(2):
            jax.clear_caches()
            manual_axes.call(kernel_of(traces), X, Quantized(X.T, X, "tile"), 2)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert traces == [2, 2]
    assert not cache.folder.exists()


def test_a_caller_on_a_mesh_sees_no_difference(cache):
    def run():
        def local(x):
            kernel = kernel_of([])
            product = jax.checkpoint(lambda x: manual_axes.call(kernel, x, Quantized(x.T, x, "tile"), 2)["product"])(x)
            return jax.lax.psum(product, "data")

        with jax.set_mesh(jax.make_mesh((2, 2), ("data", "expert"))):
            x = jax.device_put(np.arange(8, dtype=np.float32).reshape(4, 2), jax.P("data", None))
            return jax.jit(jax.shard_map(local, in_specs=jax.P("data"), out_specs=jax.P()))(x)

    apart = run()
    assert len(list(cache.folder.iterdir())) == 1
    with export_cache.using(None):
        np.testing.assert_array_equal(apart, run())


def test_kernels_are_compiled_meanwhile(cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        export_cache,
        "_compile",
        lambda exported, shapes, compile=export_cache._compile: compiled.append(compile(exported, shapes)),
    )
    manual_axes.call(kernel_of([]), X, Quantized(X.T, X, "tile"), 2)
    cache.compilers.shutdown()  # waits
    assert len(compiled) == 1


def test_kernels_are_called_after_their_operations():
    lowered = jax.jit(lambda x: quantize.quantize_tiles(x, implementation="hopper")).trace(jnp.zeros((64, 128)))
    assert "quantize_tiles_mosaic_gpu" in lowered.lower(lowering_platforms=("cuda",)).as_text()


def test_the_digest_of_sources_covers_the_package():
    """A kernel in a file is that of the text that made it."""
    assert Path(pallas_kernels.__file__).parent == export_cache.PACKAGE
