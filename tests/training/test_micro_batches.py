"""What a step gives is the same in one micro-batch as in several, and a program has its forward pass once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deepseek_jax.parallel.gradient_sums import GradientSum
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import ROWS, P
from deepseek_jax.training.micro_batches import split, sum_over
from tests.support import small


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(small.config((2, 1, 2)).mesh, jax.devices()[:4])


def summed(mesh, micro_batch_size, rows=8):
    """Return the traced sum of a product over a batch, of which one part varies over the mesh and one does not.

    Another part is added to the sum by `of` itself, if there are several micro-batches.
    """

    def local(weight, batch):
        def of(micro_batch, total):
            x_BS = micro_batch["tokens_BS"] * weight
            lent = x_BS.sum(0) if total is None else GradientSum(total["lent"] + x_BS.sum(0))
            return {"varies": x_BS.sum(0), "lent": lent, "number": lax.psum(jnp.int32(x_BS.shape[0]), ROWS)}

        found = sum_over(of, split(batch, micro_batch_size))
        return lax.psum((found["varies"], found["lent"]), ROWS), found["number"]

    batch = {"tokens_BS": jnp.arange(3.0 * rows).reshape(rows, 3)}
    with jax.set_mesh(mesh):
        batch = jax.tree.map(lambda x: jax.device_put(x, P(ROWS)), batch)
        run = jax.jit(jax.shard_map(local, in_specs=(P(), {"tokens_BS": P(ROWS)}), out_specs=((P(), P()), P())))
        return run.trace(jnp.float32(2), batch), batch


@pytest.mark.parametrize("size", [4, 8])
def test_micro_batches_add_up_to_the_batch(mesh, size):
    traced, batch = summed(mesh, size)
    with jax.set_mesh(mesh):
        (total, lent), number = traced.lower().compile()(jnp.float32(2), batch)
    np.testing.assert_array_equal(total, 2 * np.arange(24.0).reshape(8, 3).sum(0))
    np.testing.assert_array_equal(lent, total)
    assert number == 8


def test_a_program_has_the_work_of_a_micro_batch_once(mesh):
    """Its first micro-batch outside the loop would make it twice as long."""
    one, several = (str(summed(mesh, size)[0].jaxpr).count(" mul ") for size in (8, 4))
    assert one == several == 1


def test_a_batch_that_is_no_multiple_is_refused(mesh):
    with pytest.raises(ValueError, match="a batch of 12 sequences is no multiple of training.micro_batch_size = 8"):
        summed(mesh, 8, rows=12)
