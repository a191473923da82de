"""The routed experts in FP8: close to FP32 in value and in every derivative, exact about who gets which rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model import experts_fp8
from deepseek_jax.model.exchange import exchange
from deepseek_jax.model.experts_blocks import BlockedExperts
from deepseek_jax.model.experts_fp8 import Fp8Experts
from deepseek_jax.parameters import Fp8Weight
from pallas_kernels import GROUP
from pallas_kernels.quantize import quantize_blocks
from pallas_kernels.quantized import Quantized

T, K, E, D, F = 96, 2, 4, 256, 128
# cosines; measured 0.0003 to 0.0007 above
LEAST = {"y": 0.9975, "x": 0.9975, "gates": 0.998, "gate_up_ED2F": 0.9975, "down_EFD": 0.9975}


def ids(case):
    rng = np.random.default_rng(3)
    chosen = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    if case == "one expert":
        chosen = np.stack([np.full(T, 2), np.full(T, E)], axis=1)
    if case == "empty experts":
        chosen = np.tile([1, 3], (T, 1))
    if case == "absent":
        chosen[5:40], chosen[50, 1] = E, -1
    return jnp.asarray(chosen, jnp.int32)


@functools.cache
def inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    weights = {
        "gate_up_ED2F": jax.random.normal(keys[0], (E, D, 2, F)) / D**0.5,
        "down_EFD": jax.random.normal(keys[1], (E, F, D)) / F**0.5,
    }
    arrays = (jax.random.normal(key, (T, D)).astype(jnp.bfloat16) for key in keys[2:4])
    return weights, *arrays, jax.random.uniform(keys[4], (T, K), minval=0.1)


def quantized(w):
    q = quantize_blocks(w.reshape(E, w.shape[1], -1))
    return q.values.reshape(w.shape), q.scales


def apply_local(experts, weights, x_TD, gates_TK, experts_TK):
    return exchange(x_TD, experts_TK, gates_TK, weights, experts, transport="local", num_experts=E, slack=1.0)


@functools.partial(jax.jit, static_argnames="fp8")
def value_and_gradients(weights, x_TD, g_TD, gates_TK, experts_TK, fp8):
    def apply(weights, x_TD, gates_TK):
        if not fp8:
            return apply_local(BlockedExperts(32, 100), weights, x_TD.astype(jnp.float32), gates_TK, experts_TK)
        parts = {name: Fp8Weight(w, *jax.lax.stop_gradient(quantized(w))) for name, w in weights.items()}
        return apply_local(Fp8Experts(), parts, x_TD, gates_TK, experts_TK)

    y, pull = jax.vjp(apply, weights, x_TD, gates_TK)
    dweights, dx, dgates = pull(g_TD.astype(y.dtype))
    return {"y": y, "x": dx, "gates": dgates} | dweights


@pytest.mark.parametrize("case", ["random", "one expert", "empty experts", "absent"])
def test_close_to_fp32(case):
    weights, x, g, gates = inputs()
    got, want = (value_and_gradients(weights, x, g, gates, ids(case), fp8) for fp8 in (True, False))
    for name, a in got.items():
        a, b = np.asarray(a, np.float64), np.asarray(want[name], np.float64)
        assert (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) >= LEAST[name], name
        assert a.dtype == b.dtype
    absent = np.asarray(ids(case)) // E != 0
    assert not np.asarray(got["gates"])[absent].any()
    assert not np.asarray(got["y"], np.float32)[absent.all(1)].any()


def test_a_row_meets_its_experts_alone():
    """Other rows change no value or derivative of it; a non-finite row shows only in its experts' gradients."""
    weights, x, g, gates = inputs()
    experts = ids("random")
    before = value_and_gradients(weights, x, g, gates, experts, fp8=True)
    after = value_and_gradients(weights, x.at[7].set(jnp.nan), g, gates, experts, fp8=True)
    for name in ("y", "x", "gates"):
        rows = np.delete(np.arange(T), 7)
        np.testing.assert_array_equal(np.asarray(before[name])[rows], np.asarray(after[name])[rows])
    assert np.isnan(np.asarray(after["y"], np.float32)[7]).all()
    for expert in range(E):
        touched = expert in np.asarray(experts[7])
        assert np.isnan(after["gate_up_ED2F"][expert]).any() == touched
        assert np.isnan(after["down_EFD"][expert]).any() == touched


def test_nobody_reads_slots_that_hold_no_row(monkeypatch):
    """On a GPU three kernels leave them unwritten. Here they hold NaN, as values and as scales."""

    def poisoned(kernel, rows):  # the dims along which slots lie, one for each result
        def run(*operands, num_rows, **options):
            def poison(x, dim, unit):
                if isinstance(x, Quantized):
                    scales = poison(x.scales, 1 - dim, GROUP if dim else 1)
                    return Quantized(poison(x.values, dim, 1), scales, x.grouping)
                index = jnp.arange(x.shape[dim]) * unit
                return jnp.where(
                    jnp.expand_dims(index < num_rows, 1 - dim) if x.ndim > 1 else index < num_rows, x, jnp.nan
                )

            seen.append(kernel.__name__)
            results = kernel(*operands, **options)
            several = isinstance(results, tuple)
            results = [poison(x, dim, 1) for x, dim in zip(results if several else (results,), rows, strict=True)]
            return tuple(results) if several else results[0]

        return run

    seen = []
    arguments = *inputs()[:3], inputs()[3], ids("absent")
    want = value_and_gradients(*arguments, fp8=True)
    for name, rows in (
        ("swiglu_quantize", (0,)),
        ("swiglu_backward_quantize", (0, 1, 1, 0)),
        ("requantize_transposed", (1,)),
    ):
        monkeypatch.setattr(experts_fp8, name, poisoned(getattr(experts_fp8, name), rows))
    got = jax.jit(lambda *args: value_and_gradients.__wrapped__(*args, fp8=True))(*arguments)  # traced anew
    assert len(set(seen)) == 3
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())
