"""What surrounds a kernel: the mesh axes its operands vary over, and a trace that is made once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lowering import manual_axes


def kernel_of(traces):
    def kernel(x, rows, kind, *, factor=1):
        traces.append((kind, factor))
        assert not manual_axes.varies_over((x, rows))
        return {"sum": x.sum(0) * factor, "row": x[rows[0]], "none": None}

    return kernel


def test_the_same_shapes_and_options_are_traced_once():
    """Also by a partial made anew at each call; NumPy arrays are operands, not options."""
    traces = []
    kernel, x = kernel_of(traces), jnp.arange(12.0).reshape(4, 3)
    for rows in (np.array([1]), np.array([2])):
        result = manual_axes.call(functools.partial(kernel, factor=2), x, rows, "kind")
        np.testing.assert_array_equal(result["sum"], 2 * x.sum(0))
        np.testing.assert_array_equal(result["row"], x[rows[0]])
        assert result["none"] is None
    assert traces == [("kind", 2)]
    manual_axes.call(kernel, x, np.array([1]), "kind")
    assert traces == [("kind", 2), ("kind", 1)]


def test_results_vary_as_operands_do():
    mesh = jax.make_mesh((2, 2), ("data", "expert"))
    seen = []

    def local(x, rows):
        result = manual_axes.call(kernel_of([]), x, rows, "kind")
        seen.append({name: manual_axes.varies_over(leaf) for name, leaf in result.items()})
        return jax.lax.psum(result["sum"], ("data",))

    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(local, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P()))
        x = jax.device_put(np.arange(8.0, dtype=np.float32).reshape(4, 2), jax.P("data", None))
        np.testing.assert_array_equal(run(x, jnp.zeros(1, jnp.int32)), [12.0, 16.0])
    assert seen[0] == {"sum": {"data"}, "row": {"data"}, "none": frozenset()}
