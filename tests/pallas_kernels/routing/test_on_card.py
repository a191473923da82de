"""The routing kernel on a Hopper GPU, where there is one, against the reference."""

import functools

import jax
import pytest

from pallas_kernels.routing import route
from pallas_kernels.routing.rule import Rule
from tests.pallas_kernels.routing import cases

pytestmark = pytest.mark.usefixtures("card")


@pytest.mark.parametrize("num_tokens", [1, 16, 32, 33, 128, 200, 512])
@pytest.mark.parametrize(("width", "num_routed"), [(2048, 64), (7168, 256)])
def test_the_kernel_equals_the_reference(num_tokens, width, num_routed):
    operands = cases.make(num_tokens, width, num_routed)
    rule = Rule(8, num_groups=8, num_kept_groups=4, scale=2.5)
    run = jax.jit(functools.partial(route, rule=rule, num_experts=num_routed + 1), static_argnames="implementation")
    found = run(*operands, implementation="hopper")
    cases.check(found, run(*operands, implementation="reference"), operands, rule, num_routed + 1)
    for _ in range(3):
        assert (run(*operands, implementation="hopper").gates == found.gates).all(), "another result of the same"
