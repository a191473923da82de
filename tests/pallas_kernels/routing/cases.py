"""Cases of routing, and what they must give, by loops in FP64."""

import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.router import in_parts


def make(num_tokens, width, num_routed, *, tied=False, seed=0):
    """Return h, the router's parts, bias and valid; the second token is padding. `tied`: experts in equal pairs."""
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(num_tokens, width)), jnp.bfloat16)
    router, bias = rng.normal(size=(width, num_routed)) / width**0.5, 0.1 * rng.normal(size=num_routed)
    if tied:  # within a group and between neighbouring ones
        router[:, 1::2], bias[1::2] = router[:, ::2], bias[::2]
        router[:, num_routed // 2 :], bias[num_routed // 2 :] = router[:, : num_routed // 2], bias[: num_routed // 2]
    valid = jnp.asarray(np.arange(num_tokens) != 1)
    return h, in_parts(jnp.asarray(router, jnp.float32)), jnp.asarray(bias, jnp.float32), valid


def check(found, want, operands, rule, num_experts):
    """Assert that `found` is what the reference says, and that `dense` says the same as experts and gates."""
    *_, bias, valid = operands
    num_routed, valid = len(bias), np.asarray(valid)
    np.testing.assert_array_equal(found.experts, want.experts)
    np.testing.assert_allclose(found.gates, want.gates, rtol=5e-6, atol=1e-6)  # FP32 sums in another order
    np.testing.assert_allclose(found.scores, want.scores, rtol=5e-6, atol=1e-6)
    assert (np.asarray(found.experts)[~valid] == num_experts).all() and not np.asarray(found.gates)[~valid].any()
    everybody = np.arange(num_routed, num_experts)
    assert (np.asarray(found.experts)[valid, rule.k :] == everybody).all()
    if found.dense is None:
        return
    experts, gates = np.asarray(found.experts), np.asarray(found.gates)
    columns, num_rows = found.dense.gates.shape
    table = np.zeros((columns, num_rows), np.float32)
    bits = np.zeros((num_rows, 32 * found.dense.words.shape[1]), bool)
    for token, (chosen, weights) in enumerate(zip(experts, gates, strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            if expert < num_experts:
                table[expert, token], bits[token, expert] = weight, True
    np.testing.assert_allclose(found.dense.gates, table, rtol=2e-6, atol=1e-7)
    words = np.asarray(found.dense.words).astype(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32)
    np.testing.assert_array_equal((words & 1).astype(bool).reshape(bits.shape), bits)
