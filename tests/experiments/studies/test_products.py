"""`experiments.studies.products`: the emulated recipe is the kernels'."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.precision import ATTENTION_OUTPUT, HIDDEN
from experiments.studies import activation_study, products


@pytest.mark.parametrize("recipe", [HIDDEN, ATTENTION_OUTPUT], ids=["hidden", "attention output"])
def test_the_emulated_recipe_is_ours(recipe):
    """But for results in BF16 and ties that FP32 scales decide otherwise; with a partial block, outliers and a token of
    zeros.
    """
    rng = np.random.default_rng(0)
    x, g, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((256, 128), (256, 144), (128, 144)))
    x[:, 7] *= 50
    g *= np.exp2(rng.integers(-3, 3, (256, 1)))
    g[5] = 0
    x, g = x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)
    wide = x.astype(np.float32), g.astype(np.float32), w
    ways = (
        products.exact(*wide),
        products.ours(recipe, x, g, w),
        products.emulated(recipe, *wide),
    )
    for want, got, emulation, least in zip(*ways, activation_study.LEAST_COSINE.values(), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float32) - emulation) < 5e-3 * np.linalg.norm(want)
        assert activation_study._compare(emulation, want)["cosine"] > least
