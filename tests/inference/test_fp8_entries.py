"""Cache entries in FP8, against the same computed by NumPy byte by byte."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.inference.fp8_entries import pack, packed_bytes, unpack
from deepseek_jax.model.attention import Entry


@pytest.fixture(scope="module")
def entry():
    """Of two sequences of three tokens; one group has an outlier, one is zero, one tiny."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(2, 3, 512)).astype(ml_dtypes.bfloat16)
    latent[0, 0, 5], latent[0, 1, :128], latent[1, 2, 128:256] = 300.0, 0.0, 1e-30
    rotary = (100 * rng.normal(size=(2, 3, 64))).astype(ml_dtypes.bfloat16)
    return Entry(jnp.asarray(latent), jnp.asarray(rotary))


def test_bytes_are_those_of_numpy(entry):
    packed = np.asarray(jax.jit(pack)(entry))
    assert packed.dtype == np.uint8 and packed.shape == (2, 3, packed_bytes(512, 64)) == (2, 3, 656)
    for i in np.ndindex(2, 3):
        latent = np.asarray(entry.latent_BSC[i], np.float32).reshape(4, 128)
        scales = np.maximum(np.abs(latent).max(1), np.float32(2.0**-100)) * np.float32(1 / 448)
        values = (latent * (np.float32(1) / scales)[:, None]).astype(ml_dtypes.float8_e4m3fn)
        assert packed[i].tobytes() == values.tobytes() + scales.tobytes() + np.asarray(entry.rotary_BSR[i]).tobytes()


def test_what_comes_back_is_near(entry):
    """E4M3 has 3 bits of mantissa: half a step is 1/16 of a value, or 2^-10 of the scale for the smallest."""
    back = jax.jit(unpack, static_argnums=(1, 2))(pack(entry), 512, jnp.dtype("float32"))
    np.testing.assert_array_equal(back.rotary_BSR, np.asarray(entry.rotary_BSR, np.float32))
    want = np.asarray(entry.latent_BSC, np.float32).reshape(2, 3, 4, 128)
    step = np.maximum(np.abs(want) / 16, np.abs(want).max(-1, keepdims=True) / 448 / 2**10)
    assert (np.abs(np.asarray(back.latent_BSC).reshape(want.shape) - want) <= 1.001 * step).all()
    relative = np.linalg.norm(np.asarray(back.latent_BSC) - want.reshape(2, 3, 512), axis=-1)
    relative /= np.linalg.norm(want.reshape(2, 3, 512), axis=-1)
    assert 0.01 < relative.max() < 0.035  # 2.6% of normal values, measured
    again = pack(unpack(pack(entry), 512, jnp.dtype("float32")))  # a second rounding changes no value
    np.testing.assert_array_equal(again[..., :512], pack(entry)[..., :512])


def test_nothing_that_is_not_a_number_becomes_one(entry):
    broken = entry._replace(latent_BSC=entry.latent_BSC.at[0, 0, 0].set(jnp.nan).at[0, 1, 200].set(jnp.inf))
    back = unpack(pack(broken), 512)
    assert back.latent_BSC.dtype == jnp.bfloat16
    bad = np.isnan(np.asarray(back.latent_BSC, np.float32)).reshape(6, 4, 128)
    assert bad.sum() == 256 and bad[0, 0].all() and bad[1, 1].all()


def test_widths_that_have_no_entry_are_refused():
    with pytest.raises(ValueError, match="a latent of 64 values has no FP8 entry: it must be a multiple of 128"):
        pack(Entry(jnp.zeros((1, 1, 64)), jnp.zeros((1, 1, 8))))
    with pytest.raises(ValueError, match="655 bytes are no packed entry"):
        unpack(jnp.zeros((1, 655), jnp.uint8), 512)
