"""The benchmark of MLA decode, as far as a machine without a GPU can show it: operands, counts, FlashMLA's figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import decode
from pallas_kernels.bench.decode import Shape


def test_operands_are_a_valid_call_on_pages_of_their_own():
    shape, pool = Shape(2, 1, (70, 64)), jax.random.normal(jax.random.key(0), (5, 64, 576), jnp.bfloat16)
    q, cache, tables, lengths, schedule = decode.operands(shape, pool, seed=1)
    owned = [*np.asarray(tables[0, :2]), int(tables[1, 0])]
    assert len(set(owned)) == 3 and max(owned) < 5
    out, lse = decode.reference(q, cache, tables, lengths, schedule)
    assert out.shape == (2, 1, 2, 512) and jnp.isfinite(lse).all()


def test_work_is_every_entry_once_and_two_products():
    shape = Shape(16, 2, (100, 28))
    assert shape.bytes == 128 * 1152 + 2 * 32 * 1088 * 2
    assert shape.flops == 128 * 32 * 1088 * 2


def test_flash_mla_is_scaled_by_what_binds():
    card = {"read": 2 * decode.FLASH_MLA_READ, "product": decode.FLASH_MLA_PRODUCT / 2}
    assert decode.flash_mla(Shape(16, 1, (4096,) * 128), **card) == pytest.approx(151 / 2)
    assert decode.flash_mla(Shape(128, 1, (4096,) * 128), **card) == pytest.approx(234 * 2)
    assert decode.flash_mla(Shape(16, 1, (4000,)), **card) is None
