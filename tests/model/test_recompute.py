"""What recomputation keeps comes back as it was, and the choice of experts is made once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model import balance, router
from deepseek_jax.model.recompute import KEPT, keep, recomputed
from pallas_kernels.quantized import E4M3
from tests.support import small


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [E4M3, jnp.bfloat16])
def test_kept_arrays_come_back_bit_for_bit(remat, dtype, scanned):
    """E4M3's largest numbers, too, which as IEEE numbers of four exponent bits would be infinite."""
    execution = small.config().with_(execution={"remat": remat}).execution
    x = jnp.asarray([0.0, 2.0**-9, 200.0, 240.0, 256.0, 448.0, -448.0], dtype)

    def body(w):
        return jnp.sum(keep(x + jnp.zeros((), x.dtype), KEPT[0]).astype(jnp.float32) * w)

    gradient = jax.jit(jax.grad(recomputed(execution, body, scanned)))(jnp.ones(x.shape))
    np.testing.assert_array_equal(gradient, x.astype(jnp.float32))


@functools.cache
def scores():
    """Scores of 24 tokens for 16 experts, many of them tied."""
    return jnp.asarray(np.random.default_rng(0).integers(1, 4, (1, 24, 16)) / 4, jnp.float32)


@pytest.mark.parametrize("remat", ["selective", "full"])
@pytest.mark.parametrize("frequency", ["unbiased", "selected"])
def test_a_recomputed_router_cannot_choose_otherwise(remat, frequency, monkeypatch):
    """Of tied experts each call takes others, as a second computation that XLA fuses in another way may.

    Gradients of gates and balance loss with recomputation are those without, and every choice is made once (NVIDIA's
    Automodel #3325).
    """
    calls = []

    def unsteady(x, k):
        calls.append(k)
        rng = np.random.default_rng(len(calls))
        order = np.argsort(-np.asarray(x) + rng.uniform(0, 1e-3, x.shape), axis=-1)[..., :k].astype(np.int32)
        return np.take_along_axis(np.asarray(x), order, -1), order

    def top_k(x, k):
        like = jax.ShapeDtypeStruct((*x.shape[:-1], k), x.dtype)
        return jax.pure_callback(functools.partial(unsteady, k=k), (like, like.update(dtype=jnp.int32)), x)

    class Lax:
        def __getattr__(self, name):
            return top_k if name == "top_k" else getattr(jax.lax, name)

    monkeypatch.setattr(router, "lax", Lax())
    monkeypatch.setattr(balance, "lax", Lax())
    config = small.config().with_(
        execution={"remat": remat}, loss={"balance_frequency": frequency}, model={"num_kept_groups": 4}
    )
    loads = jnp.asarray(np.random.default_rng(1).normal(size=(1, 24, config.model.experts_per_token)), jnp.float32)

    def body(scores_BSE):
        experts, gates = router.route(config.model, scores_BSE, jnp.zeros(16))
        stats = balance.router_stats(config.loss, config.model, scores_BSE, experts, jnp.ones((1, 24), bool))
        return (gates * loads * jnp.cos(experts)).sum() + stats.sequence_balance, stats.counts_E

    grads, counts = jax.jit(jax.grad(body, has_aux=True))(scores())
    num_calls = len(calls)
    calls.clear()
    again, counts_again = jax.jit(jax.grad(recomputed(config.execution, body, False), has_aux=True))(scores())
    assert len(calls) == num_calls == (2 if frequency == "unbiased" else 1)
    np.testing.assert_array_equal(counts_again, counts)
    np.testing.assert_allclose(again, grads, rtol=1e-6)
