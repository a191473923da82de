"""MLA decode compiles for real TPUs on a machine that has none: odd rows on each, and V3's 128 heads on one."""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.mla_decode import mla_decode
from tests.support.tpu import compile_elsewhere, structs_on

ODD, V3, V3_DRAFTS = (1, 3), (1, 128), (4, 128)  # queries, heads
TOPOLOGIES = {"v5p:2x2x1": (ODD, V3, V3_DRAFTS), "v6e:2x2x1": (ODD,), "tpu7x:2x2x1": (ODD,)}
BATCH, PAGES = 3, 20  # 20 pages are three blocks


def compile_all(topology: str) -> None:
    """Compile the kernel for a device of `topology`."""
    struct = structs_on(topology)
    cache, lengths = struct((100, 64, 576), jnp.bfloat16), struct((BATCH,), jnp.int32)
    tables = struct((BATCH, PAGES), jnp.int32)
    for queries, heads in TOPOLOGIES[topology]:
        q = struct((BATCH, queries, heads, 576), jnp.bfloat16)
        call = functools.partial(mla_decode, scale=0.1, implementation="tpu")
        compiled = jax.jit(call).trace(q, cache, tables, lengths).lower().compile()
        text = compiled.as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 1
        assert f" bf16[{','.join(map(str, cache.shape))}]" in text and "copy(%cache" not in text


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_kernel_compiles_for_tpu(topology):
    compile_elsewhere(__file__, topology)


if __name__ == "__main__":
    compile_all(*sys.argv[1:])
