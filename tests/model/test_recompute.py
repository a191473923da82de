"""What recomputation keeps comes back as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
