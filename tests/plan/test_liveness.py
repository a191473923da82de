"""What lives at once: small programs whose peak is counted by hand, and what more work or less remat does to a step."""

import functools

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.plan.liveness import gradient_bytes, kept_bytes, peak_bytes
from deepseek_jax.plan.meshes import fit_as_written
from tests.support import small

KILOBYTE = 1024  # an array of 16 x 16 in FP32


def scan(x):
    return jax.lax.scan(lambda c, _: (c @ c, c), x, length=5)[1]


@pytest.mark.parametrize(
    ("function", "kilobytes"),
    [
        (lambda x: x @ x, 1),
        (lambda x: (x @ x) @ x, 2),  # operand and result
        (lambda x: jnp.tanh(x @ x) + 1.0, 1),  # in place: of tanh nothing is stored
        (lambda x: (y := x @ x, y @ y, y @ x), 3),  # all are results
        (lambda x: ((x @ x) @ x, (x @ x).sum()), 2),  # what nobody reads again is gone
        (scan, 7),  # stacked 5, carry, one in the body
        (jax.jit(lambda x: ((x @ x) @ x) @ x), 2),  # a call needs what its body needs
    ],
)
def test_programs_whose_memory_is_known(function, kilobytes):
    peak = peak_bytes(jax.make_jaxpr(function)(jax.ShapeDtypeStruct((16, 16), jnp.float32)).jaxpr)
    assert kilobytes * KILOBYTE <= peak < (kilobytes + 0.1) * KILOBYTE


@functools.cache
def step_bytes(remat, sequences):
    """Of the small model on one device in BF16, `sequences` in a micro-batch."""
    tree = small.config_dict()
    tree.mesh.update({"data": 1, "node": 1, "expert": 1})
    tree.model.update({"num_layers": 2, "num_dense_layers": 1, "num_mtp_layers": 0})
    tree.execution.update({"precision": "bf16", "remat": remat})
    tree.training.update({"micro_batch_size": sequences, "batch_size": (("constant", 1.0, 32),)})
    fit = fit_as_written(from_config_dict(tree), 1)
    return gradient_bytes(fit.config, fit.mesh)


def test_what_is_computed_again_does_not_live():
    assert step_bytes("full", 16) < step_bytes("selective", 16) < step_bytes("none", 16)


def test_more_sequences_need_more():
    """Less than in proportion: gradients and weights stay."""
    one, two = step_bytes("none", 16), step_bytes("none", 32)
    assert one < two < 2 * one


def test_what_a_layer_keeps_is_what_its_loop_hands_to_the_one_that_goes_back():
    """Of a layer tanh(x w + b) input and output are kept, 1 kB each. w and b are read again, and gradients are new."""

    def loss(w, b, x):
        return jax.lax.scan(lambda x, wb: (jnp.tanh(x @ wb[0] + wb[1]), x.sum()), x, (w, b))[0].sum()

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    stack = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    assert kept_bytes(jax.make_jaxpr(jax.grad(loss, (0, 1)))(stack, stack, x).jaxpr) == 2 * KILOBYTE
    assert kept_bytes(jax.make_jaxpr(scan)(x).jaxpr) is None
