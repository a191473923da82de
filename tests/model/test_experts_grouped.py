"""The routed experts in BF16 through grouped products equal the FP32 loop over blocks: values and every derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.experts_blocks import BlockedExperts
from deepseek_jax.model.experts_grouped import GroupedExperts
from tests.model.test_experts_fp8 import E, K, T, apply_local, ids, inputs

ERROR = 6e-3  # relative L2: a few roundings to BF16, of 1.7e-3 each; measured 3.1e-3 to 4.4e-3


@functools.partial(jax.jit, static_argnames="dtype")
def value_and_gradients(weights, x_TD, g_TD, gates_TK, experts_TK, dtype):
    def apply(weights, x_TD, gates_TK):
        if dtype == jnp.float32:
            return apply_local(BlockedExperts(32, 100), weights, x_TD, gates_TK, experts_TK)
        return apply_local(GroupedExperts(), weights, x_TD, gates_TK, experts_TK)

    weights, x_TD, g_TD = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(dtype), (weights, x_TD, g_TD))
    y, pull = jax.vjp(apply, weights, x_TD, gates_TK)
    dweights, dx, dgates = pull(g_TD)
    return {"y": y, "x": dx, "gates": dgates} | dweights


@pytest.mark.parametrize("case", ["random", "one expert", "empty experts", "absent"])
def test_equals_blocks(case):
    got, want = (value_and_gradients(*inputs(), ids(case), dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    for name, a in got.items():
        a, b = np.asarray(a, np.float64), np.asarray(want[name], np.float64)
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= ERROR * np.linalg.norm(b), name
    absent = np.asarray(ids(case)) // E != 0
    assert not np.asarray(got["gates"])[absent].any()


def test_nobody_comes():
    got = value_and_gradients(*inputs(), jnp.full((T, K), E, jnp.int32), dtype=jnp.bfloat16)
    assert not any(np.asarray(a, np.float32).any() for a in got.values())
