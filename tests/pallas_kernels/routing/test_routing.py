"""Routing of few tokens: what the public function takes and refuses. tests/model/test_router.py has the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.experts_decode.plan import Dense
from pallas_kernels.routing import hopper_product, route
from pallas_kernels.routing.rule import Routing, Rule
from tests.pallas_kernels.routing import cases

RULE = Rule(4, num_groups=4, num_kept_groups=2)


def test_a_cpu_takes_the_reference():
    operands = cases.make(5, 64, 64)
    found = route(*operands, rule=RULE, num_experts=65)
    want = route(*operands, rule=RULE, num_experts=65, implementation="reference")
    cases.check(found, want, operands, RULE, 65)
    assert found.dense is None
    np.testing.assert_allclose(np.asarray(found.gates)[[0, 2, 3, 4], :4].sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"h": jnp.zeros((4, 64), jnp.float32)},
        {"router": jnp.zeros((64, 64), jnp.bfloat16)},
        {"bias": jnp.zeros((32,), jnp.float32)},
        {"valid": jnp.zeros((4,), jnp.int32)},
        {"valid": jnp.zeros((5,), jnp.bool_)},
        {"rule": dataclasses.replace(RULE, num_groups=5)},
        {"rule": dataclasses.replace(RULE, k=33)},
        {"num_experts": 63},
    ],
    ids=lambda change: next(iter(change)),
)
def test_operands_that_do_not_fit_are_refused(change):
    operands = dict(zip(("h", "router", "bias", "valid"), cases.make(4, 64, 64), strict=True))
    with pytest.raises(ValueError, match="must be|does not fit"):
        route(**operands | {"rule": RULE, "num_experts": 64} | change)


@pytest.mark.parametrize(
    ("num_tokens", "width", "num_routed", "message"),
    [(513, 64, 64, "513 tokens"), (4, 96, 64, "D = 96"), (4, 64, 160, "E = 160"), (4, 64, 320, "E = 320")],
)
def test_hopper_says_what_it_takes(num_tokens, width, num_routed, message):
    operands = cases.make(num_tokens, width, num_routed)
    with pytest.raises(NotImplementedError, match=message):
        route(*operands, rule=RULE, num_experts=num_routed, implementation="hopper")


def test_cuts_are_equal_and_not_too_many(monkeypatch):
    monkeypatch.setattr(hopper_product, "num_multiprocessors", lambda: 132)
    cuts = {shape: hopper_product.steps_of_cut(*shape) for shape in ((2048, 64), (7168, 256), (5120, 192), (64, 64))}
    assert cuts == {(2048, 64): 1, (7168, 256): 4, (5120, 192): 4, (64, 64): 1}


def test_a_routing_is_the_result_of_a_kernel_in_a_file():
    """As `export_cache` keeps kernels: JAX refuses tuples with names that it was not told of."""
    x = jnp.zeros(2)
    program = jax.export.export(jax.jit(lambda x: Routing(x, x, x, Dense(x, x))))(x).serialize()
    result = jax.export.deserialize(bytearray(program)).call(x)
    assert isinstance(result, Routing) and isinstance(result.dense, Dense)
